"""Training on what is mined, in Lightning (https://lightning.ai; `pip install 'fastpie[lightning]'`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpie._extras import load_extra

load_extra("lightning.pytorch", "lightning", "fastpie.integrations.lightning")

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from fastpie.training.attention.attention import Attention
    from fastpie.training.masking.masked import MaskedTraining

__all__ = ["AttentionCallback", "MaskedTrainingCallback"]


class AttentionCallback(Callback):
    """Mines after the epochs whose turn it is, and keeps what was mined in Lightning's checkpoints.

    The module reads the weights in its step::

        class Classifier(LightningModule):
            def training_step(self, batch, _):
                images, labels, ids = batch
                losses = cross_entropy(self.model(images), labels, reduction="none")
                return (losses * attention.weights(ids, self.device)).mean()

        attention = Attention(module.model, train_set_without_augmentation)
        Trainer(callbacks=[AttentionCallback(attention)]).fit(module, loader)

    Lightning moves the module to a GPU later than that: there say `Attention(..., device="cuda")`, or the
    samples are mined on the CPU.

    To oversample give the loader `EpochSampler(len(data), attention)`, and with several processes the
    Trainer `use_distributed_sampler=False`.
    """

    def __init__(self, attention: Attention) -> None:
        """Of an `Attention` to the model that is trained."""
        self.attention = attention
        self._stepped = -1  # the last epoch that was

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what a checkpoint from the end of a validation has left out."""
        if self._stepped < trainer.current_epoch - 1:
            self._step(trainer.current_epoch - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine if it is the epoch's turn; in every process."""
        self._step(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"attention": self.attention.state_dict(), "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.attention.load_state_dict(state_dict["attention"])
        self._stepped = state_dict["stepped"]

    def _step(self, epoch: int) -> None:
        self.attention.step(epoch)
        self._stepped = epoch


class MaskedTrainingCallback(Callback):
    """Keeps removed weights at zero, and masks and counters in Lightning's checkpoints."""

    def __init__(self, masked: MaskedTraining) -> None:
        """Of a `MaskedTraining` of the model that is trained, with or without its optimizer."""
        self.masked = masked
        self._steps = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch."""
        self.masked.begin_epoch(trainer.current_epoch)
        self._steps = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Gradients of removed weights do not count where gradients are clipped."""
        self.masked.mask_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step; a batch whose gradients are only added up is none."""
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.masked.after_step()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.masked.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.masked.load_state_dict(state_dict)
