"""*Label in doubt*: how likely a label is wrong, from margins and from neighbours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.analysis.neighbours import known_labels, label_conflict, run_features
from fastpie.analysis.predictions import Predictions
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["Doubt", "label_in_doubt", "label_margins", "rank_mean"]

# How often each counts in the mean of the ranks. Small residual networks that have memorised digits of
# which 10 % are labelled wrong, 2 to 3 seeds, AUROC for those, conflict twice / once beside the margin
# over levels: in the last feature map .977 / .964, on a cluttered canvas .925 / .904; in pooled features
# .956 / .948, .828 / .834; one to three labels an image, pooled, beside the dense margin .977 / .981.
_CONFLICT_COUNTS, _MARGIN_COUNTS = 2, 1
# What a table of a training has the means over epochs in: fastpie.mining.Recorder's name, and others'.
_EPOCH_COLUMNS = ("margin_dense_mean", "margin_mean", "aum")
_EPOCH_LOSS = "loss_dense_mean"
_COMMITTEE = "margin_committee"


@dataclass(frozen=True, eq=False)
class Doubt:
    """Which labels to look at again.

    Attributes:
        samples: one row a sample, in the order of the score table: `sample_id`, `label_in_doubt` (in
            (0, 1], higher = more doubtful), `doubtful_class` (its name; of several labels the one
            most in doubt), and what it is made of: `doubt_margin` (the negated margin, or the loss)
            and `doubt_neighbours` (`label_conflict`), of several labels the highest. Null where the
            run cannot tell.
        formula: in words.
        out_of_sample: whether the margins are those of models that have not seen the label.
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
    k: int = 5,
    metric: str = "cosine",
) -> Doubt:
    """Score how doubtful each label is, from what there is.

    Two views, each ranked over the samples, and the mean of the ranks, the second counted twice:

    - *the margin*, of the best kind at hand: out of sample; else the mean over the epochs of the
      training; else the mean over a committee of perturbed copies; else the mean over the dense model
      and its levels;
    - *the neighbours*, where features are at hand: `label_conflict`.

    A model that has memorised its labels gives wrong ones a margin too. What still tells there is how
    its features lie, best in the last feature map *before* the global pooling, or a block earlier, not
    in the pooled vector: mine with `features=` that module. Where an image shows several things in
    several places (multilabel) the pooled vector was better (AUROC .96 against .89).

    Multilabel: both views are taken of each class and ranked together, and a sample has the largest
    doubt of its classes; the margins are those of the dense model alone, which told wrong labels better
    than the levels (AUROC .97 against .96). They need `predictions`, which come before a table of
    epochs. Without, the loss joins the ranks of the samples, over epochs or of the dense model: it
    told them better than the margin in a multilabel score table, lowest positive minus highest
    negative (.97 against .85).

    Args:
        run: a run with labels, its folder, or its score table. Of a run, `features` and, for
            multilabel, `predictions` are taken where it kept them and they are not given.
        predictions: with logits or probabilities and labels of the same samples.
        features: in the order of the table; see `label_conflict`.
        committee: mean label margin over copies with perturbed weights; by default, of single labels,
            the column `margin_committee` where the table has one.
        epochs: table of a `fastpie.mining.Recorder`, or for single labels another with `sample_id`
            and `margin_mean` or `aum`.
        out_of_sample: of models that were trained without the sample: probabilities in the order of
            the table; or `Predictions` or a score table, joined by sample_id, see
            `fastpie.analysis.folds`.
        k: neighbours of `label_conflict`.
        metric: of the neighbours.

    Raises:
        FastpieError: without labels, or for arrays that do not fit the table.
    """
    load_extra("scipy.stats", "analysis", "ranks")  # before the search, which can take long
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
    margins, source = _margins(run, task, labels, predictions, committee, epochs, out_of_sample)
    views = [(_MARGIN_COUNTS, -margins)]
    formula = f"rank of: {source}"
    conflict = np.full(len(run), np.nan)
    if features is not None:
        conflict = label_conflict(features, labels, k, metric=metric, task=task)
        views.append((_CONFLICT_COUNTS, conflict))
        formula = (
            f"mean of the ranks of: {source}; label_conflict of {k} and {k} neighbours ({metric}), "
            f"counted {_CONFLICT_COUNTS} times"
        )
    score, classes = _combined(views, labels)
    names = None if predictions is None else predictions.class_names
    samples = pa.table(
        {
            "sample_id": run.column("sample_id"),
            "label_in_doubt": pa.array(score, from_pandas=True),
            "doubtful_class": _names(classes, names),
            "doubt_margin": pa.array(_worst(-margins)[0], from_pandas=True),
            "doubt_neighbours": pa.array(_worst(conflict)[0], from_pandas=True),
        }
    )
    return Doubt(samples, formula, out_of_sample is not None)


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


def rank_mean(views: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """Mean of ranks, weighted; higher = more doubtful in most views.

    Args:
        views: weights and arrays of one shape, higher = more doubtful.

    Returns:
        Of that shape, in (0, 1]: ranks as fractions of what is not NaN, average ranks for ties; where
        a view has NaN the mean over the others; NaN where all have.
    """
    stats = load_extra("scipy.stats", "analysis", "ranks")
    ranks = []
    for _, values in views:
        there = ~np.isnan(values)
        of_view = np.full(values.shape, np.nan)
        of_view[there] = stats.rankdata(values[there]) / max(1, there.sum())
        ranks.append(of_view)
    stacked = np.stack(ranks)
    weights = np.array([w for w, _ in views]).reshape(-1, *(1,) * (stacked.ndim - 1))
    weights = weights * ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.nansum(stacked * weights, 0) / weights.sum(0)
    return mean


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


def _combined(
    views: Sequence[tuple[float, np.ndarray]], labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score [N] and the class most in doubt [N], -1 for none."""
    by_class = [view for view in views if view[1].ndim == 2]
    by_sample = [view for view in views if view[1].ndim == 1]
    if labels.ndim == 1:
        score = rank_mean(views)
        return score, np.where(np.isnan(score), -1, labels)
    classes = np.full(len(labels), -1)
    if by_class:
        worst, classes = _worst(rank_mean(by_class))
        by_sample.append((sum(weight for weight, _ in by_class), worst))
    return rank_mean(by_sample), classes


def _worst(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest of the classes [N] and which it is; NaN and -1 where there is none."""
    if values.ndim == 1:
        return values, np.full(len(values), -1)
    filled = np.where(np.isnan(values), -np.inf, values)
    which = filled.argmax(1)
    worst = filled[np.arange(len(values)), which]
    none = worst == -np.inf
    return np.where(none, np.nan, worst), np.where(none, -1, which)


def _names(classes: np.ndarray, names: Sequence[str] | None) -> pa.Array:
    return pa.array(
        [None if c < 0 else str(c) if names is None else names[c] for c in classes.tolist()],
        pa.string(),
    )
