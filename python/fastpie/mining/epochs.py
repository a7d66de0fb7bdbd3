"""`EpochStatistics`: what single samples did over the epochs of a training, dense and pruned."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastpie import ops
from fastpie.errors import FastpieError
from fastpie.mining.scoring import level_column
from fastpie.ops.disagreement import SCORES
from fastpie.scores.disagreement import checked_labels

__all__ = ["EARLY_EPOCHS", "TASKS", "EpochStatistics"]

TASKS = ("multiclass", "multilabel")

EARLY_EPOCHS = range(10)
"""Epochs of EL2N: Paul et al. score within the first 10 to 20 of 200."""

# Sums over epochs, one row a level: the column, and the score of `fastpie.disagreement` behind it.
_OF_LEVELS = {
    "loss_pruned_mean": "loss_pruned",
    "margin_pruned_mean": "margin_pruned",
    "js_mean": "js",
    "flips": "flip",
}
_OF_DENSE = {"loss_dense_mean": "loss_dense", "margin_dense_mean": "margin_dense"}
_WITHOUT_LABELS = ("js_mean", "flips")


class EpochStatistics:
    """Running statistics of each of N samples over the epochs of a training, in O(N) memory.

    It takes logits from wherever they come: the dual forward of a `Recorder`, or the training step
    itself (then without levels, dense columns only). What it counts as an epoch of a sample is one
    `update` with that sample. fp64; scores are those of `fastpie.ops.disagreement`.

    Columns of `table` (y: the label, z: the logits, p: softmax, or sigmoid for multilabel):

    ====================  =========================================================================
    label                 as given; not there without labels
    epochs                how many the sample was scored in, at least 1
    hardness              mean over epochs of what `mine` calls hardness: the pruned loss, without
                          labels js, mean over the levels
    hardness_last         the same at the last epoch
    loss_dense_mean       mean over epochs of the cross-entropy, in nats
    loss_pruned_mean      of the pruned model: mean over levels, then over epochs; also one column a
                          level, `loss_pruned_mean@0.3`
    margin_dense_mean     mean over epochs of `z_y - max_{j != y} z_j`: AUM (Pleiss et al., 2020,
                          arXiv 2001.10528), low or negative for wrong labels
    margin_pruned_mean    of the pruned model, as above and by level
    confidence            mean over epochs of p_y (dataset cartography, Swayamdipta et al., 2020,
                          arXiv 2009.10795)
    variability           standard deviation of p_y over epochs (population; the same source)
    correctness           fraction of epochs in which the dense model is right (the same source)
    forgetting            how often it was right in one epoch and wrong in the next one scored
                          (Toneva et al., 2019, arXiv 1812.05159)
    never_learned         right in no epoch: there the source ranks these hardest of all
    el2n                  mean over the early epochs of `||p - onehot(y)||_2` (Paul et al., 2021,
                          arXiv 2107.07075, who average over runs at one epoch); null where no
                          early epoch was scored
    js_mean               mean over levels and epochs of js, in nats; also by level
    flips                 fraction of levels and epochs in which the prediction flips; also by level
    ====================  =========================================================================

    For multilabel loss and margin are those of `fastpie.disagreement` (mean over the known classes;
    lowest positive minus highest negative logit), p_y is the mean over the known classes of the
    probability given to their label, right means every known class on its label's side of .5, and
    EL2N's norm runs over the known classes. NaN labels are unknown: a sample with no known one has
    null in every column that needs a label.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        *,
        task: str = "multiclass",
        sparsities: Sequence[float] = (),
        is_ladder: bool = True,
        labelled: bool = True,
        el2n_epochs: Collection[int] = EARLY_EPOCHS,
    ) -> None:
        """Nothing seen yet.

        Args:
            samples: N.
            classes: C, the number of logits.
            task: "multiclass" or "multilabel".
            sparsities: the L levels of the pruned model; none for the dense model alone.
            is_ladder: whether the columns of single levels are given as well.
            labelled: whether updates bring labels; without them there are js and flips alone.
            el2n_epochs: the epochs that EL2N is averaged over.

        Raises:
            FastpieError: for a task without logits of classes, or neither labels nor levels.
        """
        if task not in TASKS:
            raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
        if not labelled and not sparsities:
            raise FastpieError("Expected labels or levels to score, but got neither.")
        self.samples = samples
        self.classes = classes
        self.task = task
        self.sparsities = [float(s) for s in sparsities]
        self.is_ladder = is_ladder
        self.labelled = labelled
        try:
            self.el2n_epochs = frozenset(operator.index(epoch) for epoch in el2n_epochs)
        except TypeError as error:
            raise FastpieError(
                f"Expected `el2n_epochs` to hold numbers of epochs, but got {el2n_epochs!r}."
            ) from error
        self._arrays: dict[str, np.ndarray] = {}  # the last dimension is N
        self._sums = {
            column: score
            for column, score in _OF_LEVELS.items()
            if sparsities and (labelled or column in _WITHOUT_LABELS)
        }
        for column in self._sums:
            self._arrays[column] = np.zeros((len(self.sparsities), samples))
        zeros: list[tuple[str, Any]] = [("epochs", np.int32)]
        if sparsities:
            zeros += [("hardness_last", np.float64)]
        if labelled:
            zeros += [(column, np.float64) for column in _OF_DENSE]
            zeros += [(name, np.float64) for name in ("confidence", "squares", "el2n")]
            zeros += [(name, np.int32) for name in ("right", "forgetting", "el2n_epochs")]
            zeros += [("was_right", np.bool_)]
            self._arrays["label"] = (
                np.zeros(samples, np.int64)
                if task == "multiclass"
                else np.full((classes, samples), np.nan, np.float32)
            )
        self._arrays.update((name, np.zeros(samples, dtype)) for name, dtype in zeros)

    @property
    def hardness(self) -> str:
        """The formula of the column `hardness` (higher = harder)."""
        over = f"the levels {self.sparsities} and the epochs" if self.is_ladder else "the epochs"
        return f"{'loss_pruned' if self.labelled else 'js'}, mean over {over}"

    def update(
        self,
        rows: Any,  # int [n]
        dense: Tensor,  # [n, C]
        pruned: Tensor | None = None,  # [L, n, C], or [n, C] for a single level
        labels: Tensor | None = None,  # multiclass: int [n]; multilabel: [n, C] of 1, 0, NaN
        *,
        epoch: int = 0,
    ) -> np.ndarray:  # bool [n]
        """Account one epoch of some samples.

        Args:
            rows: numbers of the samples, in [0, N), each once.
            dense: logits of the dense model.
            pruned: logits of the pruned model; None where there are no levels.
            labels: of these samples; None without labels.
            epoch: number of the epoch; EL2N asks whether it is an early one.

        Returns:
            Which of them counted: logits that `fastpie.disagreement` gives NaN for do not.

        Raises:
            FastpieError: for rows, shapes or labels that do not fit.
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._check(rows, dense, pruned, labels)
        if labels is not None:
            labels = checked_labels(labels, len(rows), self.classes, self.task).to(dense.device)
        if dense.dtype not in (torch.float32, torch.float64):
            dense, pruned = dense.float(), None if pruned is None else pruned.float()
        levels = dense.unsqueeze(0)
        if pruned is not None:
            levels = pruned.reshape(len(self.sparsities), *dense.shape)
        packed = ops.disagreement(dense.detach(), levels.detach(), labels, self.task)
        scores = dict(zip(SCORES, packed.double().cpu().numpy(), strict=True))
        usable: np.ndarray = ~np.isnan(scores["js"]).any(0)
        scores = {name: score[:, usable] for name, score in scores.items()}
        rows = rows[usable]
        with np.errstate(invalid="ignore"):  # inf - inf, of logits that are -inf
            self._add(rows, scores)
            if labels is not None:
                keep = torch.from_numpy(usable).to(dense.device)
                self._add_dense(rows, dense.detach()[keep].double(), labels[keep], epoch)
        return usable

    def _check(
        self, rows: np.ndarray, dense: Tensor, pruned: Tensor | None, labels: Tensor | None
    ) -> None:
        if rows.ndim != 1 or len(np.unique(rows)) < len(rows):
            raise FastpieError("Expected `rows` of shape [n], each once, but some occur twice.")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.samples):
            raise FastpieError(
                f"Expected `rows` in [0, {self.samples}), but got {rows.min()} to {rows.max()}."
            )
        if dense.shape != (len(rows), self.classes):
            raise FastpieError(
                f"Expected `dense` of shape [{len(rows)}, {self.classes}], but got "
                f"{list(dense.shape)}."
            )
        if (labels is not None) != self.labelled:
            raise FastpieError(
                f"Expected `labels` {'in every update' if self.labelled else 'to be None'}, but got "
                f"{'none' if labels is None else 'some'}."
            )
        levels = len(self.sparsities)
        wanted = [levels, *dense.shape] if levels else None
        found = None if pruned is None else list(pruned.shape)
        if found != wanted and not (levels == 1 and found == list(dense.shape)):
            raise FastpieError(
                f"Expected `pruned` {f'of shape {wanted}' if levels else 'to be None (no levels)'}, "
                f"but got {found}."
            )

    def _add(self, rows: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        """What needs no more than the scores [L, n]."""
        arrays = self._arrays
        arrays["epochs"][rows] += 1
        for column, score in self._sums.items():
            arrays[column][:, rows] += scores[score]
        if self.sparsities:
            hard = scores["loss_pruned" if self.labelled else "js"]
            arrays["hardness_last"][rows] = hard.mean(0)
        if self.labelled:
            for column, score in _OF_DENSE.items():
                arrays[column][rows] += scores[score][0]

    def _add_dense(self, rows: np.ndarray, dense: Tensor, labels: Tensor, epoch: int) -> None:
        """Probabilities of the labels, and whether the dense model is right."""
        arrays = self._arrays
        if self.task == "multiclass":
            p = dense.softmax(1)
            error = p - torch.nn.functional.one_hot(labels, self.classes)
            of_label = p.gather(1, labels.unsqueeze(1)).squeeze(1)
            right = dense.argmax(1) == labels
        else:
            known = ~labels.isnan()
            p = dense.sigmoid()
            error = torch.where(known, p - labels, 0)
            # 0 / 0 where nothing is known: NaN, and stays it.
            of_label = torch.where(known, 1 - error.abs(), 0).sum(1) / known.sum(1)
            right = (((dense > 0) == (labels == 1)) | ~known).all(1)
        # Welford (1962): one pass, without the cancellation of a sum of squares.
        value, mean = of_label.cpu().numpy(), arrays["confidence"][rows]
        new = mean + (value - mean) / arrays["epochs"][rows]
        arrays["squares"][rows] += (value - mean) * (value - new)
        arrays["confidence"][rows] = new
        is_right = right.cpu().numpy()
        arrays["forgetting"][rows] += arrays["was_right"][rows] & ~is_right
        arrays["was_right"][rows] = is_right
        arrays["right"][rows] += is_right
        if epoch in self.el2n_epochs:
            arrays["el2n"][rows] += torch.linalg.vector_norm(error, dim=1).cpu().numpy()
            arrays["el2n_epochs"][rows] += 1
        arrays["label"][..., rows] = labels.cpu().numpy().T

    # ------------------------------------------------------------------ the table

    def table(self, sample_ids: pa.Array | Sequence[str]) -> pa.Table:
        """One row for each sample that was scored, in the order of their numbers.

        Args:
            sample_ids: of all N samples.

        Returns:
            `sample_id` and the columns of the class; what cannot be told is null.
        """
        if len(sample_ids) != self.samples:
            raise FastpieError(f"Expected {self.samples} sample ids, but got {len(sample_ids)}.")
        rows = np.flatnonzero(self._arrays["epochs"])
        found = self.take(rows)
        epochs = found["epochs"]
        columns: dict[str, Any] = {}
        if self.labelled:
            columns["label"] = self._labels(found["label"])
        columns["epochs"] = epochs
        if self.sparsities:
            columns["hardness"] = None  # its place
            columns["hardness_last"] = found["hardness_last"]
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.labelled:
                columns["loss_dense_mean"] = found["loss_dense_mean"] / epochs
            self._by_level(columns, "loss_pruned_mean", found)
            if self.labelled:
                columns["margin_dense_mean"] = found["margin_dense_mean"] / epochs
            self._by_level(columns, "margin_pruned_mean", found)
            if self.labelled:
                columns.update(self._of_dense(found))
            self._by_level(columns, "js_mean", found)
            self._by_level(columns, "flips", found)
        if self.sparsities:
            columns["hardness"] = columns["loss_pruned_mean" if self.labelled else "js_mean"]
        arrays = {
            name: pa.array(value, from_pandas=True) if isinstance(value, np.ndarray) else value
            for name, value in columns.items()
        }
        if not isinstance(sample_ids, pa.Array):
            sample_ids = pa.array(sample_ids, pa.string())
        return pa.table({"sample_id": sample_ids.take(pa.array(rows)).cast(pa.string()), **arrays})

    def _by_level(self, columns: dict[str, Any], name: str, found: Mapping[str, Any]) -> None:
        if name not in found:
            return
        values = found[name] / found["epochs"]
        columns[name] = values.mean(0)
        if self.is_ladder:
            columns.update(
                (level_column(name, s), v) for s, v in zip(self.sparsities, values, strict=True)
            )

    def _of_dense(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        epochs, unlabelled = found["epochs"], np.isnan(found["confidence"])
        return {
            "confidence": found["confidence"],
            "variability": np.sqrt(found["squares"] / epochs),
            "correctness": pa.array(found["right"] / epochs, mask=unlabelled),
            "forgetting": pa.array(found["forgetting"], mask=unlabelled),
            "never_learned": pa.array(found["right"] == 0, mask=unlabelled),
            "el2n": pa.array(
                found["el2n"] / found["el2n_epochs"],
                mask=unlabelled | (found["el2n_epochs"] == 0),
            ),
        }

    def _labels(self, labels: np.ndarray) -> pa.Array:
        if self.task == "multiclass":
            return pa.array(labels)
        flat = pa.array(np.ascontiguousarray(labels.T).reshape(-1))  # NaN is a label: unknown
        return pa.FixedSizeListArray.from_arrays(flat, self.classes)

    # ------------------------------------------------------------------ state

    def copy(self) -> EpochStatistics:
        """The same, to go on with apart."""
        new = EpochStatistics.__new__(EpochStatistics)
        new.__dict__.update(self.__dict__)
        new._arrays = {name: array.copy() for name, array in self._arrays.items()}
        return new

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Everything known of some samples, for `put`."""
        return {name: array[..., rows] for name, array in self._arrays.items()}

    def put(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Replace what is known of some samples by what `take` gave elsewhere."""
        for name, array in self._arrays.items():
            array[..., rows] = values[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything known, as tensors that are copies."""
        return {name: torch.from_numpy(array.copy()) for name, array in self._arrays.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            FastpieError: if it is of other samples, classes, levels or labels.
        """
        mine = {name: (array.shape, array.dtype) for name, array in self._arrays.items()}
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        theirs = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        if mine != theirs:
            differing = sorted(
                name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
            )
            raise FastpieError(
                f"Expected the state of statistics of {self.samples} samples, {self.classes} classes "
                f"and {len(self.sparsities)} levels, but it differs in {differing}."
            )
        self._arrays = {name: array.copy() for name, array in arrays.items()}
