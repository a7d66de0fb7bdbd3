"""*Label in doubt*: how likely a label is wrong, from the best margin at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.analysis.neighbours import known_labels, run_features
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.probe import probe_margins
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["Doubt", "label_in_doubt", "label_margins"]

# What a table of a training has the means over epochs in: fastpie.mining.Recorder's name, and others'.
_EPOCH_COLUMNS = ("margin_dense_mean", "margin_mean", "aum")
_EPOCH_LOSS = "loss_dense_mean"
_COMMITTEE = "margin_committee"


@dataclass(frozen=True, eq=False)
class Doubt:
    """Which labels to look at again.

    Attributes:
        samples: one row a sample, in the order of the score table: `sample_id`, `label_in_doubt` (in
            (0, 1], its rank among the samples, higher = more doubtful), `doubtful_class` (its name; of
            several labels the one most in doubt) and `label_margin` (the label's margin, of several
            labels the lowest; or the loss, negated). Null where the run cannot tell.
        formula: in words.
        out_of_sample: whether the margins come from models that have not seen the label.
    """

    samples: pa.Table
    formula: str
    out_of_sample: bool


def label_in_doubt(
    run: MiningResult | str | os.PathLike[str] | pa.Table,
    *,
    predictions: Predictions | None = None,
    features: Any = None,  # [N, D]
    committee: Any = None,  # [N], multilabel also [N, C]
    epochs: pa.Table | None = None,
    out_of_sample: Any = None,  # [N, C] probabilities, Predictions or a score table
) -> Doubt:
    """Rank the labels by how little speaks for them, by the best margin at hand.

    In this order: *out of sample*, where such predictions are given; *the probe of all other samples*
    (`probe_margins`), where features are at hand; the mean margin over the *epochs* of the training;
    over a *committee* of copies with noise on their weights; over the dense model and its *levels*.
    benchmarks/quality measures them: the probe in features of early stages finds wrong labels from one
    checkpoint at least as well as five trainings out of sample. A model that has memorised its labels
    gives wrong ones a margin too, and puts them right in its last features, so those of early stages
    are wanted: `fastpie.dual.stage_features`.

    Multilabel: margins are taken of each class, those of outputs of the dense model alone, and a sample
    has the lowest of them; `predictions` come before a table of epochs. Without them the loss, over
    epochs or of the dense model, takes the place of the margin (it tells wrong labels better than a
    multilabel score table's margin, lowest positive minus highest negative), and there is no
    `doubtful_class`.

    Args:
        run: a run with labels, its folder, or its score table. Of a run, `features` and, for
            multilabel, `predictions` are taken where it kept them and they are not given.
        predictions: with logits or probabilities and labels of the same samples.
        features: in the order of the table.
        committee: mean label margin over copies with noise on their weights; by default, of single
            labels, the column `margin_committee` where the table has one.
        epochs: table of a `fastpie.mining.Recorder`, or for single labels another with `sample_id`
            and `margin_mean` or `aum`.
        out_of_sample: of models that were trained without the sample: probabilities in the order of
            the table; or `Predictions` or a score table, joined by sample_id, see
            `fastpie.analysis.folds`.

    Raises:
        FastpieError: without labels, or for arrays that do not fit the table.
    """
    stats = load_extra("scipy.stats", "analysis", "ranks")
    if not isinstance(run, pa.Table):
        run = run if isinstance(run, MiningResult) else MiningResult(run)
        config = run.record["config"]
        if features is None and config["keep_features"]:
            features = run_features(run)
        if predictions is None and config["keep_logits"] and config["task"] == "multilabel":
            predictions = Predictions.of_run(run)
        run = run.table
    task, labels = _labels(run)
    if predictions is not None and predictions.samples != len(run):
        raise FastpieError(
            f"Expected `predictions` of the {len(run)} samples of the table, but got "
            f"{predictions.samples}."
        )
    margins, source = _margins(
        run, task, labels, predictions, features, committee, epochs, out_of_sample
    )
    lowest, classes = _lowest(margins, labels)
    known = ~np.isnan(lowest)
    ranks = np.full(len(lowest), np.nan)
    ranks[known] = stats.rankdata(-lowest[known]) / max(1, known.sum())
    names = None if predictions is None else predictions.class_names
    samples = pa.table(
        {
            "sample_id": run.column("sample_id"),
            "label_in_doubt": pa.array(ranks, from_pandas=True),
            "doubtful_class": _names(classes, names),
            "label_margin": pa.array(lowest, from_pandas=True),
        }
    )
    return Doubt(samples, f"rank of: {source}", out_of_sample is not None)


def label_margins(
    outputs: Any,  # [..., N, C]
    labels: Any,  # multiclass: integers [N], below 0 unknown; multilabel: [N, C] of 1, 0, NaN
    *,
    task: str = "multiclass",
) -> np.ndarray:  # fp64 [..., N]; multilabel [..., N, C]
    """How far outputs speak for the labels: low or negative for those in doubt.

    Multiclass: the label's output minus the largest other. Multilabel: the output, or 0 minus it
    where the label is 0; of probabilities shift by .5 first.

    Args:
        outputs: logits or, for multiclass, probabilities.
        labels: of the samples.
        task: "multiclass" or "multilabel".

    Returns:
        NaN for an unknown label, a row with NaN, or a single class; -inf for a logit of -inf.

    Raises:
        FastpieError: for shapes or classes that do not fit.
    """
    known, columns = known_labels(labels, None, task)
    z = np.array(outputs, np.float64)
    fits = z.ndim >= 2 and z.shape[-2] == len(columns)
    fits = fits and (task == "multiclass" or z.shape[-1] == columns.shape[1])
    if not fits or (task == "multiclass" and columns.max(initial=0) >= z.shape[-1]):
        raise FastpieError(
            f"Expected `outputs` of shape [..., {len(columns)}, C] with the classes of the labels, but "
            f"got {list(z.shape)}."
        )
    if task == "multilabel":
        return np.where(known, (2 * columns - 1) * z, np.nan)
    at = np.where(known, columns, 0).astype(np.int64).reshape((1,) * (z.ndim - 2) + (-1, 1))
    own = np.take_along_axis(z, at, -1)[..., 0]
    np.put_along_axis(z, at, -np.inf, -1)
    with np.errstate(invalid="ignore"):
        margins = own - z.max(-1, initial=-np.inf)  # NaN goes through
    return np.where(known[:, 0] & (margins < np.inf), margins, np.nan)


def _labels(table: pa.Table) -> tuple[str, np.ndarray]:
    """The task and the labels of a score table: int64 [N], or fp32 [N, C] with NaN."""
    missing = [
        name for name in ("label", "margin_dense", "loss_dense") if name not in table.column_names
    ]
    if missing:
        raise FastpieError(
            f"Expected the score table of a classifier with labels, but it has no columns {missing}."
        )
    column = table.column("label")
    if not pa.types.is_fixed_size_list(column.type):
        return "multiclass", column.fill_null(-1).to_numpy()
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return "multilabel", flat.reshape(len(table), -1)


def _margins(
    table: pa.Table,
    task: str,
    labels: np.ndarray,
    predictions: Predictions | None,
    features: Any,
    committee: Any,
    epochs: pa.Table | None,
    out_of_sample: Any,
) -> tuple[np.ndarray, str]:
    """The best margins at hand, [N] or [N, C], and what their negation is, in words."""
    ids = table.column("sample_id")
    single = task == "multiclass"
    what = "negated label margin, " if single else "loss, "
    if out_of_sample is not None:
        return _out_of_sample(
            out_of_sample, ids, labels, task
        ), "negated label margin, out of sample"
    if features is not None:
        if len(features) != len(ids):
            raise FastpieError(
                f"Expected `features` of the {len(ids)} samples of the table, but got {len(features)}."
            )
        margins = probe_margins(features, labels, _classes(labels, predictions))
        return margins, "negated label margin of a probe by all other samples"
    if epochs is not None and (single or (predictions is None and committee is None)):
        for name in _EPOCH_COLUMNS if single else (_EPOCH_LOSS,):
            if name in epochs.column_names:
                values = _joined(epochs, name, ids)
                return (values if single else -values), what + "mean over the epochs"
        raise FastpieError(
            f"Expected `epochs` to have one of the columns {_EPOCH_COLUMNS}, for several labels "
            f"{_EPOCH_LOSS}, but got {epochs.column_names}."
        )
    if committee is None and single and _COMMITTEE in table.column_names:
        committee = _column(table, _COMMITTEE)
    if committee is not None:
        margins = np.asarray(committee, np.float64)
        if margins.shape not in ((len(ids),), labels.shape):
            raise FastpieError(
                f"Expected `committee` of shape {list(labels.shape)}, but got {list(margins.shape)}."
            )
        return margins, "negated label margin, mean over a committee"
    if not single and predictions is not None:
        margins = _mean_margins([predictions.dense], labels, task, predictions.logits)
        return margins, "negated label margin of the dense model"
    of_what = "mean over the dense model and its levels" if single else "of the dense model"
    return _of_table(table, task), what + of_what


def _classes(labels: np.ndarray, predictions: Predictions | None) -> int:
    if labels.ndim == 2:
        return int(labels.shape[1])
    return int(labels.max(initial=-1)) + 1 if predictions is None else predictions.classes


def _out_of_sample(given: Any, ids: pa.ChunkedArray, labels: np.ndarray, task: str) -> np.ndarray:
    if isinstance(given, pa.Table):
        given = _rows_of(given, given.column("sample_id"), ids)
        return _of_table(given, task)
    if isinstance(given, Predictions):
        if given.sample_ids is None or given.task != task:
            raise FastpieError(
                f"Expected `out_of_sample` predictions with sample_ids for {task}, but got "
                f"{given.task} {'with' if given.sample_ids else 'without'} them."
            )
        place = pc.index_in(ids, pa.array(given.sample_ids)).to_numpy(zero_copy_only=False)
        known = ~np.isnan(place)
        margins = np.full(labels.shape, np.nan)
        rows = place[known].astype(np.int64)
        outputs = [given.dense[:, rows]]
        if task == "multiclass":
            outputs += list(given.pruned[:, :, rows].swapaxes(0, 1))
        margins[known] = _mean_margins(outputs, labels[known], task, given.logits)
        return margins
    values = np.asarray(given, np.float64)
    if values.ndim != 2 or len(values) != len(ids):
        raise FastpieError(
            f"Expected `out_of_sample` of shape [{len(ids)}, C], but got {list(values.shape)}."
        )
    return _mean_margins([values[None]], labels, task, logits=False)


def _mean_margins(
    outputs: Sequence[np.ndarray],  # each [S, N, C]
    labels: np.ndarray,
    task: str,
    logits: bool,
) -> np.ndarray:
    shift = 0.0 if logits or task == "multiclass" else 0.5
    total: np.ndarray = sum(label_margins(o - shift, labels, task=task).mean(0) for o in outputs)
    return total / len(outputs)


def _of_table(table: pa.Table, task: str) -> np.ndarray:
    if task == "multilabel":
        return -_column(table, "loss_dense")
    levels = [n for n in table.column_names if n.startswith("margin_pruned@")]
    names = ["margin_dense", *(levels or ["margin_pruned"])]
    there = [_column(table, name) for name in names if name in table.column_names]
    mean: np.ndarray = np.mean(there, axis=0)
    return mean


def _column(table: pa.Table, name: str) -> np.ndarray:  # null -> NaN
    column = table.column(name).cast(pa.float64())
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    return values


def _joined(table: pa.Table, name: str, ids: pa.ChunkedArray) -> np.ndarray:
    return _column(
        _rows_of(table.select(["sample_id", name]), table.column("sample_id"), ids), name
    )


def _rows_of(table: pa.Table, of: pa.ChunkedArray, ids: pa.ChunkedArray) -> pa.Table:
    """Rows by sample_id; of nulls where there is none."""
    return table.take(pc.index_in(ids, of))


def _lowest(margins: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest margin of each sample [N], NaN where none is known, and whose it is [N], -1 unknown."""
    if margins.ndim == 1:
        of_labels = np.full(len(margins), -1) if labels.ndim == 2 else labels
        return margins, np.where(np.isnan(margins), -1, of_labels)
    filled = np.where(np.isnan(margins), np.inf, margins)
    which = filled.argmin(1)
    lowest = filled[np.arange(len(filled)), which]
    none = np.isinf(lowest)
    return np.where(none, np.nan, lowest), np.where(none, -1, which)


def _names(classes: np.ndarray, names: Sequence[str] | None) -> pa.Array:
    return pa.array(
        [None if c < 0 else str(c) if names is None else names[c] for c in classes.tolist()],
        pa.string(),
    )
