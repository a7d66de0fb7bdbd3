"""The callbacks in a real `lightning.pytorch.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastpie.training.sampling.epoch_sampler import EpochSampler
from training_runs import SAMPLES, MovingAttention, Points, check_same, network

L = pytest.importorskip("lightning.pytorch")

from fastpie.integrations.lightning import AttentionCallback, MaskedTrainingCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended"),
]


class Classifier(L.LightningModule):
    def __init__(self, attention: MovingAttention | None, model: nn.Module) -> None:
        super().__init__()
        self.model, self.attention = model, attention
        self.seen: list[tuple[int, list[str], list[float]]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels, ids = batch
        losses = F.cross_entropy(self.model(images), labels, reduction="none")
        weights = torch.ones(len(ids)) if self.attention is None else self.attention.weights(ids)
        self.seen.append((self.current_epoch, list(ids), weights.tolist()))
        return (losses * weights).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", F.cross_entropy(self.model(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(
    tmp_path: Path, module: Any, loader: Any, callbacks: list[Any], epochs: int = 3, **options: Any
) -> Any:
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
        callbacks=callbacks, enable_checkpointing=any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, loader, **options)
    return trainer


def loader_of(attention: MovingAttention | None = None) -> DataLoader[Any]:
    data = Points(noise=0.0)
    return DataLoader(data, batch_size=8, sampler=EpochSampler(SAMPLES, attention, seed=3))


def test_mines_after_each_epoch_and_the_weights_follow(tmp_path: Path) -> None:
    model = network()
    attention = MovingAttention(model)
    module = Classifier(attention, model)
    fit(tmp_path, module, loader_of(), [AttentionCallback(attention)])
    assert attention.epochs == [0, 1, 2]
    weights = [[w for e, _, ws in module.seen if e == epoch for w in ws] for epoch in range(3)]
    assert set(weights[0]) == {1.0}
    assert len(set(weights[1])) > 30
    orders = [[i for e, ids, _ in module.seen if e == epoch for i in ids] for epoch in range(3)]
    assert all(sorted(order) == sorted(Points().sample_ids) for order in orders)
    assert orders[0] != orders[1]  # Lightning tells the sampler of the epoch


def test_draws_follow_what_is_mined(tmp_path: Path) -> None:
    model = network()
    attention = MovingAttention(model, draws=True)

    def narrow(epoch: int) -> bool:
        attention.scores = torch.zeros(SAMPLES, dtype=torch.float64)
        attention.scores[epoch] = 1.0
        return True

    attention.step = narrow  # type: ignore[method-assign]
    module = Classifier(attention, model)
    fit(tmp_path, module, loader_of(attention), [AttentionCallback(attention)])
    drawn = [{i for e, ids, _ in module.seen if e == epoch for i in ids} for epoch in range(3)]
    assert drawn[1:] == [{"case-0"}, {"case-1"}]
    assert len(drawn[0]) > 20


@pytest.mark.parametrize("validated", [False, True])
def test_a_checkpoint_holds_what_was_mined(tmp_path: Path, validated: bool) -> None:
    """Also one from the end of a validation, which comes before the epoch's mining."""

    def run(epochs: int, **options: Any) -> tuple[MovingAttention, nn.Module]:
        model = network()
        attention = MovingAttention(model)
        save = L.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
        valid = DataLoader(Points(noise=0.0), batch_size=30) if validated else None
        fit(
            tmp_path, Classifier(attention, model), loader_of(), [AttentionCallback(attention), save],
            epochs, val_dataloaders=valid, **options,
        )  # fmt: skip
        return attention, model

    run(2)
    attention, model = run(4, ckpt_path=tmp_path / "kept" / "last.ckpt")
    whole, undisturbed = run(4)
    assert attention.epochs == whole.epochs == [0, 1, 2, 3]
    assert torch.equal(attention.scores, whole.scores)
    check_same(dict(model.state_dict()), dict(undisturbed.state_dict()))


class Half:
    """Masks of half a weight; what it was called with."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.mask = weight, torch.rand(weight.shape) < 0.5
        self.calls: list[Any] = []

    def begin_epoch(self, epoch: int) -> None:
        self.calls.append(epoch)

    def mask_gradients(self) -> None:
        self.weight.grad.mul_(self.mask)

    def after_step(self) -> None:
        self.calls.append("step")
        self.weight.data.mul_(self.mask)

    def state_dict(self) -> dict[str, Any]:
        return {"mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mask = state["mask"]


def test_masks_stay_in_force(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> Half:
        model = network()
        masked = Half(model[0].weight)
        save = L.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
        callbacks = [MaskedTrainingCallback(masked), save]
        fit(tmp_path, Classifier(None, model), loader_of(), callbacks, epochs, **options)
        return masked

    masked = run(2)
    assert masked.calls == [0, *["step"] * 8, 1, *["step"] * 8]
    assert (masked.weight[~masked.mask] == 0).all()
    assert (masked.weight[masked.mask] != 0).all()
    again = run(3, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert torch.equal(again.mask, masked.mask)
    assert again.calls == [2, *["step"] * 8]


def test_added_up_gradients_are_one_step(tmp_path: Path) -> None:
    model = network()
    masked = Half(model[0].weight)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=4,
        callbacks=[MaskedTrainingCallback(masked)],
    )  # fmt: skip
    trainer.fit(Classifier(None, model), loader_of())
    assert masked.calls == [0, "step", "step"]
