"""What the features of a checkpoint say about a sample: distances, labels near by, a linear probe.

"Early" features are the means and standard deviations over the positions of each stage's output but
the last one's. A trained network has memorised its labels, wrong ones included, in its last stage:
penultimate features put a wrong label among the samples of that label. Earlier ones do not.
"""

from __future__ import annotations

import numpy as np
from scipy.special import entr
from sklearn.neighbors import NearestNeighbors

from benchmarks.quality.trials import Trial
from fastpie.analysis import label_conflict, probe_margins, standardised

__all__ = [
    "agreement", "conflict", "early", "label_entropy", "mahalanobis", "nearest", "penultimate",
    "probe",
]  # fmt: skip


def early(trial: Trial, key: str = "features") -> np.ndarray:  # [N, D]
    """Features of all stages but the last, columns standardised, each stage of the same weight."""
    widths = [int(width) for width in trial["widths"][:-1]]
    return standardised(trial[key][:, : sum(widths)], widths)


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
    """`fastpie.analysis.label_conflict`, of several labels the largest; .5 where there is none."""
    task = "multiclass" if y.ndim == 1 else "multilabel"
    found = label_conflict(features, y, k, metric="euclidean", task=task)
    found = np.nan_to_num(found, nan=0.5)  # alone with its label, or all have it
    return found if y.ndim == 1 else found.max(1)


def probe(features: np.ndarray, y: np.ndarray) -> np.ndarray:  # [N]
    """`fastpie.analysis.probe_margins`, negated; of several labels the lowest margin."""
    classes = int(y.max()) + 1 if y.ndim == 1 else y.shape[1]
    margins = probe_margins(features, y, classes)
    return -margins if y.ndim == 1 else -margins.min(1)


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
