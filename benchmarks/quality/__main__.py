"""Train, score and write `benchmarks/results/quality-<machine>.json`. Run: `python -m benchmarks.quality`.

About an hour on one core, nearly all of it training. A trial that is done stays in the work folder, so
that an interrupted run goes on, and processes with `--train` and different seeds can share the work.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.quality import levels
from benchmarks.quality.data import KINDS, Planted, make
from benchmarks.quality.metrics import auroc, interval, paired, precision_at_5
from benchmarks.quality.scores import COLUMNS, SCORES
from benchmarks.quality.trials import Trial, trial

CASES = (
    *itertools.product(("digits", "chest film", "skin lesion"), ("cnn", "resnet10")),
    ("digits", "densenet"),
)
# On these fastpie's columns were chosen; what is said about them against peers is from the others.
CHOSEN_ON = (0, 1)

Cases = dict[tuple[str, str], list[tuple[Trial, Planted]]]
Found = dict[tuple[str, str], dict[str, dict[str, list[tuple[float, float]]]]]  # case, kind, score


def main(arguments: Sequence[str] | None = None) -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality"), help="folder for trials"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, help="training images, by default 1,500")
    parser.add_argument("--train", action="store_true", help="train and keep trials, no more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases: Cases = {case: [] for case in CASES}
    for seed in options.seeds:  # by seeds: what is there after an interruption is balanced
        for data, network in CASES:
            done = trial(options.work, data, network, seed, options.size)
            if not options.train:
                cases[data, network].append((done, make(data, seed, options.size)))
    if options.train:
        return
    rows = measure(cases, options.seeds)
    packages = ("numpy", "scipy", "scikit-learn", "cleanlab", "monai")
    print(harness.write_results("quality", rows, packages=packages))


def measure(cases: Cases, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """All rows about the classifiers; the trials of a case are in the order of `seeds`."""
    found = _find(cases)
    return (
        _score_rows(found)
        + _comparison_rows(found, seeds)
        + levels.curve_rows(cases)
        + levels.rule_rows(cases)
    )


def _find(cases: Cases) -> Found:
    found: Found = {}
    for case, trials in cases.items():
        per_kind: dict[str, dict[str, list[tuple[float, float]]]] = {kind: {} for kind in KINDS}
        for done, data in trials:
            for score in SCORES:
                values = score.of(done, data.labels)
                for kind in KINDS:
                    planted = data.has(kind)
                    pair = (auroc(values, planted), precision_at_5(values, planted))
                    per_kind[kind].setdefault(score.name, []).append(pair)
        found[case] = per_kind
    return found


def _score_rows(found: Found) -> list[dict[str, Any]]:
    """One row for each set, network, kind and score."""
    column = {(kind, name): c for c, (name, kinds) in COLUMNS.items() for kind in kinds}
    return [
        {
            "data": data, "network": network, "kind": kind, "score": score.name,
            "needs": score.needs, "family": score.family, "column": column.get((kind, score.name)),
            "auroc": interval([a for a, _ in scores[score.name]]),
            "precision_at_5": interval([p for _, p in scores[score.name]]),
        }
        for (data, network), kinds in found.items()
        for kind, scores in kinds.items()
        for score in SCORES
    ]  # fmt: skip


def _comparison_rows(found: Found, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Fastpie's column of a kind against the best score of others, by seeds that it was not chosen on.

    The best of others is the one with the highest mean AUROC over all cases and those same seeds: it
    has the advantage of being chosen on them.
    """
    held_out = [i for i, seed in enumerate(seeds) if seed not in CHOSEN_ON]
    if not held_out:
        return []
    rows = []
    ours_by_kind = {kind: (c, name) for c, (name, kinds) in COLUMNS.items() for kind in kinds}
    for kind, (column, ours) in ours_by_kind.items():
        areas = {
            score.name: np.array(
                [[kinds[kind][score.name][i][0] for i in held_out] for kinds in found.values()]
            )
            for score in SCORES
        }  # [cases, seeds]
        for family, needs in itertools.product(("peer", "control"), ("checkpoint", "more")):
            others = [
                s.name for s in SCORES
                if s.family == family and (s.needs == "checkpoint") == (needs == "checkpoint")
            ]  # fmt: skip
            best = max(others, key=lambda name: areas[name].mean())
            rows.append(
                {
                    "kind": kind, "column": column, "ours": ours, "family": family, "needs": needs,
                    "other": best, "difference": paired(areas[ours].ravel().tolist(), areas[best].ravel().tolist()),
                    "ahead": int((areas[ours].mean(1) > areas[best].mean(1)).sum()), "cases": len(found),
                }
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
