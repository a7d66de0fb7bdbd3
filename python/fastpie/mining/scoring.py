"""From the outputs of a dual forward to the columns of the score table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastpie import ops
from fastpie.dual.output import DualOutput, entry_of, outline_of
from fastpie.errors import FastpieError
from fastpie.mining.reading import Problem
from fastpie.ops.disagreement import SCORES
from fastpie.scores import disagreement

__all__ = ["DENSE", "Scorer", "level_column", "parse_labels"]

DENSE = "dense"
"""As `keep_features`: those of the dense model alone."""

_OF_DENSE = ("margin_dense", "loss_dense")  # the same at every level
_WITH_LABELS = ("loss_dense", "loss_pruned", "damage")


@dataclass(frozen=True)
class Scorer:
    """Scores batches and names the columns that they go into.

    On a ladder each score of the pruned model has one column a level (`js@0.3`) and one without a
    level: the mean over the levels, for `flip` whether any level flips; `first_flip` is the lowest
    level that does (null where none).

    Attributes:
        task: as in `fastpie.disagreement`.
        sparsities: levels of the masks.
        is_ladder: whether outputs carry a level dimension.
        labelled: whether the samples have labels.
        output: key or index of the logits in a dict or tuple output, or None.
        keep_logits: whether to return the logits.
        keep_features: whether to return the features; "dense": of the dense model alone.
    """

    task: str
    sparsities: Sequence[float]
    is_ladder: bool
    labelled: bool
    output: str | int | None = None
    keep_logits: bool = False
    keep_features: bool | str = False

    @property
    def hardness(self) -> str:
        """The formula of the column `hardness` (higher = harder)."""
        over = f", mean over the levels {list(self.sparsities)}" if self.is_ladder else ""
        if self.task == "segmentation":
            return "1 - iou_soft" + over
        if self.task == "embedding":
            return "drift" + over
        return ("loss_pruned" if self.labelled else "js") + over

    def score(
        self,
        out: DualOutput,
        labels: Any,
        positions: Sequence[int],
        slots: Sequence[int],
        copies: Any = None,
    ) -> tuple[list[int], dict[str, pa.Array], list[Problem], dict[str, Any]]:
        """Scores of the slots of one batch.

        Args:
            out: both models' outputs.
            labels: as collated, or None.
            positions: of the samples, for the problems.
            slots: where the samples lie in the batch.
            copies: outputs of the committee, in the structure of the dense model's; None without one.

        Returns:
            The indices into `positions` that are scored, their columns, the problems of the others
            (a label that cannot be, outputs that are not finite), and the kept tensors (`logits`,
            `features`: pairs of fp32 arrays [n, ...] and [n, L, ...]).
        """
        index = torch.as_tensor(slots)
        dense, pruned = entry_of(out.dense, self.output), entry_of(out.pruned, self.output)
        if not self.is_ladder:
            pruned = pruned.unsqueeze(0)
        self._check_shapes(dense, pruned)
        problems: list[Problem] = []
        good = torch.ones(len(slots), dtype=torch.bool)

        targets = None
        if self.labelled:
            targets, wrong = parse_labels(labels, dense.shape[0], dense.shape[1], self.task)
            for row, slot in enumerate(slots):
                if slot in wrong:
                    good[row] = False
                    problems.append(Problem(positions[row], "label", wrong[slot]))
        scores = None
        if self.task in ("segmentation", "embedding"):
            scores = disagreement(dense, pruned, task=self.task)
            # These scores are NaN for nothing else: the outputs need not be read again.
            unusable = torch.stack(list(scores.values())).isnan().flatten(0, 1).any(0)
        else:
            unusable = self._unusable(dense) | self._unusable(pruned).any(0)
        for row in (unusable.cpu()[index] & good).nonzero().flatten().tolist():
            good[row] = False
            problems.append(
                Problem(
                    positions[row],
                    "score",
                    "Expected outputs that are numbers, but got NaN or inf.",
                )
            )

        keep = good.nonzero().flatten()
        columns = self._columns(dense, pruned, targets, index[keep], scores)
        if copies is not None:
            columns.update(
                self._of_committee(dense, entry_of(copies, self.output), targets, index[keep])
            )
        if targets is not None:
            columns = {"label": _label_column(targets[index[keep]], self.task), **columns}
        kept: dict[str, Any] = {}
        if self.keep_logits:
            kept["logits"] = _pair(dense, pruned, index[keep])
        if out.features is not None:
            of_dense, of_pruned = _features(out, self.is_ladder)
            drift = disagreement(of_dense, of_pruned, task="embedding")["drift"].float().cpu()
            self._per_level(columns, "feature_drift", drift.numpy()[:, index[keep].numpy()])
            if self.keep_features:
                if self.keep_features == DENSE:
                    of_pruned = of_pruned[:0]
                kept["features"] = _pair(of_dense, of_pruned, index[keep])
        return keep.tolist(), columns, problems, kept

    def _unusable(self, logits: Tensor) -> Tensor:
        """Rows for which `fastpie.disagreement` gives NaN: -inf is a class of probability zero."""
        bad = (logits.isnan() | (logits == torch.inf)).any(-1)
        return bad | (logits == -torch.inf).all(-1) if self.task == "multiclass" else bad

    def _check_shapes(self, dense: Tensor, pruned: Tensor) -> None:
        expected = {"segmentation": "[N, C, H, ...]"}.get(self.task, "[N, C]")
        if dense.ndim < 3 if self.task == "segmentation" else dense.ndim != 2:
            raise FastpieError(
                f"Expected outputs of shape {expected} for task {self.task!r}, but got "
                f"{list(dense.shape)}."
            )
        if pruned.shape != (len(self.sparsities), *dense.shape):
            raise FastpieError(
                f"Expected outputs of the pruned model of shape "
                f"{[len(self.sparsities), *dense.shape]}, but got {list(pruned.shape)}."
            )

    def _columns(
        self,
        dense: Tensor,
        pruned: Tensor,
        targets: Tensor | None,
        rows: Tensor,
        given: dict[str, Tensor] | None,
    ) -> dict[str, Any]:
        """Every column but the label, as arrays over `rows`; `given` are scores of outputs."""
        columns: dict[str, Any] = {}
        if given is not None:
            scores = {
                name: value.float().cpu().numpy()[:, rows.numpy()] for name, value in given.items()
            }
            hard = scores["drift"] if self.task == "embedding" else 1 - scores["iou_soft"]
        else:
            if targets is not None:
                targets = targets.to(dense.device)
            packed = ops.disagreement(dense, pruned, targets, self.task)
            values = packed.float().cpu().numpy()[:, :, rows.numpy()]  # one copy off the device
            scores = dict(zip(SCORES, values, strict=True))
            if targets is None:
                for name in _WITH_LABELS:
                    del scores[name]
            hard = scores["js"] if targets is None else scores["loss_pruned"]
        columns["hardness"] = _mean(hard)
        if self.task == "multiclass":
            columns["prediction_dense"] = dense.argmax(1).cpu().numpy()[rows.numpy()]
            predictions = pruned.argmax(2).cpu().numpy()[:, rows.numpy()]
            for name, prediction in zip(self._names("prediction_pruned"), predictions, strict=True):
                columns[name] = prediction
        for name, score in scores.items():
            if name in _OF_DENSE:
                columns[name] = score[0]
            elif name == "flip":
                self._flip(columns, score > 0)
            else:
                self._per_level(columns, name, score)
        return columns

    def _of_committee(
        self, dense: Tensor, copies: Tensor, targets: Tensor | None, rows: Tensor
    ) -> dict[str, np.ndarray]:
        """Means over the copies with noise on their weights, each against the dense model."""
        if self.task in ("segmentation", "embedding"):
            return {
                f"{name}_committee": _mean(value.float().cpu().numpy()[:, rows.numpy()])
                for name, value in disagreement(dense, copies, task=self.task).items()
            }
        if targets is not None:
            targets = targets.to(dense.device)
        packed = ops.disagreement(dense, copies, targets, self.task)
        values = packed.float().cpu().numpy()[:, :, rows.numpy()]
        scores = dict(zip(SCORES, values, strict=True))
        return {
            f"{name}_committee": _mean(scores[of])
            for name, of in (("margin", "margin_pruned"), ("js", "js"), ("flip", "flip"))
        }

    def _names(self, score: str) -> list[str]:
        return [level_column(score, s) for s in self.sparsities] if self.is_ladder else [score]

    def _per_level(self, columns: dict[str, Any], name: str, score: np.ndarray) -> None:
        if self.is_ladder:
            columns[name] = _mean(score)
        columns.update(zip(self._names(name), score, strict=True))

    def _flip(self, columns: dict[str, Any], flip: np.ndarray) -> None:  # [L, n] bool
        if self.is_ladder:
            columns["flip"] = flip.any(0)
            level = np.asarray(self.sparsities, dtype=np.float64)[flip.argmax(0)]
            columns["first_flip"] = pa.array(level, mask=~flip.any(0))
        columns.update(zip(self._names("flip"), flip, strict=True))


def level_column(score: str, sparsity: float) -> str:
    """Name of the column of one score at one level: "js@0.3"."""
    return f"{score}@{sparsity:.12g}"  # levels differ by more than 1e-9


def _mean(score: np.ndarray) -> np.ndarray:  # [L, n] -> [n]
    """Mean over the levels in fp64; NaN where any level is."""
    mean: np.ndarray = score.mean(0, dtype=np.float64).astype(np.float32)
    return mean


def _features(out: DualOutput, is_ladder: bool) -> tuple[Tensor, Tensor]:
    """Features as [N, D] and [L, N, D]."""
    assert out.features is not None
    dense, pruned = out.features
    if not isinstance(dense, Tensor) or dense.ndim < 2:
        raise FastpieError(f"Expected features of shape [N, ...], but got {outline_of(dense)}.")
    if not is_ladder:
        pruned = pruned.unsqueeze(0)
    return dense.as_subclass(Tensor).flatten(1), pruned.as_subclass(Tensor).flatten(2)


def _pair(dense: Tensor, pruned: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [n, D] and [n, L, D] of the chosen rows."""
    first = dense.flatten(1).float().cpu().numpy()[rows.numpy()]
    second = pruned.flatten(2).float().cpu().numpy()[:, rows.numpy()]
    return first, np.ascontiguousarray(second.swapaxes(0, 1))


def _label_column(targets: Tensor, task: str) -> pa.Array:
    if task == "multiclass":
        return pa.array(targets.numpy(), type=pa.int64())
    flat = pa.array(targets.numpy().reshape(-1), type=pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, targets.shape[1])


def parse_labels(labels: Any, rows: int, classes: int, task: str) -> tuple[Tensor, dict[int, str]]:
    """Labels as the operator takes them, and what is wrong with single ones, by slot.

    Raises:
        FastpieError: if the format of all of them is wrong.
    """
    if not isinstance(labels, Tensor):
        raise FastpieError(
            f"Expected labels that collate to a tensor, but got {type(labels).__name__}"
            + (f" of {type(labels[0]).__name__}." if isinstance(labels, list | tuple) else ".")
        )
    labels = labels.detach().as_subclass(Tensor).cpu()
    if task == "multilabel":
        if labels.shape != (rows, classes):
            raise FastpieError(
                f"Expected multilabel labels of shape [{rows}, {classes}] (samples, outputs of the "
                f"model), but got {list(labels.shape)}."
            )
        targets = labels.float()
        allowed = (targets == 0) | (targets == 1) | targets.isnan()
        wrong = {
            slot: f"Expected labels of 0, 1 or NaN, but got {targets[slot][~allowed[slot]][0]:g}."
            for slot in (~allowed).any(1).nonzero().flatten().tolist()
        }
        return torch.where(allowed, targets, torch.nan), wrong
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.shape[0] != rows:
        raise FastpieError(
            f"Expected multiclass labels of shape [{rows}] (class indices), but got "
            f"{list(labels.shape)}; for several labels an image use task='multilabel'."
        )
    values = labels.double()
    valid = (values >= 0) & (values < classes) & (values == values.floor())
    wrong = {
        slot: f"Expected a class index in [0, {classes}), but got {values[slot]:g}."
        for slot in (~valid).nonzero().flatten().tolist()
    }
    return torch.where(valid, values, 0).long(), wrong
