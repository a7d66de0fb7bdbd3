"""`pie`: the exemplars of predictions or of a run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.scores.pie import exemplars

__all__ = ["pie"]


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
            [S, N, C] (models first) or [N, C]; or a run that kept its logits (of one model or of
            several), or its folder.
        definition: "spearman", "modal" or "vote".
        fraction: of the samples, in [0, 1], for "spearman".
        threshold: on the probabilities, for "vote".
        sparsity: for a run with a ladder, the level to use; by default the highest.

    Returns:
        Row indices (int64) for arrays, sample ids for a run.

    Raises:
        FastpieError: for shapes that do not fit, values outside [0, 1], or a run without logits.
    """
    if isinstance(predictions, tuple | list):
        if len(predictions) != 2:
            raise FastpieError(f"Expected (dense, pruned), but got {len(predictions)} arrays.")
        return exemplars(*predictions, definition, fraction, threshold)
    if isinstance(predictions, str | os.PathLike):
        predictions = MiningResult(predictions)
    if not isinstance(predictions, MiningResult):
        raise FastpieError(
            f"Expected (dense, pruned) or a run, but got {type(predictions).__name__}."
        )
    chosen = exemplars(*_of_run(predictions, sparsity), definition, fraction, threshold)
    ids = predictions.table.column("sample_id").to_pylist()
    return [ids[row] for row in chosen]


def _of_run(run: MiningResult, sparsity: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [S, N, C] of dense and pruned models of a run of S models."""
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
    function = torch.sigmoid if config["task"] == "multilabel" else _softmax
    ids = run.table.column("sample_id")
    dense, pruned = [], []
    for model in run.members or [run]:
        # A model can have scored samples that another could not.
        rows = pc.index_in(ids, model.table.column("sample_id")).to_numpy()
        logits = model.logits()
        dense.append(function(torch.from_numpy(logits[0][rows]).double()).numpy())
        pruned.append(function(torch.from_numpy(logits[1][level][rows]).double()).numpy())
    return np.stack(dense), np.stack(pruned)


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)
