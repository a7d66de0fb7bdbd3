"""cleanlab on the predictions of a run (https://docs.cleanlab.ai; `pip install 'fastpie[cleanlab]'`)."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from fastpie._extras import load_extra
from fastpie.analysis.predictions import Predictions
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["issues", "to_cleanlab"]

Run = MiningResult | Predictions | str | os.PathLike[str]


def to_cleanlab(
    result: Run, sparsity: float | None = None
) -> tuple[Any, np.ndarray, list[str]]:  # labels, [N, C], N sample ids
    """Labels and probabilities as cleanlab takes them.

    cleanlab expects predictions for samples that the model was not trained on: mine each fold with the
    model that has not seen it. Of a training set, look at the result with that in mind.

    Args:
        result: a run of a classifier that kept its logits, its folder, or predictions (of folds put
            together, say; ids are then row numbers where there are none). Probabilities of several
            models are averaged.
        sparsity: the level of the pruned model to take; None for the dense one.

    Returns:
        `(labels, pred_probs, sample_ids)`. Labels are int64 [N] for
        `cleanlab.filter.find_label_issues`, or of a multilabel run a list of the indices of each
        sample's classes, for `cleanlab.multilabel_classification`. `pred_probs` is fp64 [N, C]. Samples
        with an unknown label (of a multilabel run: any) are left out, with a warning that counts them.

    Raises:
        FastpieError: for a run of another task, without logits or labels, or without that level.
    """
    predictions = result if isinstance(result, Predictions) else Predictions.of_run(result)
    if predictions.labels is None:
        raise FastpieError("Expected labels, but the run or predictions have none.")
    names = predictions.sample_ids or [str(i) for i in range(predictions.samples)]
    level = None if sparsity is None else predictions.level(sparsity)
    probabilities = predictions.probabilities(level).mean(0)
    labels = predictions.labels
    known = labels >= 0 if predictions.task == "multiclass" else ~np.isnan(labels).any(1)
    if not known.all():
        warnings.warn(
            f"{np.count_nonzero(~known)} of {len(known)} samples have an unknown label and are left out.",
            stacklevel=2,
        )
    ids = [i for i, keep in zip(names, known, strict=True) if keep]
    if predictions.task == "multiclass":
        return labels[known], probabilities[known], ids
    several = [np.flatnonzero(row == 1).tolist() for row in labels[known]]
    return several, probabilities[known], ids


def issues(result: Run, sparsity: float | None = None, **options: Any) -> Any:
    """What cleanlab says about the labels of a run.

    Args:
        result: see `to_cleanlab`.
        sparsity: see `to_cleanlab`.
        options: of cleanlab's `find_label_issues`, such as `filter_by`.

    Returns:
        cleanlab's `pandas.DataFrame` with the index `sample_id`: `is_label_issue`, `label_quality` (low:
        likely wrong), `given_label`, `predicted_label`; of a multilabel run the last two are lists.

    Raises:
        FastpieError: see `to_cleanlab`; or if cleanlab is not installed or refuses the run (no sample
            with a label, say).
    """
    purpose = "finding label issues"
    classification = load_extra("cleanlab.classification", "cleanlab", purpose)
    several = load_extra("cleanlab.multilabel_classification", "cleanlab", purpose)
    pandas = load_extra("pandas", "cleanlab", purpose)
    labels, probabilities, ids = to_cleanlab(result, sparsity)
    if not ids:
        raise FastpieError("Expected samples with known labels, but there is none.")
    index = pandas.Index(ids, name="sample_id")
    try:
        if isinstance(labels, np.ndarray):
            finder = classification.CleanLearning(find_label_issues_kwargs=options)
            found = finder.find_label_issues(labels=labels, pred_probs=probabilities)
            return found.set_index(index)
        wrong = several.filter.find_label_issues(labels, probabilities, **options)
        scores = several.get_label_quality_scores(labels, probabilities)
    except (TypeError, ValueError) as error:
        raise FastpieError(f"Expected a run that cleanlab takes, but it says: {error}") from error
    predicted = [np.flatnonzero(row > 0.5).tolist() for row in probabilities]
    return pandas.DataFrame(
        {
            "is_label_issue": wrong,
            "label_quality": scores,
            "given_label": labels,
            "predicted_label": predicted,
        },
        index=index,
    )
