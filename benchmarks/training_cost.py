"""The table of what training costs, from the results of bench_attention, bench_sdclr and bench_masked_training."""

from __future__ import annotations

from typing import Any

__all__ = ["TRAINING", "training_cost_table"]

TRAINING = ("attention", "sdclr", "masked-training")
"""Of the files that hold it."""

_WHAT = {
    "attention": "a re-mining, against 5 epochs",
    "sdclr": "SDCLR step",
    "masked-training": "masked training step",
}


def training_cost_table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement; `rows` of the files in `TRAINING`."""
    lines = [
        "| what | network | removed | how | time | against | its time | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, against = row["seconds"]["p50"], row["baseline_seconds"]["p50"]
        size = "x".join(str(side) for side in row["size"])
        removed = f"{row['sparsity']:g}" if isinstance(row.get("sparsity"), float) else ""
        if row.get("scope"):
            removed += f", {row['scope']}"
        lines.append(
            f"| {_WHAT[row['head']['what']]} | {row['network']}, batch {row['batch']}, {size} | {removed} "
            f"| {row['provider']} | {_time(seconds)} | {row['baseline']} | {_time(against)} "
            f"| **{seconds / against:.3f}** |"
        )
    lines += ["", "Share: the time of what is on the left of that on the right; lower is better."]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
