"""The handlers in real engines of Ignite and MONAI."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastpie import FastpieError
from fastpie.training.sampling.epoch_sampler import EpochSampler
from training_runs import SAMPLES, MovingAttention, Points, check_same, network

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    ignite = pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")

from fastpie.integrations.ignite import AttentionHandler, MaskedTrainingHandler


class Training:
    """An engine and all it trains."""

    def __init__(self, draws: bool = False) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.attention = MovingAttention(self.model, draws)
        self.sampler = EpochSampler(SAMPLES, self.attention, seed=3)
        self.loader = DataLoader(Points(noise=0.0), batch_size=8, sampler=self.sampler)
        self.handler = AttentionHandler(self.attention, sampler=self.sampler)
        self.loss = self.handler.loss(lambda z, y: F.cross_entropy(z, y, reduction="none"))
        self.seen: list[tuple[int, list[str], float]] = []
        self.engine = ignite.Engine(self.update)
        self.handler.attach(self.engine)

    def update(self, engine: Any, batch: Any) -> float:
        images, labels, ids = batch
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = self.loss(logits, labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        want = (losses * self.attention.weights(ids)).mean()
        torch.testing.assert_close(loss, want)
        loss.backward()
        self.optimizer.step()
        self.seen.append((engine.state.epoch - 1, list(ids), loss.item()))
        return loss.item()

    def kept(self) -> dict[str, Any]:
        return {
            "engine": self.engine, "model": self.model, "optimizer": self.optimizer,
            "attention": self.attention,
        }  # fmt: skip


def test_mines_after_each_epoch_and_the_sampler_follows() -> None:
    training = Training()
    training.engine.run(training.loader, max_epochs=3)
    assert training.attention.epochs == [0, 1, 2]
    orders = [[i for e, ids, _ in training.seen if e == epoch for i in ids] for epoch in range(3)]
    assert all(sorted(order) == sorted(Points().sample_ids) for order in orders)
    assert orders[0] != orders[1]
    ids = training.loader.dataset.sample_ids
    want = EpochSampler(SAMPLES, seed=3)
    want.set_epoch(2)
    assert orders[2] == [ids[i] for i in want]


def test_draws_follow_what_is_mined() -> None:
    training = Training(draws=True)

    def narrow(epoch: int) -> bool:
        training.attention.scores = torch.zeros(SAMPLES, dtype=torch.float64)
        training.attention.scores[epoch] = 1.0
        return True

    training.attention.step = narrow  # type: ignore[method-assign]
    training.engine.run(training.loader, max_epochs=3)
    drawn = [{i for e, ids, _ in training.seen if e == epoch for i in ids} for epoch in range(3)]
    assert drawn[1:] == [{"case-0"}, {"case-1"}]


def test_a_checkpoint_holds_what_was_mined(tmp_path: Path) -> None:
    first = Training()
    saver = handlers.Checkpoint(first.kept(), handlers.DiskSaver(tmp_path, require_empty=False))
    first.engine.add_event_handler(ignite.Events.EPOCH_COMPLETED, saver)
    first.engine.run(first.loader, max_epochs=2)
    again, whole = Training(), Training()
    state = torch.load(tmp_path / saver.last_checkpoint, weights_only=True)
    handlers.Checkpoint.load_objects(again.kept(), state)
    again.engine.run(again.loader, max_epochs=4)
    whole.engine.run(whole.loader, max_epochs=4)
    assert again.attention.epochs == [0, 1, 2, 3]
    assert torch.equal(again.attention.scores, whole.attention.scores)
    check_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))


def test_masks_stay_in_force() -> None:
    training = Training()
    mask = torch.rand(16, 4) < 0.5
    calls: list[Any] = []

    class Masked:
        def begin_epoch(self, epoch: int) -> None:
            calls.append(epoch)

        def after_step(self) -> None:
            calls.append("step")
            training.model[0].weight.data.mul_(mask)

    MaskedTrainingHandler(Masked()).attach(training.engine)  # type: ignore[arg-type]
    training.engine.run(training.loader, max_epochs=2)
    assert calls == [0, *["step"] * 8, 1, *["step"] * 8]
    assert (training.model[0].weight[~mask] == 0).all()


def test_a_loss_without_an_engine_or_ids() -> None:
    model = network()
    handler = AttentionHandler(MovingAttention(model))  # type: ignore[arg-type]
    loss = handler.loss(lambda z, y: F.cross_entropy(z, y, reduction="none"))
    with pytest.raises(FastpieError, match="an engine that the AttentionHandler is attached to"):
        loss(torch.zeros(2, 3), torch.zeros(2).long())
    engine = ignite.Engine(lambda engine, batch: loss(torch.zeros(2, 3), torch.zeros(2).long()))
    engine.logger.disabled = True
    handler.attach(engine)
    with pytest.raises(FastpieError, match="say with `ids`"):
        engine.run([{"image": torch.ones(2, 4)}])


class Entries(Dataset[Any]):
    """As MONAI's trainers take samples."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, sample_id = Points(noise=0.0)[index]
        return {"image": image, "label": label, "sample_id": sample_id}


def test_in_a_supervised_trainer_of_monai() -> None:
    engines = pytest.importorskip("monai.engines")
    model = network()
    attention = MovingAttention(model)
    sampler = EpochSampler(SAMPLES, attention, seed=3)
    handler = AttentionHandler(attention, sampler=sampler)  # type: ignore[arg-type]
    of_samples = nn.CrossEntropyLoss(reduction="none")
    trainer = engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=DataLoader(Entries(), batch_size=8, sampler=sampler),
        network=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        loss_function=handler.loss(of_samples),
        train_handlers=[handler],
        decollate=False,
    )
    trainer.logger.disabled = True
    trainer.run()
    assert attention.epochs == [0, 1, 2]
    # The same, written out.
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    attends, order = MovingAttention(plain), EpochSampler(SAMPLES, seed=3)
    for epoch in range(3):
        order.set_epoch(epoch)
        for batch in DataLoader(Entries(), batch_size=8, sampler=order):
            optimizer.zero_grad()
            losses = of_samples(plain(batch["image"]), batch["label"])
            (losses * attends.weights(batch["sample_id"])).mean().backward()
            optimizer.step()
        attends.step(epoch)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
