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

_PRUNECXR_SPARSITY = 0.9  # src/pie_analysis.py


def pie(
    predictions: MiningResult | str | os.PathLike[str] | tuple[Any, Any],
    definition: str = "spearman",
    fraction: float = 0.05,
    threshold: float = 0.5,
    *,
    sparsity: float | None = None,
    compat: str | None = None,
) -> np.ndarray | list[str]:
    """The pruning-identified exemplars (PIEs) of a data set, hardest first.

    These rank, and the first `int(fraction * N)` samples are PIEs:

    - "spearman" (PruneCXR, arXiv 2308.09180): probabilities are averaged over the models, in fp64;
      the lowest rank correlation (average ranks for ties) of a sample's dense and pruned
      probabilities first. Equal correlations count as equal exactly, not up to rounding. A constant
      row carries no ranking: such samples come after all others.
    - "taxicab" (Hooker et al., arXiv 2010.03058): `sum_c |n_dense,c - n_pruned,c| / K`, where `n_c`
      of K models put class c first (of equal probabilities the lower class id). It takes few values,
      0 among them: where fewer samples than asked for differ, the rest of the PIEs do not.
    - "drift" (PreFIQs, arXiv 2605.13396): the distance of the L2-normalised embeddings of a model's
      dense and pruned self, mean over the models; a zero embedding stays zero. Of embeddings, not of
      probabilities: arrays of any range; of a run, its features (of an "embedding" run its outputs).
      Equals in the order of the rows.
    - "js" (ours): Jensen-Shannon divergence of the averaged probabilities.
    - "margin" (ours): how far the averaged pruned probabilities are from changing the dense
      decision, the lowest first. Multiclass: that of the dense models' class minus the best other.
      Multilabel: the least distance of a class from `threshold`, negative on the wrong side.

    These decide who is a PIE, and `fraction` does not apply:

    - "modal" (Hooker et al., arXiv 1911.05248): the samples whose most frequent label over the
      pruned models differs from that over the dense models; a tie takes the larger class id.
    - "vote" (As Easy as PIE): the samples with a class for which the majority of the pruned models
      (`p > threshold`, more than half of them; half of them are no majority) differs from the
      majority of the dense models.
    - "flip" (ours): the samples where the averaged probabilities decide otherwise: another top class,
      in multilabel another set of classes with `p > threshold`.

    Equals of the definitions that rank, and all PIEs of those that decide, are ordered by the
    Jensen-Shannon divergence of the averaged probabilities, then by row. A sample with a NaN in any
    model has no score: it comes last, or is no PIE. (A run has none: such samples are in its errors.)

    With `compat="prunecxr"`, "spearman" gives the rows of the public script (VITA-Group/PruneCXR,
    src/pie_analysis.py: `np.argsort(dense.corrwith(pruned, axis=1, method="spearman"))`), in its
    order. Its quirks: the mean over the models is in the dtype of the predictions (fp32, also from a
    run); a class that is NaN in either is left out of that sample's correlation; equal correlations
    from different ranks can differ by rounding; those that remain equal come in the order of NumPy's
    default sort, which is not stable and depends on the CPU: at the end of the list they decide who is
    a PIE. NaN comes last, as pandas 3 has it. (pandas 2 put -1 in the place of a NaN and numbered the
    others without it; without NaN the two agree.) pandas is not needed.

    Args:
        predictions: `(dense, pruned)`, arrays or tensors of probabilities in [0, 1], each
            [S, N, C] (models first) or [N, C]; or a run that kept its logits (of one model or of
            several), or its folder. For "js", "margin" and "flip" arrays are multiclass where every
            row sums to 1, else multilabel.
        definition: "spearman", "taxicab", "drift", "js", "margin", "modal", "vote" or "flip".
        fraction: of the samples, in [0, 1], for the definitions that rank.
        threshold: on the probabilities, for "vote", and "margin" and "flip" in multilabel.
        sparsity: for a run with a ladder, the level to use; by default the highest, with `compat` .9,
            which is the script's.
        compat: "prunecxr" or None.

    Returns:
        Row indices (int64) for arrays, sample ids for a run.

    Raises:
        FastpieError: for shapes that do not fit, values outside [0, 1], no sample without NaN, or a
            run without logits (for "drift" without features).
    """
    if isinstance(predictions, tuple | list):
        if len(predictions) != 2:
            raise FastpieError(f"Expected (dense, pruned), but got {len(predictions)} arrays.")
        return exemplars(*predictions, definition, fraction, threshold, compat=compat)
    if isinstance(predictions, str | os.PathLike):
        predictions = MiningResult(predictions)
    if not isinstance(predictions, MiningResult):
        raise FastpieError(
            f"Expected (dense, pruned) or a run, but got {type(predictions).__name__}."
        )
    task = predictions.record["config"]["task"]
    if sparsity is None and compat is not None:
        sparsity = _PRUNECXR_SPARSITY
    level = _level(predictions, sparsity)
    if definition == "drift":
        dense, pruned = _kept(predictions, "logits" if task == "embedding" else "features", level)
    else:
        if task not in ("multiclass", "multilabel"):
            raise FastpieError(f"Expected a run of a classifier, but its task is {task!r}.")
        # The script has fp32 probabilities.
        dtype = torch.float64 if compat is None else torch.float32
        logits = (torch.from_numpy(x).to(dtype) for x in _kept(predictions, "logits", level))
        dense, pruned = (
            (x.sigmoid() if task == "multilabel" else x.softmax(-1)).numpy() for x in logits
        )
    chosen = exemplars(dense, pruned, definition, fraction, threshold, task=task, compat=compat)
    ids = predictions.table.column("sample_id").to_pylist()
    return [ids[row] for row in chosen]


def _level(run: MiningResult, sparsity: float | None) -> int:
    levels = run.record["config"]["sparsities"]
    if sparsity is None:
        return len(levels) - 1
    near = [i for i, s in enumerate(levels) if abs(s - sparsity) <= 1e-9]
    if not near:
        raise FastpieError(f"Expected `sparsity` to be one of {levels}, but got {sparsity}.")
    return near[0]


def _kept(run: MiningResult, kind: str, level: int) -> list[np.ndarray]:
    """Logits or features of the S dense and the S pruned models of a run, fp32 [S, N, C] each."""
    ids = run.table.column("sample_id")
    dense, pruned = [], []
    for model in run.members or [run]:
        # A model can have scored samples that another could not.
        rows = pc.index_in(ids, model.table.column("sample_id")).to_numpy()
        of_dense, of_pruned = model.features() if kind == "features" else model.logits()
        dense.append(of_dense[rows])
        pruned.append(of_pruned[level][rows])
    return [np.stack(dense), np.stack(pruned)]
