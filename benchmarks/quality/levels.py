"""Which level to score at: accuracy against level, and rules that choose one, against a ladder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from benchmarks.quality.data import KINDS, Planted
from benchmarks.quality.measures import loss, predicted
from benchmarks.quality.metrics import auroc, interval
from benchmarks.quality.trials import LADDER, LEVELS, Trial

__all__ = ["curve_rows", "rule_rows"]

Cases = dict[tuple[str, str], list[tuple[Trial, Planted]]]


def quality_of(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy, of several labels the mean average precision over classes with a positive one."""
    if labels.ndim == 1:
        return float((outputs.argmax(1) == labels).mean())
    there = np.flatnonzero(labels.any(0))
    return float(np.mean([average_precision_score(labels[:, c], outputs[:, c]) for c in there]))


def curve_rows(cases: Cases) -> list[dict[str, Any]]:
    """One row for each set, network and level: accuracy on the test set, and how well its loss ranks."""
    rows = []
    for (data, network), trials in cases.items():
        for place, level in enumerate(LEVELS):
            row: dict[str, Any] = {"data": data, "network": network, "sparsity": level}
            for name, key in (
                ("accuracy", "pruned_test"),
                ("accuracy_not_recalibrated", "raw_test"),
            ):
                kept = [
                    quality_of(t[key][place], d.test_labels) / quality_of(t["test"], d.test_labels)
                    for t, d in trials
                ]
                row[f"{name}_kept"] = interval(kept)
            for kind in KINDS:
                row[kind] = interval(
                    [auroc(loss(t["pruned"][place], d.labels), d.has(kind)) for t, d in trials]
                )
            rows.append(row)
    return rows


def _keeps(share: float) -> Callable[[Trial, Planted], int]:
    """The largest level, going up from the lowest, that keeps a share of the test accuracy."""

    def rule(trial: Trial, data: Planted) -> int:
        least = share * quality_of(trial["test"], data.test_labels)
        return _last([quality_of(z, data.test_labels) >= least for z in trial["pruned_test"]])

    return rule


def _flips(share: float) -> Callable[[Trial, Planted], int]:
    """The largest level at which at most a share of the predictions of unseen images flips; no labels needed."""

    def rule(trial: Trial, data: Planted) -> int:
        dense = predicted(trial["test"], data.multilabel)
        flips = [
            (predicted(z, data.multilabel) != dense).reshape(len(dense), -1).any(1).mean()
            for z in trial["pruned_test"]
        ]
        return _last([f <= share for f in flips])

    return rule


def _last(fits: list[bool]) -> int:
    return max(fits.index(False) - 1 if False in fits else len(fits) - 1, 0)


RULES: dict[str, Callable[[Trial, Planted], int]] = {
    "keeps 95 % of the test accuracy": _keeps(0.95),
    "keeps 99 % of the test accuracy": _keeps(0.99),
    "at most 1 % of predictions flip": _flips(0.01),
    "at most 5 % of predictions flip": _flips(0.05),
    **{f"always {level}": lambda _, __, i=i: i for i, level in enumerate(LEVELS)},
}


def rule_rows(cases: Cases) -> list[dict[str, Any]]:
    """One row for each set, network, kind and rule: AUROC of the pruned loss at the level chosen."""
    rows = []
    for (data, network), trials in cases.items():
        for kind in KINDS:
            for name, rule in RULES.items():
                chosen = [rule(t, d) for t, d in trials]
                areas = [
                    auroc(loss(t["pruned"][i], d.labels), d.has(kind))
                    for i, (t, d) in zip(chosen, trials, strict=True)
                ]
                levels = [LEVELS[i] for i in chosen]
                rows.append(_row(data, network, kind, name, areas, interval(levels)))
            ladder = [LEVELS.index(level) for level in LADDER]
            areas = [
                auroc(loss(t["pruned"][ladder], d.labels).mean(0), d.has(kind)) for t, d in trials
            ]
            rows.append(_row(data, network, kind, "ladder .1 .3 .5 .7", areas, None))
            areas = [
                max(auroc(loss(z, d.labels), d.has(kind)) for z in t["pruned"]) for t, d in trials
            ]
            rows.append(_row(data, network, kind, "best level, chosen by the truth", areas, None))
    return rows


def _row(
    data: str, network: str, kind: str, rule: str, areas: list[float], level: Any
) -> dict[str, Any]:
    return {
        "data": data, "network": network, "kind": kind, "rule": rule,
        "sparsity": level, "auroc": interval(areas),
    }  # fmt: skip
