"""Training on what is mined, in PyTorch-Ignite (https://pytorch-ignite.ai) and MONAI's trainers.

`pip install 'fastpie[ignite]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, which Ignite uses
    load_extra("ignite.engine", "ignite", "fastpie.integrations.ignite")
    from ignite.engine import Engine, Events

if TYPE_CHECKING:
    from fastpie.training.attention.attention import Attention
    from fastpie.training.masking.masked import MaskedTraining
    from fastpie.training.sampling.epoch_sampler import EpochSampler

__all__ = ["AttentionHandler", "MaskedTrainingHandler"]


class AttentionHandler:
    """Mines after the epochs whose turn it is, and weighs the loss.

    In an update function of one's own::

        def update(engine, batch):
            images, labels, ids = batch
            loss = (criterion(model(images), labels) * attention.weights(ids)).mean()
            ...

        AttentionHandler(attention).attach(engine)

    In MONAI's SupervisedTrainer, whose loss function does not see ids::

        handler = AttentionHandler(attention)
        SupervisedTrainer(..., loss_function=handler.loss(criterion), train_handlers=[handler])

    For the checkpoint give Ignite's `Checkpoint` or MONAI's `CheckpointSaver` the attention itself,
    beside model and optimizer: `{"attention": attention, ...}`.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        sampler: EpochSampler | None = None,
        ids: Callable[[Any], Sequence[Any]] | None = None,
    ) -> None:
        """Of an `Attention` to the model that is trained.

        Args:
            attention: already made.
            sampler: of the training's DataLoader, to be told of each epoch.
            ids: the sample ids of a batch, for `loss`; by default `batch["sample_id"]`, of a tuple
                the third element.
        """
        self.attention, self.sampler = attention, sampler
        self._ids = ids or _sample_ids
        self._batch: Any = None

    def attach(self, engine: Engine) -> None:
        """Be called by an engine that trains."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def loss(self, criterion: Callable[[Tensor, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """The mean of a criterion (a loss for each sample) weighted by what was mined of the batch.

        Raises:
            FastpieError: when it is called outside an engine that this is attached to.
        """

        def weighted(output: Any, labels: Any) -> Tensor:
            if self._batch is None:
                raise FastpieError("Expected an engine that the AttentionHandler is attached to.")
            losses = criterion(output, labels)
            return (losses * self.attention.weights(self._ids(self._batch)).to(losses)).mean()

        return weighted

    def _begin_epoch(self, engine: Engine) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch - 1)

    def _begin_iteration(self, engine: Engine) -> None:
        self._batch = engine.state.batch

    def _end_epoch(self, engine: Engine) -> None:
        self.attention.step(engine.state.epoch - 1)  # Ignite counts from 1


class MaskedTrainingHandler:
    """Keeps removed weights at zero; for the checkpoint give the `MaskedTraining` itself."""

    def __init__(self, masked: MaskedTraining) -> None:
        """Of a `MaskedTraining` of the model that is trained, with or without its optimizer."""
        self.masked = masked

    def attach(self, engine: Engine) -> None:
        """Be called by an engine that trains, each of whose iterations is a step."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_step)

    def _begin_epoch(self, engine: Engine) -> None:
        self.masked.begin_epoch(engine.state.epoch - 1)

    def _end_step(self, engine: Engine) -> None:
        self.masked.after_step()


def _sample_ids(batch: Any) -> Any:
    try:
        return batch["sample_id"] if isinstance(batch, dict) else batch[2]
    except (KeyError, IndexError, TypeError) as error:
        raise FastpieError(
            "Expected a batch with 'sample_id', or ids as its third element; say with `ids` where they "
            "are."
        ) from error
