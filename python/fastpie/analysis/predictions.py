"""What the published analyses need: predictions of dense and pruned models, labels, frequencies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["Predictions"]

_TASKS = ("multiclass", "multilabel")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of S dense models and of their pruned selves at L levels, for N samples, C classes.

    Attributes:
        dense: fp32 or fp64 [S, N, C], probabilities or logits.
        pruned: likewise [S, L, N, C]; model s of it is dense model s, pruned.
        sparsities: the L levels, increasing.
        task: "multiclass" or "multilabel".
        logits: whether the values are logits and not probabilities.
        labels: multiclass: int64 [N], -1 unknown; multilabel: fp32 [N, C] of 1, 0, NaN (unknown);
            None without labels.
        sample_ids: N texts, or None.
        class_names: C names.
        train_counts: int64 [C], positives of each class in the training set, or None.
    """

    dense: np.ndarray
    pruned: np.ndarray
    sparsities: list[float]
    task: str
    logits: bool
    labels: np.ndarray | None
    sample_ids: list[str] | None
    class_names: list[str]
    train_counts: np.ndarray | None = None

    @classmethod
    def of_arrays(
        cls,
        dense: Any,  # [S, N, C] or [N, C]
        pruned: Any,  # [S, L, N, C], [L, N, C] beside a dense [N, C], or a single level without L
        sparsities: Sequence[float] | float,
        *,
        task: str,
        labels: Any = None,
        sample_ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        train_counts: Any = None,
        logits: bool = False,
    ) -> Predictions:
        """Check arrays, and put the dimensions that they lack.

        Args:
            dense: outputs of the dense models.
            pruned: of the pruned models. Without a level dimension where `sparsities` is a number.
            sparsities: the levels in (0, 1), increasing; a number for one level.
            task: "multiclass" or "multilabel".
            labels: see the class; anything that numpy takes.
            sample_ids: one for each sample.
            class_names: one for each class; by default the indices.
            train_counts: positives of each class in the training set.
            logits: whether the values are logits.

        Raises:
            FastpieError: for shapes, levels, labels or values that do not fit.
        """
        if task not in _TASKS:
            raise FastpieError(f"Expected `task` to be one of {_TASKS}, but got {task!r}.")
        single = isinstance(sparsities, int | float)
        levels = [float(s) for s in np.atleast_1d(np.asarray(sparsities, dtype=np.float64))]
        if not levels or levels != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise FastpieError(
                f"Expected `sparsities` in (0, 1), increasing, but got {sparsities}."
            )
        first, second = _floats("dense", dense), _floats("pruned", pruned)
        if single:
            second = np.expand_dims(second, max(second.ndim - 2, 0))
        if first.ndim == 2:
            first = first[None]
            second = second[None] if second.ndim == 3 else second
        if first.ndim != 3 or second.ndim != 4:
            raise FastpieError(
                f"Expected `dense` of shape [S, N, C] and `pruned` of shape [S, L, N, C] with "
                f"L == {len(levels)}, but got {list(np.shape(dense))} and {list(np.shape(pruned))}."
            )
        models, samples, classes = first.shape
        if second.shape != (models, len(levels), samples, classes):
            raise FastpieError(
                f"Expected `pruned` of shape {[models, len(levels), samples, classes]} beside `dense` "
                f"of shape {list(first.shape)}, but got {list(second.shape)}."
            )
        if not logits:
            for name, values in (("dense", first), ("pruned", second)):
                # fmin and fmax pass over NaN, also where there is nothing else.
                least = np.fmin.reduce(values, axis=None, initial=0)
                if least < 0 or np.fmax.reduce(values, axis=None, initial=1) > 1:
                    raise FastpieError(
                        f"Expected `{name}` to hold probabilities in [0, 1], but it does not; pass "
                        "logits=True for logits."
                    )
        names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
        if len(names) != classes:
            raise FastpieError(f"Expected {classes} `class_names`, but got {len(names)}.")
        if len(set(names)) < classes:
            raise FastpieError(f"Expected `class_names` that all differ, but got {names}.")
        ids = None if sample_ids is None else [str(i) for i in sample_ids]
        if ids is not None and len(ids) != samples:
            raise FastpieError(f"Expected {samples} `sample_ids`, but got {len(ids)}.")
        return cls(
            first,
            second,
            levels,
            task,
            logits,
            None if labels is None else _labels(labels, samples, classes, task),
            ids,
            names,
            None if train_counts is None else _counts(train_counts, classes),
        )

    @classmethod
    def of_run(
        cls,
        run: MiningResult | str | os.PathLike[str],
        *,
        class_names: Sequence[str] | None = None,
        train_counts: Any = None,
    ) -> Predictions:
        """Of a run, of one model or of several, that kept its logits.

        Args:
            run: a run of a classifier, or its folder.
            class_names: see the class.
            train_counts: see the class.

        Raises:
            FastpieError: for a run of another task, or without logits.
        """
        run = run if isinstance(run, MiningResult) else MiningResult(run)
        config = run.record["config"]
        if config["task"] not in _TASKS:
            raise FastpieError(
                f"Expected a run of a classifier, but its task is {config['task']!r}."
            )
        ids = run.table.column("sample_id")
        dense, pruned = [], []
        for model in run.members or [run]:
            # A model can have scored samples that another could not.
            rows = pc.index_in(ids, model.table.column("sample_id")).to_numpy()
            of_dense, of_pruned = model.logits()
            dense.append(of_dense[rows])
            pruned.append(of_pruned[:, rows])
        labels = None
        if "label" in run.table.column_names:
            column = run.table.column("label").combine_chunks()
            labels = (
                column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1)
                if config["task"] == "multilabel"
                else column.to_numpy(zero_copy_only=False)
            )
        return cls.of_arrays(
            np.stack(dense),
            np.stack(pruned),
            config["sparsities"],
            task=config["task"],
            labels=labels,
            sample_ids=ids.to_pylist(),
            class_names=class_names,
            train_counts=train_counts,
            logits=True,
        )

    @property
    def models(self) -> int:
        """S."""
        return int(self.dense.shape[0])

    @property
    def samples(self) -> int:
        """N."""
        return int(self.dense.shape[1])

    @property
    def classes(self) -> int:
        """C."""
        return int(self.dense.shape[2])

    def level(self, sparsity: float | None = None) -> int:
        """The place of a level in `sparsities`; None: of the highest.

        Raises:
            FastpieError: if there is no such level (within 1e-9).
        """
        if sparsity is None:
            return len(self.sparsities) - 1
        for place, value in enumerate(self.sparsities):
            if abs(value - sparsity) <= 1e-9:
                return place
        raise FastpieError(
            f"Expected `sparsity` to be one of {self.sparsities}, but got {sparsity}."
        )

    def probabilities(self, level: int | None = None) -> np.ndarray:  # fp64 [S, N, C]
        """Of the dense models (None) or of the pruned ones at the level at a place."""
        values = self.dense if level is None else self.pruned[:, level]
        if not self.logits:
            exact: np.ndarray = values.astype(np.float64, copy=False)
            return exact
        tensor = torch.from_numpy(np.ascontiguousarray(values)).double()
        tensor = tensor.sigmoid() if self.task == "multilabel" else tensor.softmax(-1)
        result: np.ndarray = tensor.numpy()
        return result

    def positives(self) -> np.ndarray:  # fp32 [N, C] of 1, 0, NaN
        """The labels as one column a class, whatever the task.

        Raises:
            FastpieError: without labels.
        """
        if self.labels is None:
            raise FastpieError("Expected predictions with labels, but these have none.")
        if self.task == "multilabel":
            return self.labels
        one_hot: np.ndarray = (self.labels[:, None] == np.arange(self.classes)).astype(np.float32)
        one_hot[self.labels < 0] = np.nan
        return one_hot


def _floats(name: str, value: Any) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype not in (np.float32, np.float64):
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise FastpieError(f"Expected `{name}` to hold numbers, but got {array.dtype}.")
        array = array.astype(np.float64)
    return array


def _labels(labels: Any, samples: int, classes: int, task: str) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    array = np.asarray(array)
    expected = (samples,) if task == "multiclass" else (samples, classes)
    if array.shape != expected:
        raise FastpieError(
            f"Expected {task} `labels` of shape {list(expected)}, but got {list(array.shape)}."
        )
    values = array.astype(np.float64)
    if task == "multiclass":
        values = np.where(np.isnan(values), -1, values)
        good = (values >= -1) & (values < classes) & (values == np.floor(values))
        wanted = f"class indices in [0, {classes}), or -1 for unknown"
        result = np.where(good, values, -1).astype(np.int64)
    else:
        good = np.isnan(values) | (values == 0) | (values == 1)
        wanted = "1, 0 or NaN (unknown)"
        result = values.astype(np.float32)
    if not good.all():
        raise FastpieError(
            f"Expected {task} `labels` of {wanted}, but got {values[~good].flat[0]:g}."
        )
    return result


def _counts(counts: Any, classes: int) -> np.ndarray:
    array = np.asarray(counts)
    if array.shape != (classes,) or not (array >= 0).all():
        raise FastpieError(
            f"Expected `train_counts` of {classes} numbers of at least 0, but got {counts!r}."
        )
    result: np.ndarray = array.astype(np.int64)
    return result
