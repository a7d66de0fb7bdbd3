"""What the features of a checkpoint say about a sample: distances, labels near by, a linear probe.

"Early" features are the means and standard deviations over the positions of each stage's output but
the last one's. A trained network has memorised its labels, wrong ones included, in its last stage:
penultimate features put a wrong label among the samples of that label. Earlier ones do not.
"""

from __future__ import annotations

import numpy as np
from scipy.special import entr
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from benchmarks.quality.trials import Trial

__all__ = [
    "agreement", "conflict", "early", "label_entropy", "leave_one_out", "mahalanobis", "nearest",
    "penultimate",
]  # fmt: skip

PENALTY = 0.1  # of the probe, times the number of samples; columns have variance 1


def early(trial: Trial, key: str = "features") -> np.ndarray:  # [N, D]
    """Features of all stages but the last, columns standardised, each stage of the same weight."""
    stages = np.split(trial[key], np.cumsum(trial["widths"])[:-1], axis=1)
    return np.concatenate([_standard(s) / np.sqrt(s.shape[1]) for s in stages[:-1]], axis=1)


def penultimate(trial: Trial) -> np.ndarray:  # [N, D]
    """What the head sees: the means of the last stage."""
    width = int(trial["widths"][-1])
    return trial["features"][:, -width : -(width // 2)]


def nearest(
    features: np.ndarray, k: int, metric: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices [N, k] of the k nearest others."""
    search = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(features)
    distances, indices = search.kneighbors()  # without a query: each sample's own row left out
    return distances, indices


def agreement(indices: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N]
    """Share of the neighbours with the sample's label, of several labels the mean over the classes."""
    if y.ndim == 1:
        result: np.ndarray = (y[indices] == y[:, None]).mean(1)
    else:
        result = (y[indices] == y[:, None]).mean((1, 2))
    return result


def label_entropy(indices: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N]
    """Of the shares of labels among the neighbours, in nats, of several labels summed; not of the own label."""
    if y.ndim == 1:
        shares = (y[indices][:, :, None] == np.arange(y.max() + 1)).mean(1)
        return entr(shares).sum(1)
    shares = y[indices].mean(1)
    return (entr(shares) + entr(1 - shares)).sum(1)


def conflict(features: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:  # [N]
    """Own / (own + other): mean distance to the k nearest of the same and of another label.

    It orders as own / other, the strangeness of Proedrou et al. (ECML 2002). Of several labels: the
    largest over the classes.
    """
    distances = pairwise_distances(features)
    np.fill_diagonal(distances, np.inf)
    columns = y[:, None] if y.ndim == 1 else y
    found = [_conflict(distances, column, k) for column in columns.T]
    result: np.ndarray = np.max(found, axis=0)
    return result


def _conflict(distances: np.ndarray, label: np.ndarray, k: int) -> np.ndarray:
    same = label[:, None] == label[None]
    own, other = (_mean_of_nearest(np.where(m, distances, np.inf), k) for m in (same, ~same))
    with np.errstate(invalid="ignore"):
        ratio = own / (own + other)
    result: np.ndarray = np.nan_to_num(ratio, nan=0.5)  # alone with its label, or all have it
    return result


def _mean_of_nearest(distances: np.ndarray, k: int) -> np.ndarray:
    lowest = np.sort(np.partition(distances, k, axis=1)[:, :k], axis=1)
    there = np.isfinite(lowest)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(there, lowest, 0).sum(1) / there.sum(1)
    return mean


def leave_one_out(features: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N, C]
    """Each sample's prediction by the ridge regression of the labels on all others' features.

    In closed form, one solve for all of them: (H Y - h Y) / (1 - h) with the hat matrix H and its
    diagonal h (Allen's PRESS, Technometrics 16, 1974).
    """
    targets = np.eye(y.max() + 1)[y] if y.ndim == 1 else y.astype(np.float64)
    x = np.concatenate([_standard(features), np.ones((len(features), 1))], axis=1)
    gram = x.T @ x + PENALTY * len(x) * np.eye(x.shape[1])
    solved = np.linalg.solve(gram, x.T)
    leverage = (x * solved.T).sum(1)[:, None]
    result: np.ndarray = (x @ (solved @ targets) - leverage * targets) / (1 - leverage)
    return result


def mahalanobis(features: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N]
    """From the nearest class mean, one covariance for all (Lee et al., arXiv 1807.03888).

    Of several labels: from the mean of all. A tenth of the mean variance is added to the diagonal.
    """
    groups = y if y.ndim == 1 else np.zeros(len(y), dtype=int)
    names = np.unique(groups)
    means = np.stack([features[groups == c].mean(0) for c in names])
    inside = features - means[np.searchsorted(names, groups)]
    covariance = inside.T @ inside / len(features)
    covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    inverse = np.linalg.inv(covariance)
    away = features[:, None] - means[None]
    result: np.ndarray = np.einsum("ncd,de,nce->nc", away, inverse, away, optimize=True).min(1)
    return result


def _standard(columns: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1; constant ones (dead channels) go."""
    columns = columns.astype(np.float64)
    spread = columns.std(0)
    kept = spread > 1e-8
    result: np.ndarray = (columns[:, kept] - columns[:, kept].mean(0)) / spread[kept]
    return result
