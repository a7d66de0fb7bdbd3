"""Tables of the comparison of recipes, from `benchmarks/results/quality-learning-*.json`."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.recipes import ADJUSTED

__all__ = ["control_table", "headline_table", "learning_table"]

# Of each set the figures that are shown; all are in the file.
_SHOWN = {
    "digits": ("balanced accuracy", "tail recall", "on its side", "worst group gap"),
    "chest film": ("mAP", "mAP head", "mAP medium", "mAP tail", "another look"),
    "skin, classes": ("balanced accuracy", "tail recall", "worst group gap", "CAM IoU", "CorLoc"),
    "skin, masks": ("IoU", "IoU, ring", "IoU, dark skin", "worst group gap"),
}
# Of the short table: what is seen of each set, and the recipes.
_HEADLINES = {
    "digits": ("balanced accuracy", "on its side"),
    "chest film": ("mAP", "another look"),
    "skin, classes": ("balanced accuracy", "ring"),
    "skin, masks": ("IoU", "IoU, ring"),
}
_SHORT = (
    "plain",
    "LDAM-DRW",
    "logit adjustment",
    "attention, random",
    "attention, dense loss",
    "attention, pruned loss",
    "attention, pruned loss, weights by rank",
    "groups known, oversampled",
    "consistency",
    "SimCLR, then logit adjustment",
    "SDCLR, then logit adjustment",
)
_ADJUSTED = f"{ADJUSTED} + "
_LEAST = 0.05  # of p, below which a difference counts as seen
_NOTE = (
    "Means over the seeds; in brackets the difference to plain training, seed by seed, with ° where a "
    f"paired t-test gives p < {_LEAST:g} (not corrected for the number of recipes)."
)


def headline_table(rows: list[dict[str, Any]]) -> str:
    """One line a recipe, one column a set: a figure of everything and one of a rare group.

    Attention and consistency are shown on top of logit adjustment where there are classes.
    """
    found = {(row["data"], row["recipe"]): row for row in rows}
    names = [f"{name}: {whole} / {group}" for name, (whole, group) in _HEADLINES.items()]
    lines = [f"| recipe | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for recipe in _SHORT:
        cells = []
        for name, figures in _HEADLINES.items():
            row = found.get((name, _ADJUSTED + recipe))
            row = found.get((name, recipe)) if row is None else row
            cells.append("" if row is None else " / ".join(_cell(row, f) for f in figures))
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _NOTE])


def learning_table(rows: list[dict[str, Any]]) -> str:
    """For each set one line a recipe: means, and in brackets the difference to plain training."""
    parts = []
    for name, shown in _SHOWN.items():
        of_set = [row for row in rows if row["data"] == name]
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
    parts.append(f"{_NOTE} In italics: not ours (baselines and controls).")
    return "\n".join(parts)


def control_table(rows: list[dict[str, Any]]) -> str:
    """Each recipe against the control that it has to beat, and against what it stands on."""
    lines = [
        "| set | recipe | against | figure | difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = {row["control"]: row["over_control"]}
        if row["recipe"].startswith(_ADJUSTED):  # what is on top of it, also against it alone
            against[ADJUSTED] = row["over_adjusted"]
        for control, over in against.items():
            if over is None:
                continue
            for name in (_SHOWN[row["data"]][0], "worst group gap"):
                d = over[name]
                p = "" if d["p"] is None else f"{d['p']:.2g}"
                lines.append(
                    f"| {row['data']} | {row['recipe']} | {control} | {name} "
                    f"| {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) | {p} |"
                )
    return "\n".join(lines)


def _cell(row: dict[str, Any], figure: str) -> str:
    mean = row["figures"][figure]["mean"]
    if row["over_plain"] is None:
        return f"{mean:.3f}"
    d = row["over_plain"][figure]
    sure = "°" if d["p"] is not None and d["p"] < _LEAST else ""
    return f"{mean:.3f} ({d['mean']:+.3f}{sure})"
