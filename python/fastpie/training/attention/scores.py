"""How hard each sample of a batch is, by name or by a function: higher = harder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpie import ops
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.scoring import parse_labels
from fastpie.ops.disagreement import SCORES
from fastpie.scores.disagreement import TASKS
from fastpie.training.attention.segmentation_loss import segmentation_loss
from fastpie.training.objectives.objective import entry_of

__all__ = ["RANDOM", "BatchScores", "Scoring", "per_sample", "takes_images", "unpacked"]

RANDOM = "random"

_LABEL_FREE = {
    "multiclass": ("js", "kl", "kl_reverse", "spearman", "flip", "drift"),
    "multilabel": ("js", "kl", "kl_reverse", "spearman", "flip", "drift"),
    "segmentation": ("iou", "iou_soft"),
    "embedding": ("drift",),
}
_LOSSES = ("loss_pruned", "loss_dense", "damage")
_LABELLED = {
    "multiclass": ("margin_pruned", "margin_dense", *_LOSSES),
    "multilabel": ("margin_pruned", "margin_dense", *_LOSSES),
    "segmentation": _LOSSES,
    "embedding": (),
}
_OF_PRUNED = ("margin_pruned", "loss_pruned")
_LOSS_OF = {"loss": "loss_dense", "loss_pruned": "loss_pruned"}  # by guard
_NEGATED = ("margin_pruned", "margin_dense")


@dataclass(frozen=True)
class BatchScores:
    """Of all slots of a batch, on the CPU.

    Attributes:
        hardness: fp64 [B], higher = harder; NaN where it is unknown.
        doubts: fp64 [B] by guard, higher = more doubtful; NaN for an unknown label. Of labels of classes
            how far the dense ("margin") and the pruned model ("margin_pruned") speak for the label,
            negated; several labels: of the class it speaks for least. Of masks, after `watch_losses`,
            the losses of both ("loss", "loss_pruned").
        labels: int64 [B], -1 unknown, or fp32 [B, C] of 1, 0, NaN; None without.
    """

    hardness: np.ndarray
    doubts: dict[str, np.ndarray]
    labels: np.ndarray | None


class Scoring:
    """Computes a score of batches of a dual forward.

    Attributes:
        name: of the score.
        task: "multiclass", "multilabel", "segmentation" or "embedding".
        of_classes: whether there are labels of classes, and so margins.
        of_masks: whether there are labels for segmentations.
        needs_dense: whether the pruned model's outputs are not enough.
    """

    def __init__(
        self,
        score: str | Callable[..., Any],
        task: str,
        *,
        is_ladder: bool,
        labelled: bool,
        output: str | int | None,
    ) -> None:
        """See `Attention`.

        Raises:
            FastpieError: for a score or task that there is not, or a score that needs labels.
        """
        if task not in TASKS:
            raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
        self._own = score if callable(score) else None
        if not callable(score):
            names = (*_LABELLED[task], *_LABEL_FREE[task], RANDOM)
            if score not in names:
                raise FastpieError(
                    f"Expected `score` to be one of {names} for task {task!r}, or a function, but "
                    f"got {score!r}."
                )
            if score in _LABELLED[task] and not labelled:
                raise FastpieError(
                    f"Expected a data set with labels for the score {score!r}, but it has none; "
                    f"without labels there are {(*_LABEL_FREE[task], RANDOM)}."
                )
        self.name = _name(score)
        self.task = task
        self.of_classes = labelled and task in ("multiclass", "multilabel")
        self.of_masks = labelled and task == "segmentation"
        self.needs_dense = self.name not in _OF_PRUNED
        self._is_ladder = is_ladder
        self._output = output
        self._losses: set[str] = set()
        if self.of_masks and self.name in _LOSSES:
            self._losses = {"loss_pruned", "loss_dense"} if self.name == "damage" else {self.name}
        self._own_takes_images = self._own is not None and takes_images(self._own)

    def watch_losses(self, guard: str) -> None:
        """Give the doubts "loss" or "loss_pruned" of masks from now on."""
        self._losses.add(_LOSS_OF[guard])

    def __call__(
        self, out: DualOutput, labels: Any, images: Callable[[], tuple[Any, ...]]
    ) -> BatchScores:
        """Score a batch.

        Args:
            out: of the dual forward.
            labels: as collated.
            images: gives the model's arguments; called where a function wants them.

        Raises:
            FastpieError: for outputs or labels that the task does not have.
        """
        doubts: dict[str, Tensor] = {}
        targets = hardness = None
        if self.of_classes or self._own is None or self._losses:
            dense, pruned = self._logits(out)
            if self.of_classes:
                targets = _class_targets(labels, dense, self.task)
            if self.task in ("multiclass", "multilabel"):
                scores = _class_scores(dense, pruned, targets, self.task)
                if targets is not None:
                    margins = _margins(dense, pruned, targets, self.task, scores)
                    doubts = {name: -margin for name, margin in margins.items()}
            else:
                scores = self._other_scores(dense, pruned, labels)
                doubts = {
                    guard: _mean(scores[loss])
                    for guard, loss in _LOSS_OF.items()
                    if loss in self._losses
                }
            if self.name != RANDOM and self._own is None:
                value = _mean(scores[self.name])
                hardness = -value if self.name in _NEGATED else value
        if self._own is not None:
            arguments = (
                (out, labels, unpacked(images())) if self._own_takes_images else (out, labels)
            )
            hardness = per_sample(self._own(*arguments), "score")
        if hardness is None:  # random: of what could be scored
            finite = next(iter(scores.values()))[0]
            hardness = torch.where(finite.isnan(), torch.nan, 0.0).cpu().double()
        return BatchScores(
            hardness.numpy(),
            {name: doubt.numpy() for name, doubt in doubts.items()},
            None if targets is None else targets.cpu().numpy(),
        )

    def _logits(self, out: DualOutput) -> tuple[Tensor, Tensor]:
        """[B, ...] and [L, B, ...]."""
        dense = entry_of(out.dense, self._output).as_subclass(Tensor)
        pruned = entry_of(out.pruned, self._output).as_subclass(Tensor)
        pruned = pruned if self._is_ladder else pruned.unsqueeze(0)
        fits = dense.ndim >= 3 if self.task == "segmentation" else dense.ndim == 2
        if not fits:
            shape = "[N, C, H, ...]" if self.task == "segmentation" else "[N, C]"
            raise FastpieError(
                f"Expected outputs of shape {shape} for task {self.task!r}, but got "
                f"{list(dense.shape)}."
            )
        return dense, pruned

    def _other_scores(self, dense: Tensor, pruned: Tensor, labels: Any) -> dict[str, Tensor]:
        if self.task == "embedding":
            return {"drift": ops.embedding_disagreement(dense, pruned)}
        scores: dict[str, Tensor] = {}
        if self.name in ("iou", "iou_soft", RANDOM):
            iou, iou_soft = ops.segmentation_disagreement(dense, pruned)
            scores.update(iou=1 - iou, iou_soft=1 - iou_soft)
        if "loss_dense" in self._losses:
            scores["loss_dense"] = segmentation_loss(dense, labels).unsqueeze(0)
        if "loss_pruned" in self._losses:
            scores["loss_pruned"] = torch.stack([segmentation_loss(z, labels) for z in pruned])
        if self.name == "damage":
            scores["damage"] = scores["loss_pruned"] - scores["loss_dense"]
        return scores


def per_sample(value: Any, what: str) -> Tensor:  # fp64 [B]
    """What a user's function returned for a batch.

    Raises:
        FastpieError: if it is not one number a sample.
    """
    values = torch.as_tensor(value).detach().as_subclass(Tensor).cpu()
    if values.ndim != 1:
        raise FastpieError(
            f"Expected the function `{what}` to return one number a sample, [n], but got shape "
            f"{list(values.shape)}."
        )
    return values.double()


def takes_images(function: Callable[..., Any]) -> bool:
    """Whether a function of (out, labels) takes the images as a third argument."""
    try:
        inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


def unpacked(arguments: tuple[Any, ...]) -> Any:
    """The images: the only argument of the model, or all of them."""
    return arguments[0] if len(arguments) == 1 else arguments


def _name(score: str | Callable[..., Any]) -> str:
    if isinstance(score, str):
        return score
    of = score if hasattr(score, "__qualname__") else type(score)
    return f"{of.__module__}.{of.__qualname__}"


def _class_targets(labels: Any, dense: Tensor, task: str) -> Tensor:
    """int64 [B], -1 where unknown, or fp32 [B, C], NaN where unknown; on the device of the outputs.

    Raises:
        FastpieError: if the format of all of them is wrong.
    """
    rows, classes = dense.shape
    targets, wrong = parse_labels(labels, rows, classes, task)
    if task == "multiclass" and wrong:
        targets[list(wrong)] = -1
    return targets.to(dense.device)


def _class_scores(
    dense: Tensor, pruned: Tensor, targets: Tensor | None, task: str
) -> dict[str, Tensor]:  # [L, B] each
    packed = ops.disagreement(dense, pruned, targets, task)
    scores = dict(zip(SCORES, packed.unbind(0), strict=True))
    scores["spearman"] = 1 - scores["spearman"]
    # An output that is not a number gives no flip, but NaN everywhere else.
    scores["flip"] = torch.where(scores["js"].isnan(), torch.nan, scores["flip"])
    return scores


def _mean(of_levels: Tensor) -> Tensor:  # [L, B] -> fp64 [B], on the CPU
    return of_levels.cpu().double().mean(0)


def _margins(
    dense: Tensor, pruned: Tensor, targets: Tensor, task: str, scores: dict[str, Tensor]
) -> dict[str, Tensor]:
    if task == "multiclass":
        return {
            "margin": _mean(scores["margin_dense"][:1]),
            "margin_pruned": _mean(scores["margin_pruned"]),
        }

    def lowest(
        logits: Tensor,
    ) -> Tensor:  # `label_margins` of fastpie.analysis, of the lowest class
        signed = (2 * targets - 1) * logits.float()
        margin = torch.where(targets.isnan(), torch.inf, signed).amin(1)
        return torch.where(margin.isinf(), torch.nan, margin).cpu().double()

    return {
        "margin": lowest(dense),
        "margin_pruned": torch.stack([lowest(level) for level in pruned]).mean(0),
    }
