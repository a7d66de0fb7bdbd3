"""The tables of docs/design/cpu-engine.md, from the committed results: goals, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import networks

__all__ = ["goals_table", "layers_table"]

BATCHES = (1, 8, 16, 32)
PEAK = 97e9
"""Multiply-adds a second in fp32 of the two cores that the goals were set for (KERNELS.md)."""


@dataclass(frozen=True)
class _Goal:
    """A row of the goals of KERNELS.md; `time`: our time over theirs instead of the inverse."""

    title: str
    goals: tuple[str, str, str]  # floor, goal, stretch
    network: str
    precision: str
    provider: str
    baseline: str
    time: bool = False
    ladder: bool = False


_GOALS = (
    _Goal(
        "fp32 dual vs two torch.compile passes", ("1.45x", "1.65x", "1.72x"),
        "resnet50", "fp32", "fastpie-dual", "two torch.compile passes",
    ),
    _Goal(
        "fp32 dual vs one eager channels_last pass, *time*", ("1.05", ".98", ".93"),
        "resnet50", "fp32", "fastpie-dual", "one eager channels_last pass", time=True,
    ),
    _Goal(
        "pruned pass alone vs DeepSparse 1.8, *time*", ("1.0", ".7", ".55"),
        "resnet50", "fp32", "fastpie-pruned", "one DeepSparse pruned pass", time=True,
    ),
    _Goal(
        "bf16 dual vs two compiled bf16 passes", ("1.2x", "1.4x", "1.6x"),
        "resnet50", "bf16", "fastpie-dual", "two torch.compile passes",
    ),
    _Goal(
        "DenseNet-121 fp32 dual vs two compiled passes", ("1.3x", "1.6x", "1.9x"),
        "densenet121", "fp32", "fastpie-dual", "two torch.compile passes",
    ),
    _Goal(
        "ladder of 10 levels vs 11 compiled passes", ("1.4x", "1.7x", "2.1x"),
        "resnet50", "fp32", "fastpie-dual", "11 torch.compile passes", ladder=True,
    ),
)  # fmt: skip


def goals_table(rows: Sequence[dict[str, Any]]) -> str:
    """The goals beside what was measured: masks by magnitude over each layer, .9 removed."""
    lines = [
        f"| goal | floor | goal | stretch | batch {' | '.join(str(b) for b in BATCHES)} |",
        "|---" * (4 + len(BATCHES)) + "|",
    ]
    for goal in _GOALS:
        found = [_measured(rows, goal, batch) for batch in BATCHES]
        lines.append(f"| {goal.title} | {' | '.join((*goal.goals, *found))} |")
    scoring = _find(rows, "resnet50", "fp32", 16, "fastpie-scoring", "fastpie-dual", False)
    if scoring:
        share = f"{100 / scoring['ratio']:.2g} %"
        lines.append(f"| scoring, share of the forward | 2 % | .5 % | .2 % | | | {share} | |")
    ours, theirs = (
        _find(rows, "resnet50", "fp32", 16, provider, None, False)
        for provider in ("fastpie", "compile")
    )
    if ours and theirs:
        text = (
            f"ResNet-50, batch 16, fp32: compiling both models and the first call take "
            f"{_compile(ours)} (torch.compile {_compile(theirs)}); peak memory while running "
            f"{ours['memory_mib']['running']:.0f} MiB (two compiled models "
            f"{theirs['memory_mib']['running']:.0f} MiB)."
        )
        lines += ["", text]
    return "\n".join(lines)


def layers_table(rows: Sequence[dict[str, Any]]) -> str:
    """`engine.report()` of ResNet-50's pruned pass, with the share of the peak of each layer."""
    row = _find(rows, "resnet50", "fp32", 16, "fastpie", None, False)
    if not row:
        return "not measured"
    work = networks.multiply_adds_by_layer("resnet50")
    kept = (1 - row["sparsity"]) * row["batch"]
    dense = sum(part["seconds"] for part in row["report"] if part["model"] == "dense")
    pruned = [part for part in row["report"] if part["model"] != "dense"]
    seconds = sum(part["seconds"] for part in pruned)
    whole = kept * sum(work.values()) / seconds / PEAK
    text = (
        f"Dense pass {dense * 1e3:.0f} ms, pruned pass {seconds * 1e3:.0f} ms. *Peak* is the share "
        f"of {PEAK / 1e9:g} G multiply-adds a second (two cores) that the kept weights' multiply-adds "
        f"reach; over the whole pass {whole:.2f}."
    )
    lines = [
        text,
        "",
        "| layer | kernel | images | ms | peak | oneDNN ms |",
        "|---|---|---|---|---|---|",
    ]
    for part in pruned:
        name = part["layer"].split("/")[0]
        peak = ""
        if name in work and not part["kernel"].startswith("to "):
            peak = f"{kept * work[name] / part['seconds'] / PEAK:.2f}"
        over = [f"{o['seconds'] * 1e3:.1f}" for o in part["over"] if o["kernel"] == "onednn"]
        lines.append(
            f"| {part['layer']} | {part['kernel']} | {part['images']} | {part['seconds'] * 1e3:.2f} "
            f"| {peak} | {''.join(over)} |"
        )
    return "\n".join(lines)


def _find(
    rows: Sequence[dict[str, Any]],
    network: str,
    precision: str,
    batch: int,
    provider: str,
    baseline: str | None,
    ladder: bool,
) -> dict[str, Any] | None:
    """The row of this provider and baseline, the last where several machines have one."""

    def level(row: dict[str, Any]) -> bool:
        return isinstance(row["sparsity"], list) if ladder else row["sparsity"] == 0.9

    wanted = (network, precision, batch, "magnitude", "layer", provider, baseline)
    keys = ("network", "precision", "batch", "kind", "scope", "provider", "baseline")
    size = list(networks.NETWORKS[network].size)
    found = [
        row
        for row in rows
        if tuple(row.get(key) for key in keys) == wanted and row["size"] == size and level(row)
    ]
    return found[-1] if found else None


def _measured(rows: Sequence[dict[str, Any]], goal: _Goal, batch: int) -> str:
    row = _find(
        rows, goal.network, goal.precision, batch, goal.provider, goal.baseline, goal.ladder
    )
    if row is None:
        return "not measured"
    return f"{1 / row['ratio']:.2f}" if goal.time else f"{row['ratio']:.2f}x"


def _compile(row: dict[str, Any]) -> str:
    seconds = row["compile_seconds"]
    cached = "" if seconds["cached"] is None else f", {seconds['cached']:.1f} s from the cache"
    return f"{seconds['cold']:.1f} s{cached}"
