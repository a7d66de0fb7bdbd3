"""A generated multi-label set whose forgetting is known: what drives it, how strongly, for which pairs.

Class c has prevalence f_c (log-uniform). Pairs of classes (0, 1), (2, 3), ... form groups, which
co-occur through a Gaussian copula of a correlation of their own. At the highest level a class loses
the fraction

    A_c = drop - slope * (ln f_c - mean) + alike * u_group(c) + own * e_c,    u, e ~ N(0, 1)

of its average precision, clipped to what prevalence allows, and on the way there
`F_c(level) = -A_c * (level / highest)^3`. So frequency drives the forgetting with a known slope, and
classes that co-occur are forgotten alike. Scores are binormal, with the separation at which the
average precision of infinitely many samples is exactly `ap * (1 + F_c(level))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

PREVALENCE = (0.02, 0.25)
DENSE_AP = 0.7
_MEAN = float(np.log(PREVALENCE).mean())
_QUANTILES = special.ndtri((np.arange(500) + 0.5) / 500)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)


@dataclass(frozen=True)
class Structure:
    """The truth.

    Attributes:
        prevalence: [C].
        curves: [L, C], forgettability F of average precision.
        iou: [C, C], of the classes' positives.
        group: [C], int; classes of one group co-occur.
        correlation: [C], of the copula, the same in a group.
    """

    prevalence: np.ndarray
    curves: np.ndarray
    iou: np.ndarray
    group: np.ndarray
    correlation: np.ndarray


@dataclass(frozen=True)
class MultilabelSet:
    """Arrays for `Predictions.of_arrays`, and the truth behind them."""

    dense: np.ndarray  # fp32 [S, N, C], probabilities
    pruned: np.ndarray  # fp32 [S, L, N, C]
    sparsities: list[float]
    labels: np.ndarray  # fp32 [N, C] of 0 and 1
    train_counts: np.ndarray  # int64 [C]: of a training set of ten times the size
    truth: Structure


def structure(
    rng: np.random.Generator,
    classes: int,
    sparsities: list[float],
    *,
    drop: float = 0.4,
    slope: float = 0.12,
    alike: float = 0.06,
    own: float = 0.04,
) -> Structure:
    """Draw the classes. slope=alike=0: nothing links frequency or co-occurrence to forgetting."""
    log_prevalence = rng.uniform(*np.log(PREVALENCE), classes)
    group = np.arange(classes) // 2
    shared, correlation = rng.normal(size=classes), rng.uniform(0.3, 0.9, classes)
    lost = drop - slope * (log_prevalence - _MEAN) + alike * shared[group]
    lost = lost + own * rng.normal(size=classes)
    prevalence = np.exp(log_prevalence)
    # Chance is the prevalence; a little above it the separation can still be found.
    lost = np.clip(lost, -0.2, 1 - 1.05 * prevalence / DENSE_AP)
    shape = (np.array(sparsities) / sparsities[-1]) ** 3
    correlation = correlation[group]
    both = _joint(prevalence, group, correlation)
    iou = both / (prevalence[:, None] + prevalence - both)
    return Structure(prevalence, -lost * shape[:, None], iou, group, correlation)


def multilabel_set(
    seed: int,
    *,
    samples: int = 2000,
    classes: int = 12,
    models: int = 6,
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9),
    paired: float = 0.8,
    spread: float = 0.05,
    **links: float,
) -> MultilabelSet:
    """Generate one set.

    Args:
        seed: of everything.
        samples: N.
        classes: C.
        models: S; their scores are independent given the labels.
        sparsities: the L levels.
        paired: correlation of the noise of a dense model and of its pruned selves.
        spread: standard deviation of a model's separation of a class.
        links: of `structure`: drop, slope, alike, own. drop=slope=alike=own=0: pruning costs nothing.
    """
    rng = np.random.default_rng(seed)
    levels = list(sparsities)
    truth = structure(rng, classes, levels, **links)
    labels = _labels(rng, truth, samples)
    curves = np.concatenate([np.zeros((1, classes)), truth.curves])
    separation = _separation(DENSE_AP * (1 + curves), truth.prevalence)  # [L + 1, C]
    shape = (models, len(levels) + 1, samples, classes)
    noise = rng.normal(size=shape) * np.sqrt(1 - paired)
    noise += rng.normal(size=(models, 1, samples, classes)) * np.sqrt(paired)
    noise += (separation + spread * rng.normal(size=(models, len(levels) + 1, classes)))[
        :, :, None
    ] * labels
    scores = special.expit(noise - separation[0] / 2).astype(np.float32)
    return MultilabelSet(
        scores[:, 0],
        scores[:, 1:],
        levels,
        labels.astype(np.float32),
        np.round(10 * samples * truth.prevalence).astype(np.int64),
        truth,
    )


def _labels(rng: np.random.Generator, truth: Structure, samples: int) -> np.ndarray:
    shared = rng.normal(size=(samples, truth.group.max() + 1))[:, truth.group]
    latent = np.sqrt(truth.correlation) * shared
    latent += np.sqrt(1 - truth.correlation) * rng.normal(size=latent.shape)
    # Exactly round(f N) positives, so that prevalence is no further source of noise.
    order = stats.rankdata(-latent, axis=0, method="ordinal")
    return (order <= np.round(truth.prevalence * samples)).astype(np.float64)


def _joint(prevalence: np.ndarray, group: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """P(a and b) for each pair; independent outside a group."""
    limit = special.ndtri(1 - prevalence)[:, None]
    root = np.sqrt(correlation)[:, None]
    given = special.ndtr((root * _NODES - limit) / np.sqrt(1 - root**2))  # [C, nodes]
    inside = (given * _WEIGHTS) @ given.T / _WEIGHTS.sum()
    both: np.ndarray = np.where(group[:, None] == group, inside, prevalence[:, None] * prevalence)
    return both


def average_precision(separation: np.ndarray, prevalence: np.ndarray) -> np.ndarray:
    """Of infinitely many samples: positives N(separation, 1), negatives N(0, 1)."""
    at = _QUANTILES + separation[..., None]
    positives = prevalence[..., None] * special.ndtr(-_QUANTILES)
    negatives = (1 - prevalence[..., None]) * special.ndtr(-at)
    result: np.ndarray = (positives / (positives + negatives)).mean(-1)
    return result


def _separation(wanted: np.ndarray, prevalence: np.ndarray) -> np.ndarray:
    grid = np.linspace(-0.5, 6, 200)
    found = np.empty_like(wanted)
    for c, f in enumerate(prevalence):
        found[:, c] = np.interp(wanted[:, c], average_precision(grid, np.full(200, f)), grid)
    return found
