"""How far our list of doubtful labels agrees with cleanlab's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.analysis.doubt import Doubt
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.quadrants import highest
from fastpie.errors import FastpieError

__all__ = ["cleanlab_agreement", "cleanlab_doubt"]


def cleanlab_agreement(
    doubt: Doubt,
    predictions: Predictions,
    *,
    fraction: float = 0.05,
    out_of_sample: bool = False,
) -> pa.Table:
    """Compare with cleanlab's label quality scores (Northcutt et al., arXiv 1911.00068).

    Args:
        doubt: ours.
        predictions: for cleanlab, which takes the dense models' mean probabilities; joined by
            sample_id, where they have ids, else in the order of `doubt`.
        fraction: of the samples that both can score, that either list holds.
        out_of_sample: whether the predictions are of models trained without the sample, as cleanlab
            wants them; else `b` says that they are not.

    Returns:
        The table `agreement` with one row: `a`, `b`, `jaccard` of the lists of the most doubtful, of
        the same size `n` (null for empty ones), and `rank_correlation` (Spearman, of all samples that
        both can score; null for fewer than 2 different values).

    Raises:
        FastpieError: without labels, for other samples, or without cleanlab
            (`pip install 'fastpie[cleanlab]'`).
    """
    ours = doubt.samples.column("label_in_doubt").to_numpy(zero_copy_only=False)
    theirs = cleanlab_doubt(predictions)
    if predictions.sample_ids is not None:
        place = pc.index_in(doubt.samples.column("sample_id"), pa.array(predictions.sample_ids))
        joined = pa.array(theirs).take(place.combine_chunks())
        theirs = joined.to_numpy(zero_copy_only=False)
    elif len(theirs) != len(ours):
        raise FastpieError(
            f"Expected predictions of the {len(ours)} samples of `doubt`, but got {len(theirs)}."
        )
    both = ~(np.isnan(ours) | np.isnan(theirs))
    ours, theirs = ours[both], theirs[both]
    first, second = highest(ours, fraction), highest(theirs, fraction)
    size = int(first.sum())
    correlation = None
    if len(ours) and np.ptp(ours) > 0 and np.ptp(theirs) > 0:
        stats = load_extra("scipy.stats", "analysis", "rank correlation")
        correlation = float(stats.spearmanr(ours, theirs).statistic)
    return pa.table(
        {
            "a": ["label_in_doubt"],
            "b": [f"cleanlab, {'out of' if out_of_sample else 'in'} sample"],
            "jaccard": pa.array(
                [float((first & second).sum() / (first | second).sum()) if size else None],
                pa.float64(),
            ),
            "rank_correlation": pa.array([correlation], pa.float64()),
            "n": pa.array([size], pa.int64()),
        }
    )


def cleanlab_doubt(predictions: Predictions) -> np.ndarray:  # fp64 [N]
    """1 minus cleanlab's label quality (its default, self-confidence), higher = more doubtful.

    NaN for a sample with an unknown label or a probability that is NaN: cleanlab takes neither.

    Raises:
        FastpieError: without labels or without cleanlab.
    """
    if predictions.labels is None:
        raise FastpieError("Expected predictions with labels, but these have none.")
    labels = predictions.labels
    probabilities = predictions.probabilities().mean(0)
    usable = ~np.isnan(probabilities).any(1)
    quality = np.full(predictions.samples, np.nan)
    if predictions.task == "multilabel":
        scores = load_extra("cleanlab.multilabel_classification", "cleanlab", "its quality scores")
        usable &= ~np.isnan(labels).any(1)
        given = [np.flatnonzero(row).tolist() for row in labels[usable]]
    else:
        scores = load_extra("cleanlab.rank", "cleanlab", "its quality scores")
        usable &= labels >= 0
        given = labels[usable]
    if usable.any():
        quality[usable] = scores.get_label_quality_scores(given, probabilities[usable])
    return 1 - quality
