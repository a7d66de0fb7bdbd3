"""The training loop: what it computes, and what becomes of bad data, numbers and arguments."""

from __future__ import annotations

import copy
import csv
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

import fastpie
from fastpie import FastpieError
from fastpie.training.objectives.objective import Objective, Supervised, TrainBatch
from fastpie.training.sampling.order import epoch_order
from fastpie.training.trainer.randomness import seed_of
from fastpie.training.trainer.trainer import Trainer
from training_runs import SAMPLES, Mean, MovingAttention, Points, check_same, state_of, trainer_of


def plain(epochs: int, attention: bool, left_out: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """The same training, written out."""
    trainer = trainer_of(attention="weights" if attention else "", dropout=0.3)
    objective, attends = trainer.objective, trainer.attention
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.02, momentum=0.9)
    data = Points()
    objective.train()
    for epoch in range(epochs):
        torch.manual_seed(seed_of(3, 0, epoch))
        objective.begin_epoch(epoch)
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 ** (epoch // 2)
        place = 0
        batches = torch.from_numpy(epoch_order(SAMPLES, 0, epoch)).tensor_split(8)
        for number, batch in enumerate(batches):
            items = []
            for index in batch.tolist():
                seed = seed_of(0, 0, epoch, place)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.manual_seed(seed)
                if index not in left_out:
                    items.append(data[index])
                place += 1
            if not items:
                continue
            images, labels, ids = default_collate(items)
            torch.manual_seed(seed_of(1, 0, epoch, number, 0))
            losses = F.cross_entropy(objective.model(images), labels, reduction="none")
            if attends is not None:
                losses = losses * attends.weights(ids)
            optimizer.zero_grad()
            (losses.sum() / len(items)).backward()
            optimizer.step()
            objective.after_step()
        if attends is not None:
            attends.step(epoch)
    return {f"objective.{k}": v for k, v in objective.state_dict().items()}


@pytest.mark.parametrize("attention", [False, True])
def test_the_loop_is_the_plain_one(attention: bool) -> None:
    trainer = trainer_of(attention="weights" if attention else "", dropout=0.3)
    result = trainer.fit()
    for name, want in plain(4, attention).items():
        torch.testing.assert_close(state_of(trainer)[name], want, rtol=1e-5, atol=1e-6)
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]
    assert [row["lr"] for row in result.history] == [0.02, 0.02, 0.01, 0.01]
    assert all(row["images"] == SAMPLES for row in result.history)
    assert result.epoch == 4
    assert result.best is None
    assert not result.stopped_early
    if attention:
        assert trainer.attention.epochs == [0, 1, 2, 3]


def test_any_number_of_workers_gives_the_same_bits() -> None:
    states = []
    for workers in (0, 1, 3):
        trainer = trainer_of(num_workers=workers, dropout=0.2, broken=(5, 17))
        with pytest.warns(UserWarning, match="2 of 61 samples could not be read"):
            trainer.fit()
        states.append(state_of(trainer))
    check_same(states[1], states[0])
    check_same(states[2], states[0])


def test_the_seed_decides() -> None:
    one, two = trainer_of(seed=1), trainer_of(seed=2)
    one.fit()
    two.fit()
    assert not torch.equal(state_of(one)["objective.mean"], state_of(two)["objective.mean"])


def test_the_callers_generators_are_left_alone() -> None:
    trainer = trainer_of(dropout=0.2, valid=Points(), epochs=1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    trainer.fit()
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_transforms_of_monai_have_generators_of_their_own() -> None:
    monai = pytest.importorskip("monai.transforms")
    from monai.data import Dataset as MonaiDataset

    def trained(workers: int, left: int) -> dict[str, Tensor]:
        steps = [
            monai.RandGaussianNoised("image", prob=0.9),
            monai.RandScaleIntensityd("image", 0.5),
        ]
        compose = monai.Compose(steps)
        for _ in range(left):  # wherever its generators are
            compose({"image": torch.ones(4)})
        entries = [
            {"image": torch.full((4,), i / SAMPLES), "label": i % 3, "sample_id": f"case-{i}"}
            for i in range(SAMPLES)
        ]
        trainer = trainer_of(data=MonaiDataset(entries, compose), num_workers=workers, epochs=2)
        trainer.fit()
        return state_of(trainer)

    first = trained(0, 0)
    check_same(trained(0, 3), first)
    check_same(trained(2, 1), first)


# ---------------------------------------------------------------------- attention and others


class Seen(Mean):
    """Keeps what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen: list[TrainBatch] = []

    def forward(self, batch: TrainBatch) -> Tensor:
        self.seen.append(batch)
        return super().forward(batch)


def fit(objective: Objective, data: Any, **options: Any) -> Any:
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    trainer = Trainer(
        objective, data, optimizer=optimizer, progress=False, **{"epochs": 1, **options}
    )
    return trainer.fit()


def test_the_hard_and_the_drawn() -> None:
    objective = Seen(trainer_of().objective.model)
    attention = MovingAttention(objective.model, draws=True)
    attention.scores = torch.zeros(SAMPLES, dtype=torch.float64)
    attention.scores[[3, 9]] = torch.tensor([1.0, 3.0], dtype=torch.float64)
    fit(objective, Points(), attention=attention)
    ids = [i for batch in objective.seen for i in batch.ids]
    assert len(ids) == SAMPLES
    assert set(ids) == {"case-3", "case-9"}
    assert ids.count("case-9") > ids.count("case-3") > 0
    assert all(batch.hard.dtype == torch.bool and batch.hard.all() for batch in objective.seen)


def test_samples_are_drawn_by_weights(tmp_path: Path) -> None:
    weights = np.zeros(SAMPLES)
    weights[[2, 5]] = 1.0
    objective = Seen(trainer_of().objective.model)
    fit(objective, Points(), draw_weights=weights, out=tmp_path)
    assert {i for batch in objective.seen for i in batch.ids} == {"case-2", "case-5"}
    with pytest.raises(FastpieError, match="draw_weights"):
        fit(objective, Points(), draw_weights=weights + 1, out=tmp_path)


def test_masked_training_is_called() -> None:
    calls: list[Any] = []

    class Masked:
        def begin_epoch(self, epoch: int) -> None:
            calls.append(epoch)

        def mask_gradients(self) -> None:
            calls.append("gradients")

        def after_step(self) -> None:
            calls.append("step")

        def state_dict(self) -> dict[str, Any]:
            return {}

    trainer_of(masked=Masked(), epochs=2, batch_size=30).fit()
    steps = ["gradients", "step"] * 3
    assert calls == [0, *steps, 1, *steps]


def test_items_with_other_entries() -> None:
    class Dicts(Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> Any:
            box = torch.ones(4) * i if i % 2 else None
            return {"image": torch.ones(4) * i, "label": i % 3, "box": box, "site": i, "at": "x"}

    objective = Seen(trainer_of().objective.model)
    fit(objective, Dicts(), batch_size=10)
    (batch,) = objective.seen
    assert sorted(batch.ids) == [str(i) for i in range(10)]
    assert batch.extra.keys() == {"box", "site", "at"}
    order = [int(i) for i in batch.ids]
    assert batch.extra["site"].tolist() == order
    assert [None if box is None else int(box[0]) for box in batch.extra["box"]] == [
        i if i % 2 else None for i in order
    ]
    assert batch.images[:, 0].tolist() == order


def test_a_data_loader_lends_all_but_its_sampler() -> None:
    def collate(items: list[Any]) -> Any:
        images, labels, ids = default_collate(items)
        return images * 2, labels, ids

    objective = Seen(trainer_of().objective.model)
    data = Points(noise=0.0)
    fit(objective, DataLoader(data, batch_size=11, collate_fn=collate, num_workers=1))
    assert {len(batch) for batch in objective.seen} == {10, 11}
    assert sorted(i for batch in objective.seen for i in batch.ids) == sorted(data.sample_ids)
    batch = objective.seen[0]
    torch.testing.assert_close(batch.images[0], 2 * data[int(batch.ids[0][5:])][0])


def test_several_views_are_a_tuple() -> None:
    class Views(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return (torch.full((2,), i + 0.0), torch.full((3,), i + 0.5)), i % 2

    class Pair(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 1)

        def forward(self, batch: TrainBatch) -> Tensor:
            assert isinstance(batch.images, tuple)
            one, two = batch.images
            assert torch.equal(one[:, 0] + 0.5, two[:, 0])
            return self.model(one)[:, 0].square()

    result = fit(Pair(), Views(), batch_size=4)
    assert result.history[0]["images"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(range(9))},
        {"sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)},
        {"sampler": RandomSampler(range(SAMPLES), num_samples=9)},
        {"batch_sampler": [[0, 1], [2]]},
    ],
)
def test_a_sampler_that_would_not_be_used_is_refused(options: dict[str, Any]) -> None:
    for name in ("data", "valid"):
        with pytest.raises(FastpieError, match=r"would not be used.*Subset.*draw_weights"):
            trainer_of(**{name: DataLoader(Points(), **options)})
    for shuffle in (False, True):
        trainer_of(data=DataLoader(Points(), batch_size=4, shuffle=shuffle))


# ---------------------------------------------------------------------- bad data, bad numbers


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, broken=(5, 17), dropout=0.3)
    with pytest.warns(UserWarning, match="2 of 61 samples .* for example 'case-17': OSError"):
        result = trainer.fit()
    for name, want in plain(4, False, left_out=(5, 17)).items():
        torch.testing.assert_close(state_of(trainer)[name], want, rtol=1e-5, atol=1e-6)
    assert [row["unreadable"] for row in result.history] == [2] * 4
    assert [row["images"] for row in result.history] == [SAMPLES - 2] * 4
    assert result.errors.keys() == {"case-17", "case-5"}
    with (tmp_path / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["sample_id"], row["stage"], row["epoch"]) for row in rows] == [
        ("case-17", "read", "0"),
        ("case-5", "read", "0"),
    ]
    assert rows[1]["error"] == "OSError: cannot read 5"


def test_images_of_another_shape_or_of_nan_are_left_out() -> None:
    class Odd(Points):
        def __getitem__(self, index: int) -> Any:
            image, label, sample_id = super().__getitem__(index)
            if index == 3:
                image = torch.ones(7)
            if index == 4:
                image = image * torch.nan
            return image, None if index == 8 else label, sample_id

    trainer = trainer_of(data=Odd(), epochs=1)
    with pytest.warns(UserWarning, match="3 of 61"):
        result = trainer.fit()
    assert {k: e["stage"] for k, e in result.errors.items()} == {
        "case-3": "collate",
        "case-4": "image",
        "case-8": "collate",
    }
    assert all(v.isfinite().all() for v in state_of(trainer).values())


def test_a_batch_without_a_readable_sample_is_skipped() -> None:
    lost = tuple(
        epoch_order(SAMPLES, 0, 0)[:8].tolist()
    )  # the first of 8 batches: 61 = 5 * 8 + 3 * 7
    trainer = trainer_of(broken=lost, epochs=1, dropout=0.3)
    with pytest.warns(UserWarning, match="8 of 61"):
        result = trainer.fit()
    assert result.history[0]["skipped_batches"] == 1
    for name, want in plain(1, False, left_out=lost).items():
        torch.testing.assert_close(state_of(trainer)[name], want, rtol=1e-5, atol=1e-6)


class Poisoned(Mean):
    """NaN as loss of some samples."""

    def __init__(self, model: nn.Module, ids: Any) -> None:
        super().__init__(model)
        self.ids = ids

    def forward(self, batch: TrainBatch) -> Tensor:
        factor = torch.tensor([math.nan if i in self.ids else 1.0 for i in batch.ids])
        return super().forward(batch) * factor


def test_a_step_without_finite_gradients_is_not_taken() -> None:
    objective = Poisoned(trainer_of().objective.model, {"case-3"})
    result = fit(objective, Points(), batch_size=8, epochs=3)
    assert [row["skipped_steps"] for row in result.history] == [1, 1, 1]
    assert all(0.1 < row["loss"] < 2 for row in result.history)
    assert all(row["images"] in (SAMPLES - 8, SAMPLES - 7) for row in result.history)
    assert all(p.isfinite().all() for p in objective.parameters())
    still = fit(objective, Points(), batch_size=SAMPLES).history[0]
    assert math.isnan(still["loss"])  # no step, no loss
    assert still["images"] == 0


def test_many_steps_without_finite_gradients_end_the_training() -> None:
    objective = Poisoned(trainer_of().objective.model, set(Points().sample_ids))
    before = copy.deepcopy(objective.model.state_dict())
    with pytest.raises(FastpieError, match=r"10 steps in a row .* step 1 of epoch 1"):
        fit(objective, Points(), batch_size=8, epochs=3)
    for name, value in objective.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_gradients_are_clipped() -> None:
    objective = Mean(trainer_of().objective.model)
    before = [p.detach().clone() for p in objective.parameters()]
    fit(objective, Points(), batch_size=SAMPLES, clip=1e-3)  # one step of SGD at .01
    moved = [
        (p - b).detach().flatten() for p, b in zip(objective.parameters(), before, strict=True)
    ]
    torch.testing.assert_close(torch.cat(moved).norm(), torch.tensor(1e-5), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` to be an int of at least 1, but got 0"),
        ({"seed": -1}, "`seed`"),
        ({"patience": 0}, "`patience`"),
        ({"patience": 3}, "Expected `valid` or `monitor`"),
        ({"checkpoint_every": 1.5}, "`checkpoint_every`"),
        ({"precision": "fp8"}, "`precision` to be one of"),
        ({"clip": 0.0}, "`clip` above 0"),
        ({"batch_size": 0}, "batch size of at least 1"),
        ({"device": "nowhere"}, "device that torch can use, but got 'nowhere'"),
        ({"log": "xml", "out": "x"}, "`log` to be one of"),
        ({"log": "csv"}, "with `out`"),
        ({"monitor": "valid_f1"}, "`monitor` to be a column"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "out" in options:
        options = {**options, "out": tmp_path}
    with pytest.raises(FastpieError, match=message):
        trainer_of(**options).fit()


def test_an_objective_without_a_loss_for_each_sample() -> None:
    objective = Supervised(nn.Linear(4, 3), F.cross_entropy)
    with pytest.raises(FastpieError, match=r"a loss for each of 21 samples, but got \[\]"):
        fit(objective, Points(), batch_size=30)
    with pytest.raises(FastpieError, match="to be an Objective"):
        fit(nn.Linear(4, 3), Points())  # type: ignore[arg-type]


def test_parts_that_do_not_belong_together_are_refused() -> None:
    objective, other = Mean(nn.Linear(4, 3)), nn.Linear(4, 3)
    strange = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(FastpieError, match=r"optimizer of the objective's parameters"):
        Trainer(objective, Points(), optimizer=strange, epochs=1)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    with pytest.raises(FastpieError, match=r"attention to the model that is trained"):
        Trainer(
            objective, Points(), optimizer=optimizer, epochs=1, attention=MovingAttention(other)
        )


# ---------------------------------------------------------------------- precision, compilation


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast(precision: str, dtype: torch.dtype) -> None:
    seen = set()
    trainer = trainer_of(precision=precision, epochs=6, lr=0.05, valid=Points())
    trainer.objective.model[0].register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    result = trainer.fit()
    assert seen == {dtype}
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in trainer.objective.parameters())
    reference = trainer_of(epochs=6, lr=0.05)
    reference.fit()
    for name, value in reference.objective.model.state_dict().items():
        assert not torch.equal(value, trainer.objective.model.state_dict()[name])
        torch.testing.assert_close(
            value, trainer.objective.model.state_dict()[name], rtol=0.05, atol=0.02
        )


def test_a_compiled_model_is_the_same_module() -> None:
    trainer = trainer_of(compile="aot_eager", epochs=2)
    names = list(trainer.objective.state_dict())
    trainer.fit()
    assert names == list(trainer_of().objective.state_dict())
    reference = trainer_of(epochs=2)
    reference.fit()
    for name, value in state_of(reference).items():
        torch.testing.assert_close(state_of(trainer)[name], value)
    model = trainer.objective.model.eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    other = reference.objective.model.eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    out, want = dual(x), fastpie.DualModel(other, fastpie.prune(other, 0.5))(x)
    torch.testing.assert_close(out.dense, want.dense)
    torch.testing.assert_close(out.pruned, want.pruned)
    torch.testing.assert_close(copy.deepcopy(model)(x), want.dense)
    torch._dynamo.reset()
