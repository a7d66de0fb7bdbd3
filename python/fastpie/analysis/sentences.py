"""The findings of an analysis in words, most important first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from fastpie.analysis.analysis import Analysis

__all__ = ["sentences"]

_ALPHA = 0.05
_MOST_NAMES = 6
_METRICS = {
    "map": "mean average precision",
    "mauroc": "mean AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
}


def sentences(analysis: Analysis) -> list[str]:
    """What the tables and facts of an analysis say; nothing of what they do not hold."""
    said = [sentence for say in _SAY for sentence in say(analysis)]
    return [s for s in said if s]


def _samples(analysis: Analysis) -> list[str]:
    counts = analysis.facts.get("quadrants")
    if not counts:
        return []
    both = counts.get("hard, label in doubt", 0)
    hard, doubt = (both + counts.get(name, 0) for name in ("hard", "label in doubt"))
    share = f"{analysis.facts['fraction']:.0%}"
    if not doubt:
        return [f"{hard:,} of {analysis.facts['samples']:,} samples are the hardest {share}."]
    said = (
        f"{doubt:,} of {analysis.facts['samples']:,} labels deserve a second look ({share}), and "
        f"{hard - both:,} of the hardest {share} of the samples are hard although their labels look right."
    )
    return [said]


def _pies(analysis: Analysis) -> list[str]:
    facts = analysis.facts
    if "pies" not in facts:
        return []
    compat = " as the public script of PruneCXR ranks them" if facts.get("compat") else ""
    models = "one model" if facts["models"] == 1 else f"{facts['models']} models"
    count, of = facts["pies"], facts["samples"]
    said = (
        f"{count:,} of {of:,} samples ({count / max(1, of):.1%}) are pruning-identified exemplars at "
        f"sparsity {facts['sparsity']:g} by the definition {facts['definition']!r}{compat}, from {models}."
    )
    return [said]


def _levels(analysis: Analysis) -> list[str]:
    found = analysis.facts.get("first_significant")
    if not found:
        return []
    metric, level = next(iter(found.items()))
    name = _METRICS[metric]
    if level is None:
        return [f"At no level does pruning lower the {name} significantly."]
    row = next(
        r
        for r in analysis.tables["levels"].to_pylist()
        if r["metric"] == metric and r["sparsity"] == level
    )
    change = "" if row["change"] is None else f", by {-row['change']:.1%}"
    return [f"The {name} falls significantly from sparsity {level:g} on{change}."]


def _classes(analysis: Analysis) -> list[str]:
    table = analysis.tables.get("classes")
    if table is None:
        return []
    rows = table.to_pylist()
    tested = [r for r in rows if r["impact_q"] is not None]
    said = []
    if tested:
        harmed = [r for r in tested if r["impact_q"] < _ALPHA and r["impact"] < 0]
        harmed.sort(key=lambda r: r["impact"])
        if harmed:
            said.append(
                f"Pruning harms {len(harmed)} of {len(rows)} classes more than the others: "
                f"{_named(harmed)}."
            )
        else:
            said.append("Pruning harms no class significantly more than the others.")
    frequent = [r for r in rows if r["pie_ratio_low"] is not None and r["pie_ratio_low"] > 1]
    frequent.sort(key=lambda r: -r["pie_ratio"])
    if frequent:
        said.append(f"More frequent among the exemplars than elsewhere: {_named(frequent)}.")
    return said


def _links(analysis: Analysis) -> list[str]:
    table = analysis.tables.get("links")
    if table is None:
        return []
    said = []
    for row in table.to_pylist():
        if row["method"] != "spearman" or row["p"] is None or row["p"] >= _ALPHA:
            continue
        what: Callable[[float], str] | None = {
            "first_drop": lambda r: (
                "Rare classes are forgotten at lower sparsities"
                if r > 0
                else "Frequent classes are forgotten at lower sparsities"
            ),
            "extreme_drop": lambda r: (
                "Rare classes lose more at the highest sparsity"
                if r > 0
                else "Frequent classes lose more at the highest sparsity"
            ),
        }.get(row["y"])
        if row["x"] == "frequency_difference":
            sign = "less" if row["value"] > 0 else "more"
            text = f"Classes of different frequency are forgotten {sign} alike"
        elif row["x"] == "iou_root":
            sign = "more" if row["value"] < 0 else "less"
            text = f"Classes that occur together are forgotten {sign} alike"
        elif what is not None:
            text = what(row["value"])
        else:
            continue
        said.append(
            f"{text} (rank correlation {row['value']:.2f}{_interval(row)}, p {_p(row['p'])})."
        )
    return said


def _subgroups(analysis: Analysis) -> list[str]:
    table = analysis.tables.get("subgroups")
    if table is None:
        return []
    rows = [
        r
        for r in table.to_pylist()
        if r["q"] is not None and r["q"] < _ALPHA and not r["small"] and r["odds_ratio"] is not None
    ]
    over = sorted((r for r in rows if r["odds_ratio"] > 1), key=lambda r: -r["odds_ratio"])
    if not over:
        return []
    parts = [f"{r['attribute']} {r['value']} (odds ratio {r['odds_ratio']:.2g})" for r in over]
    return [f"More often among the hardest: {_some(parts)}."]


def _control(analysis: Analysis) -> list[str]:
    found = analysis.facts.get("control")
    if not found or found.get("own") is None:
        return []
    said = (
        f"{found['own']:.0%} of the ranking by disagreement is pruning by magnitude's own; the rest "
        "comes with random masks of the same size too."
    )
    return [said]


def _images(analysis: Analysis) -> list[str]:
    samples = analysis.samples
    if "blank" not in samples.column_names:
        return []
    parts = [
        f"{count:,} {name}"
        for name in ("blank", "blurred", "dark", "bright")
        if (count := _count(samples.column(name)))
    ]
    copies = len(samples) - samples.column("duplicate_of").null_count
    if copies:
        parts.append("a copy of another image" if copies == 1 else f"{copies:,} copies of others")
    return [f"Among the images: {_joined(parts)}."] if parts else []


_SAY = (_samples, _pies, _levels, _classes, _links, _subgroups, _control, _images)


def _count(column: pa.ChunkedArray) -> int:
    return sum(1 for value in column.to_pylist() if value)


def _named(rows: list[dict[str, Any]]) -> str:
    return _some([str(row["class"]) for row in rows])


def _some(parts: list[str]) -> str:
    if len(parts) <= _MOST_NAMES:
        return _joined(parts)
    return f"{', '.join(parts[:_MOST_NAMES])} and {len(parts) - _MOST_NAMES} more"


def _joined(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _interval(row: dict[str, Any]) -> str:
    if row["low"] is None or row["high"] is None:
        return ""
    return f", 95 % {row['low']:.2f} to {row['high']:.2f}"


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"= {value:.3f}"
