"""Pruning-identified exemplars, by the published definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastpie.errors import FastpieError
from fastpie.ops import reference

__all__ = ["DEFINITIONS", "exemplars"]

DEFINITIONS = ("spearman", "modal", "vote")


def exemplars(
    dense: Any,
    pruned: Any,
    definition: str = "spearman",
    fraction: float = 0.05,
    threshold: float = 0.5,
) -> np.ndarray:
    """Rows of the pruning-identified exemplars (PIEs), hardest first.

    - "spearman" (PruneCXR, arXiv 2308.09180): probabilities are averaged over the models; the
      `int(fraction * N)` samples whose rows of dense and pruned probabilities have the lowest rank
      correlation. A constant row carries no ranking: such samples come after all others.
    - "modal" (Hooker et al., arXiv 1911.05248): the samples whose most frequent label over the
      pruned models differs from that over the dense models; a tie takes the larger class id.
    - "vote" (As Easy as PIE): the samples with a class for which the majority of the pruned models
      (`p > threshold`, more than half of them) differs from the majority of the dense models.

    "modal" and "vote" decide who is a PIE, so `fraction` does not apply; all three order equals, and
    the last two order the PIEs, by the Jensen-Shannon divergence of the averaged probabilities.

    Args:
        dense: probabilities in [0, 1] of the dense models, [S, N, C] (models first) or [N, C].
        pruned: of the pruned models, likewise; their number may differ.
        definition: "spearman", "modal" or "vote".
        fraction: of the samples, in [0, 1], for "spearman".
        threshold: on the probabilities, for "vote".

    Returns:
        int64 row indices.

    Raises:
        FastpieError: for shapes that do not fit, or values outside [0, 1].
    """
    if definition not in DEFINITIONS:
        raise FastpieError(
            f"Expected `definition` to be one of {DEFINITIONS}, but got {definition!r}."
        )
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    dense, pruned = _probabilities("dense", dense), _probabilities("pruned", pruned)
    if dense.shape[1:] != pruned.shape[1:]:
        raise FastpieError(
            f"Expected the same samples and classes in both, but got {list(dense.shape[1:])} and "
            f"{list(pruned.shape[1:])}."
        )
    p, q = dense.mean(0), pruned.mean(0)  # fp64
    divergence = _js(p, q, multiclass=definition == "modal")
    if definition == "spearman":
        rho = reference.spearman(torch.from_numpy(p), torch.from_numpy(q)).numpy()
        order = np.lexsort((-divergence, rho))  # NaN last
        return order[: int(fraction * len(order))].astype(np.int64)
    if definition == "modal":
        differs = _modal(dense) != _modal(pruned)
    else:
        differs = (_majority(dense, threshold) != _majority(pruned, threshold)).any(1)
    order = np.argsort(-divergence, kind="stable")
    rows: np.ndarray = order[differs[order]].astype(np.int64)
    return rows


def _probabilities(name: str, value: Any) -> np.ndarray:  # -> [S, N, C] fp64
    array = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else value
    array = np.asarray(array, dtype=np.float64)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] == 0 or array.shape[2] == 0:
        raise FastpieError(
            f"Expected `{name}` of shape [S, N, C] or [N, C], but got {list(array.shape)}."
        )
    if not ((array >= 0) & (array <= 1)).all():
        raise FastpieError(f"Expected `{name}` to hold probabilities in [0, 1], but it does not.")
    return array


def _js(p: np.ndarray, q: np.ndarray, *, multiclass: bool) -> np.ndarray:  # [N, C] -> [N]
    """Jensen-Shannon divergence in nats; of the Bernoulli distribution of each class, summed."""

    def one_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        m = (a + b) / 2
        parts = [x * np.log(np.where(x > 0, x / np.where(m > 0, m, 1), 1)) for x in (a, b)]
        total: np.ndarray = (parts[0] + parts[1]).sum(1) / 2
        return total

    return one_side(p, q) if multiclass else one_side(p, q) + one_side(1 - p, 1 - q)


def _modal(probabilities: np.ndarray) -> np.ndarray:  # [S, N, C] -> [N]
    """The most frequent argmax over the models; a tie takes the larger class id."""
    classes = probabilities.shape[2]
    votes = probabilities.argmax(2)  # [S, N]
    counts = np.stack([(votes == c).sum(0) for c in range(classes)])  # [C, N]
    modal: np.ndarray = classes - 1 - counts[::-1].argmax(0)
    return modal


def _majority(probabilities: np.ndarray, threshold: float) -> np.ndarray:  # [S, N, C] -> [N, C]
    majority: np.ndarray = (probabilities > threshold).sum(0) > probabilities.shape[0] / 2
    return majority
