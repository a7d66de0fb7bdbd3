"""How well a score finds what was planted, over seeds, and one score against another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

__all__ = ["auroc", "interval", "paired", "precision_at_5"]

LISTED = 0.05  # of the images, that a person would look at


def auroc(score: np.ndarray, planted: np.ndarray) -> float:
    """That a planted image scores higher than one of all the others, ties counting half."""
    return float(roc_auc_score(planted, _ranks(score)))


def precision_at_5(score: np.ndarray, planted: np.ndarray) -> float:
    """Share of planted images among the 5 % with the highest score; equal scores share places."""
    score = _ranks(score)
    places = round(LISTED * len(score))
    last = np.sort(score)[-places]
    above, at = score > last, score == last
    inside = planted[above].sum() + (places - above.sum()) * planted[at].mean()
    return float(inside / places)


def interval(values: Sequence[float]) -> dict[str, float | int]:
    """Mean over the seeds with a 95 % interval (Student's t; the value itself with one seed)."""
    mean = float(np.mean(values))
    half = 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {
        "mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4),
        "seeds": len(values),
    }  # fmt: skip


def paired(ours: Sequence[float], others: Sequence[float]) -> dict[str, float | int | None]:
    """Mean difference, its 95 % interval and p of a paired t-test (None where nothing varies)."""
    differences = np.subtract(ours, others)
    p = None
    if len(differences) > 1 and differences.std() > 0:
        p = float(f"{stats.ttest_1samp(differences, 0).pvalue:.2g}")
    return {**interval(differences.tolist()), "p": p}


def _ranks(score: np.ndarray) -> np.ndarray:
    """Ranks, ties their mean; NaN (a constant row's rank correlation) comes last."""
    ranks: np.ndarray = stats.rankdata(np.where(np.isnan(score), -np.inf, score))
    return ranks
