"""An analysis of a run with made-up findings, in the columns of docs/design/analysis.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.analysis import Analysis

QUADRANTS = ("typical", "hard", "label in doubt", "hard, label in doubt")


def samples_of(sample_ids: Sequence[str], hardness: Sequence[float], seed: int = 0) -> pa.Table:
    """The table `samples`."""
    rng = np.random.default_rng(seed)
    n = len(sample_ids)
    doubt, hard = rng.normal(size=n), np.asarray(hardness, dtype=np.float64)
    place = 2 * (doubt > np.quantile(doubt, 0.8)) + (hard > np.quantile(hard, 0.8))
    copies = [sample_ids[0] if i == 3 else None for i in range(n)]
    return pa.table(
        {
            "sample_id": list(sample_ids),
            "hard": hard,
            "hardness_low": hard - 0.1,
            "hardness_high": hard + 0.1,
            "pie": np.arange(n) % 10 == 0,
            "label_in_doubt": pa.array(doubt, mask=np.arange(n) == 1),
            "atypical": rng.gamma(2.0, size=n),
            "quadrant": [QUADRANTS[i] for i in place],
            "brightness": rng.random(n),
            "contrast": rng.random(n),
            "sharpness": rng.random(n),
            "dark": np.arange(n) % 13 == 4,
            "bright": np.zeros(n, bool),
            "blurred": np.arange(n) % 11 == 2,
            "blank": np.arange(n) == 5,
            "duplicate_of": pa.array(copies, pa.string()),
        }
    )


def tables_of(names: Sequence[str], seed: int = 0) -> dict[str, pa.Table]:
    """Every table of an analysis, for some classes."""
    rng = np.random.default_rng(seed)
    grid = [0.1, 0.3, 0.5, 0.7]
    levels = [
        {"sparsity": s, "metric": m, "value": v - s**3 / 5, "low": v - s**3 / 5 - 0.02,
         "high": v - s**3 / 5 + 0.02, "change": -(s**3) / 5 / v, "p": 0.5 - s / 2, "q": 0.5 - s / 2,
         "significant": s > 0.4}
        for m, v in (("map", 0.8), ("mauroc", 0.95))
        for s in grid
    ]  # fmt: skip
    curves, classes = [], []
    for i, name in enumerate(names):
        rate = rng.uniform(0.3, 1.5)
        curves += [
            {"class": name, "sparsity": s, "metric": "ap", "value": 0.8 - rate * s**3,
             "change": -rate * s**3, "low": -rate * s**3 - 0.05, "high": -rate * s**3 + 0.05}
            for s in grid
        ]  # fmt: skip
        impact = rng.uniform(-0.2, 0.2)
        classes.append(
            {"class": name, "n": 40 // (i + 1), "n_train": 1000 // (i + 1), "ap": 0.8, "auroc": 0.9,
             "recall": 0.7, "ap_pruned": 0.8 - rate / 3, "auroc_pruned": 0.8, "recall_pruned": 0.5,
             "first_drop": next((s for s in grid if rate * s**3 > 0.2), None),
             "extreme_drop": -rate * 0.7**3, "impact": impact, "impact_low": impact - 0.1,
             "impact_high": impact + 0.1, "impact_p": 0.02, "impact_q": 0.04, "pie_ratio": 1.5,
             "pie_ratio_low": 0.7, "pie_ratio_high": 2.2}
        )  # fmt: skip
    pairs = [
        {"class_a": a, "class_b": b, "fcd": rng.random(), "frequency_difference": rng.random(),
         "iou": v, "iou_root": v**0.25}
        for i, a in enumerate(names)
        for b, v in zip(names[:i], rng.random(i), strict=True)
    ]  # fmt: skip
    groups = [("sex", "F"), ("sex", "M"), ("age", "40-49"), ("view", "PA"), ("doctor", "Dr. Who")]
    subgroups = [
        {"attribute": a, "value": v, "n": 20 + i, "n_hard": i, "odds_ratio": ratio,
         "low": ratio / 2, "high": None if ratio == 0 else ratio * 2, "p": 0.01 * i, "q": 0.02 * i,
         "small": i == 3}
        for i, ((a, v), ratio) in enumerate(zip(groups, (0.5, 2.0, 0.0, 1.5, 3.0), strict=True))
    ]  # fmt: skip
    stability = [
        {"what": "level", "a": f"{a:g}", "b": f"{b:g}", "jaccard": 1 - abs(a - b),
         "rank_correlation": 0.9, "n": 40}
        for i, a in enumerate(grid)
        for b in grid[:i]
    ]  # fmt: skip
    stability.append(
        {
            "what": "control",
            "a": "l1",
            "b": "random",
            "jaccard": 0.3,
            "rank_correlation": 0.2,
            "n": 40,
        }
    )
    made = {
        "levels": levels,
        "curves": curves,
        "classes": classes,
        "links": [
            {"x": "ln n_train", "y": "first_drop", "method": m, "value": v, "low": v - 0.2,
             "high": v + 0.2, "p": 0.03, "n": len(names)}
            for m, v in (("pearson", 0.6), ("spearman", 0.5))
        ],
        "pairs": pairs,
        "regression": [
            {"term": t, "coefficient": 0.3, "low": 0.1, "high": 0.5, "p": 0.01, "vif": None}
            for t in ("intercept", "frequency_difference")
        ],
        "counts": [
            {"labels": k, "n": 10, "n_pie": 1, "pie_ratio": v, "low": v / 2, "high": v * 2}
            for k, v in (("0", 0.5), ("1", 1.0), ("4+", 2.5))
        ],
        "subgroups": subgroups,
        "stability": stability,
        "agreement": [
            {"a": "fastpie", "b": "cleanlab", "jaccard": 0.4, "rank_correlation": 0.6, "n": 40}
        ],
    }  # fmt: skip
    return {name: pa.Table.from_pylist(rows) for name, rows in made.items()}


def analysis_of(result: Any, names: Sequence[str], seed: int = 0) -> Analysis:
    """An analysis of a run."""
    table = result.table
    return Analysis(
        samples_of(table["sample_id"].to_pylist(), table["hardness"].to_pylist(), seed),
        tables_of(names, seed),
        {"level": 0.5},
        ["Pruning hurts two of three classes.", "Sample labels are in doubt.", "A third finding."],
    )
