"""Which recipe makes the better model? `benchmarks/results/quality-learning-<machine>.json`.

Each recipe trains on each set for each seed, in one run: `python -m benchmarks.quality.learning`, hours on one
core. A training that is done stays in the work folder: an interrupted run goes on, and processes with
`--train` and different seeds share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality.imbalance import SETS, Imbalanced, make
from benchmarks.quality.metrics import interval, paired
from benchmarks.quality.outcomes import outcome
from benchmarks.quality.recipes import ADJUSTED, RECIPES, Recipe, setting_of, train

__all__ = ["main", "recipes_of", "rows"]

Outcomes = dict[str, dict[str, list[float]]]  # recipe, figure, one a seed


def main(arguments: Sequence[str] | None = None) -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--only", help="recipes with this in their names")
    parser.add_argument("--train", action="store_true", help="train and keep, no more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Outcomes] = {name: {} for name in options.sets}
    for seed in options.seeds:  # by seeds: what is there after an interruption is balanced
        for name in options.sets:
            data = make(name, seed)
            for recipe in recipes_of(data):
                if options.only and options.only not in recipe.name:
                    continue
                for figure, value in _trained(options.work, name, recipe, data, seed).items():
                    found[name].setdefault(recipe.name, {}).setdefault(figure, []).append(value)
    if not options.train:
        packages = ("numpy", "scipy", "scikit-learn", "pytorch-metric-learning")
        print(harness.write_results("quality-learning", rows(found), packages=packages))


def recipes_of(data: Imbalanced) -> list[Recipe]:
    """Those that can train on a set."""
    return [
        recipe
        for recipe in RECIPES
        if data.task in recipe.tasks and (data.masks is not None or not recipe.masks)
    ]


def rows(found: dict[str, Outcomes]) -> list[dict[str, Any]]:
    """One row a set and recipe: its figures, against plain training, its control and logit adjustment."""
    by_name = {recipe.name: recipe for recipe in RECIPES}  # the same name for another task: one row
    return [
        {
            "data": name, "network": setting_of(name).network, "recipe": recipe.name,
            "family": recipe.family, "control": recipe.control,
            "figures": {k: interval(v) for k, v in outcomes[recipe.name].items()},
            "over_plain": _over(outcomes, recipe.name, "plain"),
            "over_control": _over(outcomes, recipe.name, recipe.control),
            "over_adjusted": _over(outcomes, recipe.name, ADJUSTED),
        }
        for name, outcomes in found.items()
        for recipe in by_name.values()
        if recipe.name in outcomes
    ]  # fmt: skip


def _over(outcomes: Outcomes, recipe: str, other: str | None) -> dict[str, Any] | None:
    """Paired differences, seed by seed."""
    if other is None or other == recipe or other not in outcomes:
        return None
    return {k: paired(v, outcomes[other][k]) for k, v in outcomes[recipe].items()}


def _trained(
    work: Path, name: str, recipe: Recipe, data: Imbalanced, seed: int
) -> dict[str, float]:
    """Figures of a recipe, from the work folder if they are there."""
    work.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{name}/{recipe.name}/{seed}".encode()).hexdigest()[:16]
    path = work / f"{key}.json"
    if path.exists():
        found: dict[str, float] = json.loads(path.read_text())["figures"]
        return found
    start = time.perf_counter()
    found = outcome(train(recipe, data, setting_of(name), seed), data)
    note = {"data": name, "recipe": recipe.name, "seed": seed, "figures": found}
    note["seconds"] = round(time.perf_counter() - start, 1)
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").rename(path)
    print(json.dumps(note), flush=True)
    return found


if __name__ == "__main__":
    main()
