"""What is measured after each epoch, and what follows from it."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastpie import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.training.objectives.objective import Supervised
from fastpie.training.trainer.evaluation import evaluate_model
from fastpie.training.trainer.feed import Feed
from fastpie.training.trainer.trainer import Trainer
from training_runs import Points, network, trainer_of

metrics = pytest.importorskip("sklearn.metrics")
CPU = torch.device("cpu")


def evaluated(model: nn.Module, data: Any, criterion: Any = None) -> dict[str, float]:
    objective = Supervised(model, criterion)
    autocast = torch.autocast("cpu", enabled=False)
    found, unreadable = evaluate_model(objective, Feed(data, batch_size=7), Ranks(), CPU, autocast)
    assert unreadable == []
    return found


def test_multiclass() -> None:
    model = network(dropout=0.9).train()
    x, y = torch.randn(50, 4), torch.randint(0, 2, (50,))  # class 2 has no sample
    y[::9] = -1
    found = evaluated(model, TensorDataset(x, y))
    assert model.training
    with torch.no_grad():
        logits = model.eval()(x)[y >= 0]
    known = y[y >= 0]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, known)), rel=1e-6)
    assert found["accuracy"] == metrics.accuracy_score(known, logits.argmax(1))
    recall = metrics.recall_score(known, logits.argmax(1), average=None, labels=[0, 1])
    assert found["balanced_accuracy"] == pytest.approx(recall.mean())


def test_multilabel_with_unknown_labels() -> None:
    model = network()
    x, y = torch.randn(60, 4), torch.randint(0, 2, (60, 3)).float()
    y[torch.rand(60, 3) < 0.2] = torch.nan
    y[5] = torch.nan
    y[:, 2] = torch.where(y[:, 2].isnan(), torch.nan, 0.0)  # no positive: not told
    found = evaluated(model, TensorDataset(x, y))
    assert evaluated(model, TensorDataset(x, y.nan_to_num(-1.0))) == found
    with torch.no_grad():
        logits = model(x)
    losses = F.binary_cross_entropy_with_logits(logits, y.nan_to_num(), reduction="none")
    of_samples = [float(a[~b.isnan()].mean()) for a, b in zip(losses, y, strict=True) if not b.isnan().all()]  # fmt: skip
    assert found["loss"] == pytest.approx(np.mean(of_samples), rel=1e-6)
    pairs = [(y[~y[:, c].isnan(), c], logits[~y[:, c].isnan(), c]) for c in range(2)]
    assert found["map"] == pytest.approx(
        np.mean([metrics.average_precision_score(*p) for p in pairs])
    )
    assert found["mauroc"] == pytest.approx(np.mean([metrics.roc_auc_score(*p) for p in pairs]))


def test_other_labels_are_measured_by_the_criterion() -> None:
    model = nn.Conv2d(1, 2, 3, padding=1)
    x, y = torch.randn(11, 1, 5, 5), torch.randint(0, 2, (11, 5, 5))

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)

    with torch.no_grad():
        want = float(criterion(model(x), y).mean())
    assert evaluated(model, TensorDataset(x, y), criterion) == {
        "loss": pytest.approx(want, rel=1e-6)
    }


def test_labels_of_classes_that_the_model_has_not() -> None:
    with pytest.raises(FastpieError, match="labels below 3, the classes of the model, but got 7"):
        evaluated(network(), TensorDataset(torch.randn(2, 4), torch.tensor([7, -1])))


def test_samples_without_labels() -> None:
    with pytest.raises(FastpieError, match="labels to evaluate by, but got none"):
        evaluated(network(), TensorDataset(torch.randn(5, 4)))


# ---------------------------------------------------------------------- what follows


def planned(values: list[float]) -> Any:
    """An evaluation that gives these values, epoch by epoch."""
    given = iter(values)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"score": next(given)}

    return evaluate


def test_the_best_epoch_is_kept_and_patience_ends(tmp_path: Path) -> None:
    values = [0.1, 0.4, math.nan, 0.3, 0.4, 0.9, 0.9]
    options: dict[str, Any] = {"monitor": "valid_score", "epochs": 7}
    trainer = trainer_of(tmp_path, evaluate=planned(values), patience=3, **options)
    result = trainer.fit()
    assert result.stopped_early
    assert (result.best, result.epoch) == (1, 5)
    assert [row["valid_score"] for row in result.history][:2] == [0.1, 0.4]
    two = trainer_of(epochs=2)
    two.fit()
    kept = load_file(tmp_path / "model.safetensors")
    for name, value in two.objective.model.state_dict().items():
        assert torch.equal(kept[name], value)
    again = trainer_of(tmp_path, evaluate=planned([]), patience=3, **options).fit()
    assert (again.epoch, again.stopped_early, again.best) == (5, True, 1)
    more = trainer_of(tmp_path, evaluate=planned(values[5:]), patience=4, **options).fit()
    assert (more.epoch, more.stopped_early, more.best) == (7, False, 5)
    whole = trainer_of(epochs=6)
    whole.fit()
    kept = load_file(tmp_path / "model.safetensors")
    for name, value in whole.objective.model.state_dict().items():
        assert torch.equal(kept[name], value)


def test_a_monitor_that_is_never_a_number_keeps_the_last_weights(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, evaluate=planned([math.nan] * 2), monitor="valid_score", patience=1, epochs=2
    )
    result = trainer.fit()
    assert (result.best, result.epoch, result.stopped_early) == (None, 2, False)
    kept = load_file(tmp_path / "model.safetensors")
    for name, value in trainer.objective.model.state_dict().items():
        assert torch.equal(kept[name], value)


def test_a_loss_is_better_where_it_is_lower() -> None:
    result = trainer_of(valid=Points(noise=0.0), epochs=5, lr=0.05).fit()
    losses = [row["valid_loss"] for row in result.history]
    assert result.best == int(np.argmin(losses))
    assert {"valid_accuracy", "valid_balanced_accuracy", "evaluation_seconds"} <= result.history[
        0
    ].keys()


def test_a_tie_is_no_improvement() -> None:
    result = trainer_of(evaluate=planned([0.5] * 4), monitor="valid_score", patience=2).fit()
    assert (result.best, result.epoch) == (0, 3)


def test_validation_samples_that_cannot_be_read() -> None:
    result = trainer_of(valid=Points(broken=(1, 2)), epochs=1).fit()
    assert result.history[0]["valid_unreadable"] == 2
    assert result.errors == {}


def test_a_plateau_lowers_the_learning_rate() -> None:
    objective = Supervised(network(), lambda z, y: F.cross_entropy(z, y, reduction="none"))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.8)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "scheduler": plateau,
        "epochs": 4,
        "progress": False,
    }
    with pytest.raises(FastpieError, match="for ReduceLROnPlateau"):
        Trainer(objective, Points(), **options)
    evaluate = planned([1.0, 1.0, 1.0, 1.0])

    def loss(model: nn.Module) -> dict[str, float]:
        return {"loss": evaluate(model)["score"]}

    trainer = Trainer(objective, Points(), evaluate=loss, monitor="valid_loss", **options)
    assert [row["lr"] for row in trainer.fit().history] == [0.8, 0.8, 0.4, 0.2]


def test_a_schedule_by_steps() -> None:
    objective = Supervised(network(), lambda z, y: F.cross_entropy(z, y, reduction="none"))
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = Trainer(
        objective, Points(), optimizer=optimizer, scheduler=schedule, scheduler_per_step=True,
        epochs=2, batch_size=21, progress=False,
    )  # fmt: skip
    assert [row["lr"] for row in trainer.fit().history] == [1 / 4, 1 / 7]


# ---------------------------------------------------------------------- logs


def test_the_log_is_the_history(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, log="csv", valid=Points(), attention="weights", epochs=3)
    history = trainer.fit().history
    text = (tmp_path / "log.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 3
    for row, want in zip(rows, history, strict=True):
        assert row.keys() == want.keys()
        assert {k: float(v) for k, v in row.items()} == pytest.approx(want, rel=1e-4)
    assert {"lr", "images_per_second", "mining_seconds", "valid_accuracy"} <= rows[0].keys()
    (tmp_path / "log.csv").unlink()  # as if a crash had come before it was written
    trainer_of(tmp_path, log="csv", valid=Points(), attention="weights", epochs=3).fit()
    assert (tmp_path / "log.csv").read_text() == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (2, 3):
        history = (
            trainer_of(tmp_path, log="tensorboard", valid=Points(), epochs=epochs).fit().history
        )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag, column in [("train/loss", "loss"), ("valid/valid_accuracy", "valid_accuracy")]:
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        assert [step for step, _ in found] == [0, 1, 2]
        assert [value for _, value in found] == pytest.approx([row[column] for row in history])
