"""Out of sample: several runs of one data set, each of a model trained without one fold, as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.analysis.predictions import Predictions
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["fold_predictions", "fold_table"]

_Runs = Sequence[MiningResult | str | os.PathLike[str]]


def fold_table(runs: _Runs, folds: Mapping[str, int]) -> pa.Table:
    """The score table in which each sample's row is that of the model trained without it.

    Its margins, losses and hardness are out of sample. They are of several models, so its scores
    compare samples of different folds no better than the models are alike.

    Args:
        runs: one a fold, in the order of the folds; each scored at least its fold.
        folds: fold of each sample by sample_id, from 0. Samples without one are left out.

    Returns:
        Rows in sample_id order, with the columns that all runs have. A sample that its run could not
        score is not in it.

    Raises:
        FastpieError: for a fold without a run.
    """
    parts = []
    for run, rows in _of_folds(runs, folds):
        parts.append(run.table.take(rows))
    columns = [n for n in parts[0].column_names if all(n in p.column_names for p in parts)]
    return pa.concat_tables([p.select(columns) for p in parts]).sort_by("sample_id")


def fold_predictions(
    runs: _Runs, folds: Mapping[str, int], *, class_names: Sequence[str] | None = None
) -> Predictions:
    """The predictions for each sample of the model trained without it.

    Args:
        runs: see `fold_table`; of one model each, or of as many each, with their logits kept.
        folds: see `fold_table`.
        class_names: see `Predictions`.

    Returns:
        Of the rows of `fold_table`, in its order.

    Raises:
        FastpieError: for a fold without a run, runs without logits, or runs that differ in task,
            levels, classes or number of models.
    """
    parts = []
    for run, rows in _of_folds(runs, folds):
        predictions = Predictions.of_run(run, class_names=class_names)
        parts.append((predictions, rows))
    first = parts[0][0]
    for other, _ in parts[1:]:
        for what in ("task", "sparsities", "models", "classes"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise FastpieError(
                    f"Expected runs with the same {what}, but got {mine!r} and {theirs!r}."
                )
    ids = [p.sample_ids[i] for p, rows in parts if p.sample_ids is not None for i in rows]
    order = np.argsort(np.array(ids, dtype=object), kind="stable")
    labels: Any = None
    if all(p.labels is not None for p, _ in parts):
        labels = np.concatenate([p.labels[rows] for p, rows in parts if p.labels is not None])
        labels = labels[order]
    return Predictions.of_arrays(
        np.concatenate([p.dense[:, rows] for p, rows in parts], 1)[:, order],
        np.concatenate([p.pruned[:, :, rows] for p, rows in parts], 2)[:, :, order],
        first.sparsities,
        task=first.task,
        labels=labels,
        sample_ids=[ids[i] for i in order],
        class_names=class_names,
        logits=True,
    )


def _of_folds(runs: _Runs, folds: Mapping[str, int]) -> list[tuple[MiningResult, np.ndarray]]:
    """Each run and the rows of its table that are of its fold."""
    opened = [run if isinstance(run, MiningResult) else MiningResult(run) for run in runs]
    wrong = sorted(set(folds.values()) - set(range(len(opened))))
    if not opened or wrong:
        raise FastpieError(
            f"Expected folds in [0, {len(opened)}), the number of runs, but got {wrong or 'no run'}."
        )
    ids = pa.array(list(folds))
    fold_of = pa.array(list(folds.values()), pa.int64())
    result = []
    for number, run in enumerate(opened):
        of_rows = fold_of.take(pc.index_in(run.table.column("sample_id"), ids).combine_chunks())
        mine = pc.fill_null(pc.equal(of_rows, number), False)
        result.append((run, np.flatnonzero(mine.to_numpy(zero_copy_only=False))))
    return result
