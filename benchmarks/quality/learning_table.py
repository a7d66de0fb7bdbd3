"""Tables of the comparison of recipes, from `benchmarks/results/quality-learning-*.json`."""

from __future__ import annotations

from typing import Any

__all__ = ["control_table", "learning_table"]

# Of each set the figures that are shown; all are in the file.
_SHOWN = {
    "digits": ("balanced accuracy", "tail recall", "on its side", "worst group gap"),
    "chest film": ("mAP", "mAP head", "mAP medium", "mAP tail", "another look"),
    "skin, classes": ("balanced accuracy", "tail recall", "worst group gap", "CAM IoU", "CorLoc"),
    "skin, masks": ("IoU", "IoU, ring", "IoU, dark skin", "worst group gap"),
}
# In the full table alone.
_VARIANTS = (
    "by rank",
    "not guarded",
    "within classes",
    "by the probe",
    "pruned margin",
    "labelled",
    "gradually",
)
_LEAST = 0.05  # of p, below which a difference counts as seen


def learning_table(rows: list[dict[str, Any]], *, brief: bool = False) -> str:
    """For each set one line a recipe: means, and in brackets the difference to plain training.

    Args:
        rows: of the results file.
        brief: leave out the variants.
    """
    parts = []
    for name, shown in _SHOWN.items():
        of_set = [row for row in rows if row["data"] == name]
        of_set = [row for row in of_set if not (brief and _is_variant(row["recipe"]))]
        if not of_set:
            continue
        seeds = of_set[0]["figures"][shown[0]]["seeds"]
        parts += [
            f"**{name}**, {of_set[0]['network']}, {seeds} seeds",
            "",
            f"| recipe | {' | '.join(shown)} |",
            "|---" * (1 + len(shown)) + "|",
        ]
        for row in of_set:
            cells = [_cell(row, figure) for figure in shown]
            title = row["recipe"] if row["family"] == "fastpie" else f"*{row['recipe']}*"
            parts.append(f"| {title} | {' | '.join(cells)} |")
        parts.append("")
    parts.append(
        "Means over the seeds; in brackets the difference to plain training, seed by seed, with ° where a "
        f"paired t-test gives p < {_LEAST:g} (not corrected for the number of recipes). In italics: not ours "
        "(baselines and controls)."
    )
    return "\n".join(parts)


def control_table(rows: list[dict[str, Any]]) -> str:
    """Each recipe against the control that it has to beat: ahead, behind, or neither seen."""
    lines = [
        "| set | recipe | against | figure | difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["over_control"] is None:
            continue
        figure = _SHOWN[row["data"]][0]
        for name in (figure, "worst group gap"):
            d = row["over_control"][name]
            p = "" if d["p"] is None else f"{d['p']:.2g}"
            lines.append(
                f"| {row['data']} | {row['recipe']} | {row['control']} | {name} "
                f"| {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) | {p} |"
            )
    return "\n".join(lines)


def _is_variant(recipe: str) -> bool:
    return any(text in recipe for text in _VARIANTS)


def _cell(row: dict[str, Any], figure: str) -> str:
    mean = row["figures"][figure]["mean"]
    if row["over_plain"] is None:
        return f"{mean:.3f}"
    d = row["over_plain"][figure]
    sure = "°" if d["p"] is not None and d["p"] < _LEAST else ""
    return f"{mean:.3f} ({d['mean']:+.3f}{sure})"
