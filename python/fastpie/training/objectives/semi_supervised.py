"""`MeanTeacher`: training on labelled and unlabelled images together."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError
from fastpie.training.objectives.objective import Criterion, Objective, TrainBatch, entry_of
from fastpie.training.objectives.teacher_losses import (
    DISTANCES,
    TASKS,
    consistency_loss,
    pseudo_label_loss,
)

__all__ = ["MeanTeacher", "labelled"]

_Tensors = tuple[Tensor, ...] | list[Tensor]


class MeanTeacher(Objective):
    """A criterion where there are labels, and everywhere the agreement with a teacher.

    The teacher is the exponential moving average of the model. Sample by sample::

        labelled    criterion + weight(epoch) * consistency
        unlabelled  (1 + hard_weight [hard]) * (weight(epoch) * consistency + pseudo_weight * pseudo)

    `consistency` is the distance of the student's probabilities from the teacher's (Tarvainen and
    Valpola, NeurIPS 2017, arXiv 1703.01780), `pseudo` the cross-entropy with the teacher's classes
    where it is sure (Sohn et al., FixMatch, NeurIPS 2020, arXiv 2001.07685). `weight(epoch) = weight *
    exp(-5 (1 - epoch / ramp_up)^2)` rises over the first epochs, as in the former. A loop takes the
    mean over all samples of a batch, unlabelled ones too, as both papers' code does.

    Labelled and unlabelled samples come in one batch. Unlabelled is a sample whose labels are all
    unknown: -1, a row of NaN, a mask of -1 or NaN; or all are, with `labels=None`. Where a batch has
    a pair of images a sample, they are its weak and its strong view: the student sees the strong one,
    the teacher the weak one. With one image both see it, and differ by the student's dropout and
    batch statistics: the teacher is always in eval mode.

    Weights of attention act on this too, as a loop multiplies the losses by them: with a label-free
    score ("js", "iou") hard unlabelled samples count more, and a wrong pseudo-label with them.
    `hard_weight` does it for unlabelled samples alone; take one of the two.

    Attributes:
        model: the student.
        teacher: `torch.optim.swa_utils.AveragedModel`; the network is `teacher.module`, without
            gradients. Parameters and floating-point buffers (BatchNorm statistics) are averaged, other
            buffers copied. At evaluation it is often the better model.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        *,
        task: str = "multiclass",
        decay: float = 0.99,
        weight: float = 1.0,
        ramp_up: int = 5,
        distance: str = "mse",
        threshold: float | None = None,
        pseudo_weight: float = 1.0,
        hard_weight: float = 0.0,
        output: str | int | None = None,
    ) -> None:
        """Copy the model.

        Args:
            model: any network; the teacher is a deep copy of it.
            criterion: loss of logits and labels, sample by sample; called with the labelled samples.
            task: "multiclass", "multilabel" or "segmentation".
            decay: of the average, in [0, 1). The first updates are a plain mean, `min(decay, 1 - 1 / (t
                + 1))` after t of them, so that the teacher forgets the initial weights.
            weight: of the consistency after the ramp, at least 0. The mean over C classes makes "mse"
                small; 10 to 100 are usual for it.
            ramp_up: epochs, at least 0.
            distance: "mse" or "kl" of the consistency.
            threshold: least confidence of a pseudo-label, .95 in FixMatch; None for no pseudo-labels.
            pseudo_weight: of the pseudo-labels, at least 0; it has no ramp, confidence is one.
            hard_weight: how much more an unlabelled sample counts that attention calls hard, at least
                0.
            output: key or index of the logits in a dict or tuple output.

        Raises:
            FastpieError: for an unknown option or a number out of range.
        """
        super().__init__()
        if task not in TASKS or distance not in DISTANCES:
            raise FastpieError(
                f"Expected `task` to be one of {TASKS} and `distance` one of {DISTANCES}, but got "
                f"{task!r} and {distance!r}."
            )
        if not 0 <= decay < 1:
            raise FastpieError(f"Expected `decay` in [0, 1), but got {decay}.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise FastpieError(f"Expected `threshold` in [0, 1], but got {threshold}.")
        weights = {"weight": weight, "pseudo_weight": pseudo_weight, "hard_weight": hard_weight}
        for name, value in (*weights.items(), ("ramp_up", ramp_up)):
            if not 0 <= value < math.inf:
                raise FastpieError(f"Expected `{name}` of at least 0, but got {value}.")
        self.model = model
        self.criterion = criterion
        self.task = task
        self.weight = weight
        self.ramp_up = ramp_up
        self.distance = distance
        self.threshold = threshold
        self.pseudo_weight = pseudo_weight
        self.hard_weight = hard_weight
        self.output = output
        self.teacher = AveragedModel(
            model, multi_avg_fn=partial(_average, 1 - decay), use_buffers=True
        )
        self.teacher.requires_grad_(False).eval()
        self._epoch = 0

    def train(self, mode: bool = True) -> MeanTeacher:
        """Training or eval mode of the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def begin_epoch(self, epoch: int) -> None:
        """Set the weight of the consistency."""
        super().begin_epoch(epoch)
        self._epoch = epoch

    def after_step(self) -> None:
        """Let the teacher follow."""
        self.teacher.update_parameters(self.model)

    def consistency_weight(self) -> float:
        """That of the present epoch: `weight * exp(-5 (1 - epoch / ramp_up)^2)`, then `weight`."""
        if self._epoch >= self.ramp_up:
            return self.weight
        return self.weight * math.exp(-5 * (1 - self._epoch / self.ramp_up) ** 2)

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """The loss of each sample.

        Raises:
            FastpieError: for labels that are no tensor with an entry for each sample.
        """
        weak, strong = _views(batch.images)
        logits = entry_of(self.model(*as_arguments(strong)), self.output)
        with torch.no_grad():
            of_teacher = entry_of(self.teacher(*as_arguments(weak)), self.output)
        losses = self.consistency_weight() * consistency_loss(
            logits, of_teacher, task=self.task, distance=self.distance
        )
        has_label = labelled(batch.labels, len(logits)).to(logits.device)
        if self.threshold is not None:
            pseudo = pseudo_label_loss(logits, of_teacher, threshold=self.threshold, task=self.task)
            losses = losses + (self.pseudo_weight * pseudo).masked_fill(has_label, 0.0)
        if batch.hard is not None and self.hard_weight:
            losses = losses * (1 + self.hard_weight * (batch.hard & ~has_label))
        (rows,) = has_label.nonzero(as_tuple=True)
        if len(rows):  # a criterion need not know what to do with unknown labels, nor with none
            supervised = self.criterion(logits[rows], batch.labels[rows])
            losses = losses.index_add(0, rows, supervised.to(losses.dtype))
        return losses


def labelled(labels: Any, count: int) -> Tensor:  # bool [n]
    """Which samples have a known label: one of at least 0, anywhere in their entry.

    Args:
        labels: tensor [n, ...], -1 or NaN where unknown; None: nothing is known.
        count: n.

    Raises:
        FastpieError: for anything else.
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.bool)
    if not isinstance(labels, Tensor) or labels.ndim == 0 or len(labels) != count:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise FastpieError(f"Expected a tensor of labels [{count}, ...], but got {got}.")
    known = labels >= 0
    return known if known.ndim == 1 else known.flatten(1).any(1)


def _views(images: Any) -> tuple[Any, Any]:
    """The weak and the strong view."""
    if isinstance(images, Tensor):
        return images, images
    if not isinstance(images, tuple | list) or len(images) != 2:
        raise FastpieError(
            "Expected images, or a pair of their weak and strong view, but got "
            f"{type(images).__name__}."
        )
    return images[0], images[1]


def _average(share: float, teacher: _Tensors, student: _Tensors, updates: Tensor | int) -> None:
    """Move the teacher's tensors, of one dtype, by the student's share."""
    if teacher[0].is_floating_point() or teacher[0].is_complex():
        torch._foreach_lerp_(teacher, student, max(share, 1 / (1 + float(updates))))
    else:
        torch._foreach_copy_(teacher, student)
