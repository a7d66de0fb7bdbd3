"""The disagreement operator against what people use today, on the CPU.

PruneCXR ranks with pandas `corrwith(axis=1, method="spearman")` over [21081, 20] probabilities (NIH
test set); the other scores are a page of PyTorch. Run: `make bench`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from benchmarks import harness
from benchmarks.torch_scores import torch_scores
from fastpie import ops

CASES = ((21081, 20), (100_000, 10), (4096, 1000), (256, 10_000))


def vectorised_spearman(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Spearman by SciPy's row-wise ranks: the best NumPy answer."""
    a, b = (stats.rankdata(x, axis=1) for x in (dense, pruned))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def spearman_rows() -> list[dict[str, Any]]:
    """Against pandas, the published code's way, and against SciPy."""
    torch.manual_seed(0)
    dense = torch.randn(21081, 20)
    pruned = dense + torch.randn_like(dense)
    frames = [pd.DataFrame(t.numpy()) for t in (dense, pruned)]
    providers = {
        "fastpie, every score": lambda: ops.disagreement(dense, pruned.unsqueeze(0)),
        "scipy rankdata(axis=1), Spearman alone": lambda: vectorised_spearman(
            dense.numpy(), pruned.numpy()
        ),
        "pandas corrwith(axis=1), Spearman alone": lambda: frames[0].corrwith(
            frames[1], axis=1, method="spearman"
        ),
    }
    timings = harness.interleave(providers, repeats=5, seconds=60, warm_up=1)
    case = {"rows": 21081, "classes": 20, "precision": "fp32", "task": "multiclass"}
    ours, *others = providers
    return [harness.row(case, timings, ours, other) for other in others]


def all_scores_rows() -> list[dict[str, Any]]:
    """Against the same scores in PyTorch, eager and compiled."""
    rows = []
    for count, classes in CASES:
        for task in ("multiclass", "multilabel"):
            torch.manual_seed(0)
            dense = torch.randn(count, classes)
            pruned = (dense + torch.randn_like(dense)).unsqueeze(0)
            compiled = torch.compile(torch_scores, dynamic=False)
            providers = {
                "fastpie": lambda d=dense, p=pruned, t=task: ops.disagreement(d, p, None, t),
                "the same scores in PyTorch (fp32), eager": lambda d=dense, p=pruned, t=task: (
                    torch_scores(d, p, t)
                ),
                "the same scores in PyTorch (fp32), torch.compile": (
                    lambda d=dense, p=pruned, t=task, f=compiled: f(d, p, t)
                ),
            }
            timings = harness.interleave(providers, repeats=9, seconds=10)
            case = {"rows": count, "classes": classes, "precision": "fp32", "task": task}
            ours, *others = providers
            rows += [harness.row(case, timings, ours, other) for other in others]
            torch.compiler.reset()
    return rows


def main() -> None:
    """Measure, write the JSON, print the ratios."""
    rows = spearman_rows() + all_scores_rows()
    path = harness.write_results("disagreement", rows, packages=("pandas", "scipy", "numpy"))
    for r in rows:
        print(
            f"[{r['rows']}, {r['classes']}] {r['task']}: {r['seconds']['p50'] * 1e3:.2f} ms, "
            f"{r['ratio']}x faster than {r['baseline']}"
        )
    print(path)


if __name__ == "__main__":
    main()
