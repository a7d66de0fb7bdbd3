"""Pruning-identified exemplars, by the published definitions and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastpie.errors import FastpieError
from fastpie.scores.rank_correlation import as_pandas, rank_sums, spearman

__all__ = ["DEFINITIONS", "exemplars", "scored_exemplars"]

_DECIDED = ("modal", "vote", "flip")  # say who is a PIE; the others rank
DEFINITIONS = ("spearman", "modal", "vote", "taxicab", "drift", "js", "margin", "flip")

_CHUNK = 1 << 22  # elements [samples, classes] at a time
_SUM_TOLERANCE = 1e-2  # of softmax in 16 bits


def exemplars(
    dense: Any,
    pruned: Any,
    definition: str = "spearman",
    fraction: float = 0.05,
    threshold: float = 0.5,
    *,
    task: str | None = None,
    compat: str | None = None,
) -> np.ndarray:
    """Rows of the pruning-identified exemplars (PIEs), hardest first.

    `fastpie.pie` says what the definitions are, and what becomes of NaN and of ties.

    Args:
        dense: probabilities in [0, 1] of the dense models, [S, N, C] (models first) or [N, C]; NaN
            for unknown. For "drift" embeddings of any range.
        pruned: of the pruned models, likewise; their number may differ, except for "drift".
        definition: one of `DEFINITIONS`.
        fraction: of the samples, in [0, 1], for the definitions that rank.
        threshold: on the probabilities, for "vote" and, where `task` is "multilabel", "margin" and
            "flip".
        task: "multiclass" or "multilabel", for "js", "margin" and "flip"; by default "multiclass"
            where every row sums to 1.
        compat: "prunecxr" for "spearman" with the rounding and order of the public script.

    Returns:
        int64 row indices.

    Raises:
        FastpieError: for shapes that do not fit, values outside [0, 1], or no sample without NaN.
    """
    if compat is not None:
        if compat != "prunecxr" or definition != "spearman":
            raise FastpieError(
                "Expected `compat` to be None, or 'prunecxr' with definition 'spearman', but got "
                f"{compat!r} with {definition!r}."
            )
        return _as_prunecxr(*_checked(dense, pruned, definition, fraction), fraction)
    return scored_exemplars(dense, pruned, definition, fraction, threshold, task=task)[0]


def scored_exemplars(
    dense: Any,
    pruned: Any,
    definition: str = "spearman",
    fraction: float = 0.05,
    threshold: float = 0.5,
    *,
    task: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What `exemplars` gives, and how much of a PIE each sample is.

    Args:
        dense: as of `exemplars`; likewise the others.
        pruned: of the pruned models.
        definition: one of `DEFINITIONS`.
        fraction: of the samples.
        threshold: on the probabilities.
        task: "multiclass" or "multilabel".

    Returns:
        int64 row indices, hardest first, and fp64 [N], higher = harder, what they are ranked by before
        any tie-break; NaN for a sample without a score. "spearman": -rho in [-1, 1]. "taxicab" and
        "drift": in [0, 2]. "js": nats, of "multilabel" summed over the classes. "margin": minus the
        margin, in [-1, 1]. "modal", "vote", "flip": above 0 for a PIE, in multilabel the number of
        classes that differ.

    Raises:
        FastpieError: as `exemplars`.
    """
    dense, pruned = _checked(dense, pruned, definition, fraction)
    score, divergence = _scored(dense, pruned, definition, threshold, task)
    if definition in _DECIDED:
        order = np.argsort(-divergence, kind="stable")
        order = order[score[order] > 0]
    else:
        order = np.lexsort((-divergence, -score))  # stable; NaN last
        order = order[: int(fraction * len(order))]
    return order.astype(np.int64), score


def _scored(
    dense: np.ndarray, pruned: np.ndarray, definition: str, threshold: float, task: str | None
) -> tuple[np.ndarray, np.ndarray]:  # fp64 [N], fp64 [N]
    """The score and what orders equals."""
    if definition == "drift":
        drift = _drift(dense, pruned)
        return drift, np.zeros_like(drift)
    limit = np.float64(threshold)  # fp32 probabilities are compared as fp64
    p, q = (array.mean(0, dtype=np.float64) for array in (dense, pruned))
    unknown = np.isnan(p).any(1) | np.isnan(q).any(1)
    if definition in ("js", "margin", "flip"):
        multiclass = _is_multiclass(p[~unknown], q[~unknown], task)
    else:
        multiclass = definition in ("modal", "taxicab")
    divergence = _js(p, q, multiclass=multiclass)
    if definition == "spearman":
        score = -spearman(rank_sums(p, q))
    elif definition == "modal":
        score = (_modal(dense) != _modal(pruned)).astype(np.float64)
    elif definition == "taxicab":
        score = _taxicab(dense, pruned)
    elif definition == "vote":
        differs = _majority(dense, limit) != _majority(pruned, limit)
        score = differs.sum(1, dtype=np.float64)
    elif definition == "js":
        score = divergence.copy()
    elif definition == "flip":
        if multiclass:
            score = (p.argmax(1) != q.argmax(1)).astype(np.float64)
        else:
            score = ((p > limit) != (q > limit)).sum(1, dtype=np.float64)
    else:
        score = -(_margin(p, q) if multiclass else _distance(p, q, limit))
    score[unknown] = divergence[unknown] = np.nan
    return score, divergence


def _as_prunecxr(dense: np.ndarray, pruned: np.ndarray, fraction: float) -> np.ndarray:
    """`numpy.argsort(corrwith(...))[:int(fraction * N)]` of src/pie_analysis.py, without pandas."""
    # The script's mean is of numpy.stack, in the dtype of the predictions (fp32 there).
    p, q = (np.ascontiguousarray(array).mean(0) for array in (dense, pruned))
    rho = as_pandas(rank_sums(p, q))
    numbers = np.flatnonzero(~np.isnan(rho))
    # pandas calls this sort too. Which of equals comes first is its affair, so not a stable one.
    order = numbers[rho[numbers].argsort()]
    order = np.concatenate([order, np.flatnonzero(np.isnan(rho))])
    return order[: int(fraction * len(order))].astype(np.int64)


def _checked(
    dense: Any, pruned: Any, definition: str, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    if definition not in DEFINITIONS:
        raise FastpieError(
            f"Expected `definition` to be one of {DEFINITIONS}, but got {definition!r}."
        )
    first, second = _array("dense", dense), _array("pruned", pruned)
    if first.shape[1:] != second.shape[1:]:
        raise FastpieError(
            f"Expected the same samples and classes in both, but got {list(first.shape[1:])} and "
            f"{list(second.shape[1:])}."
        )
    if definition == "drift":
        if len(first) != len(second):
            raise FastpieError(
                "Expected as many dense as pruned models for 'drift', which compares the embeddings "
                f"of one model, but got {len(first)} and {len(second)}."
            )
        return first, second
    for name, array in (("dense", first), ("pruned", second)):
        if not array.size:
            continue
        low, high = np.fmin.reduce(array, axis=None), np.fmax.reduce(array, axis=None)  # pass NaN
        if not (low >= 0 and high <= 1):
            raise FastpieError(
                f"Expected `{name}` to hold probabilities in [0, 1], but it does not."
            )
    return first, second


def _array(name: str, value: Any) -> np.ndarray:  # -> fp32 or fp64 [S, N, C]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value if value.dtype in (torch.float32, torch.float64) else value.double()).numpy()
    array = np.asarray(value)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] == 0 or array.shape[2] == 0:
        raise FastpieError(
            f"Expected `{name}` of shape [S, N, C] or [N, C], but got {list(array.shape)}."
        )
    return array


def _is_multiclass(p: np.ndarray, q: np.ndarray, task: str | None) -> bool:
    if task not in (None, "multiclass", "multilabel"):
        raise FastpieError(f"Expected task 'multiclass' or 'multilabel', but got {task!r}.")
    if task is not None:
        return task == "multiclass"
    return all(bool((np.abs(x.sum(1) - 1) <= _SUM_TOLERANCE).all()) for x in (p, q))


def _js(p: np.ndarray, q: np.ndarray, *, multiclass: bool) -> np.ndarray:  # [N, C] -> [N]
    """Jensen-Shannon divergence in nats; of the Bernoulli distribution of each class, summed."""

    def one_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        m = (a + b) / 2
        parts = [x * np.log(np.where(x > 0, x / np.where(m > 0, m, 1), 1)) for x in (a, b)]
        total: np.ndarray = (parts[0] + parts[1]).sum(1) / 2
        return total

    return one_side(p, q) if multiclass else one_side(p, q) + one_side(1 - p, 1 - q)


def _chunks(array: np.ndarray) -> Iterator[slice]:  # of the samples of [S, N, C]
    step = max(1, _CHUNK // array.shape[2])
    for begin in range(0, array.shape[1], step):
        yield slice(begin, begin + step)


def _label_counts(probabilities: np.ndarray) -> np.ndarray:  # [S, n, C] -> int64 [n, C]
    """How many models put each class first; of equal probabilities the first counts."""
    samples, classes = probabilities.shape[1:]
    cells = np.arange(samples) * classes + probabilities.argmax(2)  # [S, n]
    return np.bincount(cells.ravel(), minlength=samples * classes).reshape(samples, classes)


def _modal(probabilities: np.ndarray) -> np.ndarray:  # [S, N, C] -> int64 [N]
    """The most frequent argmax over the models; a tie takes the larger class id."""
    modal = np.zeros(probabilities.shape[1], np.int64)
    for rows in _chunks(probabilities):
        counts = _label_counts(probabilities[:, rows])
        modal[rows] = counts.shape[1] - 1 - counts[:, ::-1].argmax(1)
    return modal


def _taxicab(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:  # -> fp64 [N]
    distance = np.zeros(dense.shape[1], np.int64)
    for rows in _chunks(dense):
        # Over a common denominator, so that equal distances are equal numbers.
        of_dense = _label_counts(dense[:, rows]) * len(pruned)
        of_pruned = _label_counts(pruned[:, rows]) * len(dense)
        distance[rows] = np.abs(of_dense - of_pruned).sum(1)
    result: np.ndarray = distance / (len(dense) * len(pruned))
    return result


def _majority(probabilities: np.ndarray, threshold: np.float64) -> np.ndarray:  # -> bool [N, C]
    majority: np.ndarray = (probabilities > threshold).sum(0) > probabilities.shape[0] / 2
    return majority


def _margin(p: np.ndarray, q: np.ndarray) -> np.ndarray:  # [N, C] -> [N]
    """Of `q`, for the class that `p` puts first."""
    if p.shape[1] == 1:
        return np.full(len(p), np.nan)  # there is no other class
    first = p.argmax(1)[:, None]
    others = q.copy()
    np.put_along_axis(others, first, -np.inf, 1)
    margin: np.ndarray = np.take_along_axis(q, first, 1)[:, 0] - others.max(1)
    return margin


def _distance(p: np.ndarray, q: np.ndarray, threshold: np.float64) -> np.ndarray:  # [N, C] -> [N]
    """Least distance of `q` from the threshold, below 0 where it is not on the side of `p`."""
    distance: np.ndarray = np.where(p > threshold, q - threshold, threshold - q).min(1)
    return distance


def _drift(dense: np.ndarray, pruned: np.ndarray) -> np.ndarray:  # [S, N, D] -> fp64 [N]
    drift = np.zeros(dense.shape[1])
    for rows in _chunks(dense):
        for pair in zip(dense[:, rows], pruned[:, rows], strict=True):
            f, g = (x.astype(np.float64) for x in pair)
            with np.errstate(invalid="ignore", over="ignore"):  # an infinite one has no direction
                f, g = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (f, g))
                drift[rows] += np.linalg.norm(f - g, axis=1)
    drift[~np.isfinite(drift)] = np.nan
    result: np.ndarray = drift / len(dense)
    return result
