"""Pruning-identified exemplars, by the published definitions."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastpie.errors import FastpieError
from fastpie.ops import reference

if TYPE_CHECKING:
    from fastpie.mining.result import MiningResult

__all__ = ["pie"]

_DEFINITIONS = ("spearman", "modal", "vote")


def pie(
    predictions: MiningResult | str | os.PathLike[str] | tuple[Any, Any],
    definition: str = "spearman",
    fraction: float = 0.05,
    threshold: float = 0.5,
    *,
    sparsity: float | None = None,
) -> np.ndarray | list[str]:
    """The pruning-identified exemplars (PIEs) of a data set, hardest first.

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
        predictions: `(dense, pruned)`, arrays or tensors of probabilities in [0, 1], each
            [S, N, C] (models first) or [N, C]; or a run that kept its logits, or its folder.
        definition: "spearman", "modal" or "vote".
        fraction: of the samples, in [0, 1], for "spearman".
        threshold: on the probabilities, for "vote".
        sparsity: for a run with a ladder, the level to use; by default the highest.

    Returns:
        Row indices (int64) for arrays, sample ids for a run.

    Raises:
        FastpieError: for shapes that do not fit, values outside [0, 1], or a run without logits.
    """
    if definition not in _DEFINITIONS:
        raise FastpieError(
            f"Expected `definition` to be one of {_DEFINITIONS}, but got {definition!r}."
        )
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    ids = None
    if isinstance(predictions, tuple | list):
        if len(predictions) != 2:
            raise FastpieError(f"Expected (dense, pruned), but got {len(predictions)} arrays.")
        dense, pruned = (
            _probabilities(name, value)
            for name, value in zip(("dense", "pruned"), predictions, strict=True)
        )
    else:
        # Imported here: mining lies above scores.
        run = importlib.import_module("fastpie.mining.result").MiningResult
        if isinstance(predictions, str | os.PathLike):
            predictions = run(predictions)
        if not isinstance(predictions, run):
            raise FastpieError(
                f"Expected (dense, pruned) or a run, but got {type(predictions).__name__}."
            )
        dense, pruned = _of_run(predictions, sparsity)
        ids = predictions.table.column("sample_id").to_pylist()
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
        chosen = order[: int(fraction * len(order))]
    else:
        if definition == "modal":
            differs = _modal(dense) != _modal(pruned)
        else:
            differs = (_majority(dense, threshold) != _majority(pruned, threshold)).any(1)
        order = np.argsort(-divergence, kind="stable")
        chosen = order[differs[order]]
    return chosen.astype(np.int64) if ids is None else [ids[i] for i in chosen]


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


def _of_run(run: MiningResult, sparsity: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [1, N, C] of both models of a run."""
    config = run.record["config"]
    if config["task"] not in ("multiclass", "multilabel"):
        raise FastpieError(f"Expected a run of a classifier, but its task is {config['task']!r}.")
    levels = config["sparsities"]
    level = len(levels) - 1
    if sparsity is not None:
        near = [i for i, s in enumerate(levels) if abs(s - sparsity) <= 1e-9]
        if not near:
            raise FastpieError(f"Expected `sparsity` to be one of {levels}, but got {sparsity}.")
        level = near[0]
    dense, pruned = (torch.from_numpy(x).double() for x in run.logits())
    function = torch.sigmoid if config["task"] == "multilabel" else _softmax
    return function(dense).numpy()[None], function(pruned[level]).numpy()[None]


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


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
