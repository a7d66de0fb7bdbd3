"""What a training step minimises: an `Objective` gives each sample of a batch its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastpie.dual.inputs import as_arguments
from fastpie.dual.output import entry_of

__all__ = ["Criterion", "Objective", "Supervised", "TrainBatch", "entry_of"]

Criterion = Callable[[Tensor, Any], Tensor]
"""From logits and labels of n samples to their losses [n]; those of `fastpie.training.criteria.criterion`."""


@dataclass
class TrainBatch:
    """Samples of one step, on the model's device.

    Attributes:
        images: Tensor [n, ...]; a tuple where a sample has several (two views of an image, say).
        labels: as collated: int64 [n] (-1: unknown), fp32 [n, C] (NaN: unknown), masks [n, ...], or
            None without labels.
        ids: sample ids.
        hard: bool [n], which samples the attention calls hard to learn; None without attention.
        extra: other entries of the samples, collated, by name ("box", "mask", ...).
    """

    images: Any
    labels: Any
    ids: Sequence[str]
    hard: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many samples."""
        return len(self.ids)


class Objective(nn.Module):
    """What a step minimises, with everything that is trained or kept for it.

    A module, so that its parameters, buffers and `state_dict` are those of the training: the network
    (`model`), a projection head, a teacher. A loop calls, in this order and in training mode::

        objective.begin_epoch(epoch)
        for batch in epoch:
            loss = (objective(batch) * weights).mean()
            ...  # backward, optimizer.step()
            objective.after_step()

    Attributes:
        model: the network that the training is for: what is evaluated, mined and saved.
    """

    model: nn.Module

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """The loss of each sample, fp32."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch, counted from 0, in every process.

        Tells `self.criterion`, if there is one that asks to be told (deferred re-weighting).
        """
        criterion = getattr(self, "criterion", None)
        getattr(criterion, "begin_epoch", lambda epoch: None)(epoch)

    def after_step(self) -> None:
        """Called after every step of the optimizer, in every process."""


class Supervised(Objective):
    """A criterion on the model's output."""

    def __init__(
        self, model: nn.Module, criterion: Criterion, *, output: str | int | None = None
    ) -> None:
        """Join a model and a criterion.

        Args:
            model: any network.
            criterion: its loss, sample by sample.
            output: key or index of the logits in a dict or tuple output, or None.
        """
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.output = output

    def forward(self, batch: TrainBatch) -> Tensor:  # [n]
        """The criterion of each sample."""
        logits = entry_of(self.model(*as_arguments(batch.images)), self.output)
        return self.criterion(logits, batch.labels)
