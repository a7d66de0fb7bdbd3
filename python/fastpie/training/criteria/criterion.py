"""Criteria by name: the loss of each sample, from logits and labels, for `fastpie.training`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastpie.errors import FastpieError
from fastpie.training.criteria.counts import class_counts
from fastpie.training.criteria.multiclass import (
    LDAM,
    ClassBalanced,
    CrossEntropy,
    Focal,
    LogitAdjusted,
)
from fastpie.training.criteria.multilabel import (
    Asymmetric,
    BinaryClassBalanced,
    BinaryCrossEntropy,
    BinaryFocal,
    BinaryLogitAdjusted,
)
from fastpie.training.criteria.sample import SampleLoss
from fastpie.training.criteria.segmentation import DiceCrossEntropy

__all__ = ["CRITERIA", "SampleLoss", "class_counts", "criterion"]


def _balanced_softmax(counts: Any, label_smoothing: float = 0.0) -> LogitAdjusted:
    return LogitAdjusted(counts, 1.0, label_smoothing)


def _pixels() -> DiceCrossEntropy:
    return DiceCrossEntropy(dice=0)


def _dice(include_background: bool = True, smooth: float = 1e-5) -> DiceCrossEntropy:
    return DiceCrossEntropy(0, 1, include_background, smooth)


CRITERIA: Mapping[str, Mapping[str, Callable[..., SampleLoss]]] = {
    "multiclass": {
        "cross_entropy": CrossEntropy,
        "class_balanced": ClassBalanced,
        "focal": Focal,
        "logit_adjusted": LogitAdjusted,
        "balanced_softmax": _balanced_softmax,
        "ldam": LDAM,
    },
    "multilabel": {
        "cross_entropy": BinaryCrossEntropy,
        "class_balanced": BinaryClassBalanced,
        "focal": BinaryFocal,
        "logit_adjusted": BinaryLogitAdjusted,
        "asymmetric": Asymmetric,
    },
    "segmentation": {
        "cross_entropy": _pixels,
        "dice": _dice,
        "dice_cross_entropy": DiceCrossEntropy,
    },
}
"""By task and name; their options are those of what is named."""


def criterion(
    name: str, task: str = "multiclass", counts: Any = None, **options: Any
) -> SampleLoss:
    """The criterion of that name.

    ============  ==================  ==========================================================
    multiclass    cross_entropy       options: label_smoothing, weights
    .             class_balanced      by effective number of samples; beta, gamma
    .             focal               gamma, weights
    .             logit_adjusted      tau, label_smoothing
    .             balanced_softmax    logit_adjusted with tau = 1; label_smoothing
    .             ldam                LDAM-DRW; max_margin, scale, reweight_from, beta
    multilabel    cross_entropy       label_smoothing, weights
    .             class_balanced      beta, gamma
    .             focal               gamma, weights
    .             logit_adjusted      tau, label_smoothing
    .             asymmetric          gamma_negative, gamma_positive, margin
    segmentation  cross_entropy       of the pixels
    .             dice                include_background, smooth
    .             dice_cross_entropy  their sum; cross_entropy, dice (weights), and those of dice
    ============  ==================  ==========================================================

    Args:
        name: see above.
        task: "multiclass", "multilabel" or "segmentation".
        counts: from `class_counts`, of the training samples; those that use none ignore them.
        options: see above, and the classes of `fastpie.training.criteria.multiclass` and its
            neighbours, where the formulas and their sources are.

    Raises:
        FastpieError: for an unknown task, name, option or value, or where `counts` are needed.
    """
    if task not in CRITERIA:
        raise FastpieError(f"Expected `task` to be one of {list(CRITERIA)}, but got {task!r}.")
    if name not in CRITERIA[task]:
        raise FastpieError(
            f"Expected the criterion of task {task!r} to be one of {list(CRITERIA[task])}, but got "
            f"{name!r}."
        )
    make = CRITERIA[task][name]
    known = list(inspect.signature(make).parameters)
    if "counts" in known:
        if counts is None:
            raise FastpieError(
                f"Expected `counts` for the criterion {name!r}: how many samples each class has in "
                "the training set (class_counts)."
            )
        known.remove("counts")
        make = partial(make, counts)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise FastpieError(
            f"Expected options of the criterion {name!r} to be among {known}, but got {unknown}."
        )
    return make(**options)
