"""The README's tables from the rows of `benchmarks/results/quality-*.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["comparison_table", "level_table", "quality_table", "segmentation_table"]

_NEEDS = ("checkpoint", "logs", "3 short runs", "5 trainings")
_TITLES = {
    "checkpoint": "from one checkpoint",
    "logs": "with a look after each epoch",
    "3 short runs": "with 3 runs of 5 epochs",
    "5 trainings": "with 5 more trainings",
}

# In the file and not in the README: what differs little from another score that is.
_VARIANTS = {
    "leave-one-out probe, early features of the pruned model",
    "distance to neighbours, early features of the pruned model",
    "pruned entropy, ladder",
    "js, ladder",
    "js at .9",
    "1 - spearman at .5",
    "dense margin",
    "random masks, loss, ladder",
    "weight noise, loss",
    "weight noise, margin, not recalibrated",
    "penultimate neighbours, L2 distance",
    "js at .5, epoch mean",
    "weight noise, loss, epoch mean",
    "cleanlab normalized margin",
}


def quality_table(rows: list[dict[str, Any]], *, variants: bool = False) -> str:
    """One line a score: mean AUROC over sets and networks for each kind, and precision at 5 %.

    Args:
        rows: of the results file; others are passed over.
        variants: whether to show all scores.
    """
    rows = [row for row in rows if "score" in row and "kind" in row]
    rows = [row for row in rows if variants or row["score"] not in _VARIANTS]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells.setdefault((row["score"], row["kind"]), []).append(row)
        scores.setdefault(row["score"], row)
    means = {key: _mean(found, "auroc") for key, found in cells.items()}
    columns = {(r["score"], r["kind"]): r["column"] for r in rows if r["column"]}
    lines = [f"| score | of | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for needs in _NEEDS:
        names = [name for name, row in scores.items() if row["needs"] == needs]
        if not names:
            continue
        lines.append(f"| ***{_TITLES[needs]}*** |" + " |" * (1 + len(kinds)))
        best = {kind: max(means[name, kind] for name in names) for kind in kinds}
        names.sort(key=lambda name: -float(np.mean([means[name, kind] for kind in kinds])))
        for name in names:
            shown = []
            for kind in kinds:
                text = f"{means[name, kind]:.3f}"
                text = f"**{text}**" if means[name, kind] == best[kind] else text
                text += f" / {_mean(cells[name, kind], 'precision_at_5'):.2f}"
                if (name, kind) in columns:
                    text += f" *{columns[name, kind]}*"
                shown.append(text)
            lines.append(f"| {name} | {scores[name]['family']} | {' | '.join(shown)} |")
    cases = {(row["data"], row["network"]) for row in rows}
    seeds = sorted({row["auroc"]["seeds"] for row in rows})
    note = (
        "AUROC / precision among the 5 % highest (at most 1, .6, .6, .8), for finding one planted kind among all images: means "
        f"over {len(cases)} pairs of a set and a network, {_span(seeds)} seeds each (intervals and "
        "single pairs: in the file, with more variants). Bold: the best here of what needs the same. In italics: "
        "the column of fastpie's table that the score fills. None of these columns is a pruning score: "
        "those say so by pruned, js or spearman."
    )
    lines += ["", note]
    return "\n".join(lines)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Fastpie's columns against the best score of others, paired."""
    lines = [
        "| planted | fastpie's column | against | needs | difference of AUROC | p | ahead in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "difference" in row:
            d = row["difference"]
            p = "" if d["p"] is None else f"{d['p']:.2g}"
            needs = "checkpoint" if row["needs"] == "checkpoint" else "logs or more trainings"
            lines.append(
                f"| {row['kind']} | {row['column']} | {row['other']} ({row['family']}) | {needs} "
                f"| {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) | {p} "
                f"| {row['ahead']} of {row['cases']} |"
            )
    note = (
        "The best score of others by its mean, on the seeds on which fastpie's columns were not chosen. "
        "Interval and p: paired t over networks and seeds of each set, which share images, so that both are on "
        "the hopeful side. Ahead in: pairs of a set and a network."
    )
    lines += ["", note]
    return "\n".join(lines)


def level_table(rows: list[dict[str, Any]]) -> str:
    """One line a rule: mean level chosen and mean AUROC of the pruned loss for each kind."""
    rows = [row for row in rows if "rule" in row]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = [f"| rule | level | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        of_rule = [row for row in rows if row["rule"] == rule]
        levels = [row["sparsity"] for row in of_rule if row["sparsity"]]
        level = f"{np.mean([v['mean'] for v in levels]):.2f}" if levels else ""
        areas = [_mean([r for r in of_rule if r["kind"] == kind], "auroc") for kind in kinds]
        lines.append(f"| {rule} | {level} | {' | '.join(f'{a:.3f}' for a in areas)} |")
    return "\n".join(lines)


def segmentation_table(rows: list[dict[str, Any]]) -> str:
    """One line a score of a segmentation without labels."""
    lines = ["| score | rank correlation with the true error | AUROC, rare kind |", "|---|---|---|"]
    for row in rows:
        if "spearman_with_error" in row:
            rank, area = row["spearman_with_error"], row["auroc_rare_kind"]
            lines.append(
                f"| {row['score']} | {rank['mean']:.2f} ({rank['low']:.2f} to {rank['high']:.2f}) "
                f"| {area['mean']:.2f} ({area['low']:.2f} to {area['high']:.2f}) |"
            )
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key]["mean"] for row in rows]))


def _span(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
