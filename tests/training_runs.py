"""Trainings for the tests of `Trainer`: in this process, in one that is killed, in two that share it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fastpie.training.objectives.objective import Supervised
from fastpie.training.trainer.trainer import Trainer

SAMPLES = 61


class Points(Dataset[Any]):
    """Labelled points with noise from the generators of Python, NumPy and torch; some unreadable."""

    def __init__(self, broken: Sequence[int] = (), pause: float = 0.0, noise: float = 0.1) -> None:
        self.broken, self.pause, self.noise = broken, pause, noise
        self.sample_ids = [f"case-{i}" for i in range(SAMPLES)]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.pause)
        if index in self.broken:
            raise OSError(f"cannot read {index}")
        point = torch.randn(4, generator=torch.Generator().manual_seed(index))
        noise = torch.tensor([random.random(), np.random.rand(), *torch.rand(2).tolist()])  # noqa: NPY002
        return point + self.noise * noise, index % 3, f"case-{index}"


class MovingAttention:
    """Weights, hard samples and, if asked, draws that follow the model; forgotten unless restored."""

    def __init__(self, model: nn.Module, draws: bool = False) -> None:
        self.model, self.draws = model, draws
        self.scores = torch.ones(SAMPLES, dtype=torch.float64)
        self.places = {f"case-{i}": i for i in range(SAMPLES)}
        self.epochs: list[int] = []

    def step(self, epoch: int) -> bool:
        total = sum(float(p.detach().double().sum()) for p in self.model.parameters())
        self.scores = self.scores / 2 + (torch.arange(SAMPLES) * 0.7 + total).sin().abs() + 0.1
        self.epochs.append(epoch)
        return True

    def _of(self, ids: Sequence[str]) -> Tensor:
        return self.scores[[self.places[i] for i in ids]]

    def weights(self, ids: Sequence[str]) -> Tensor:
        return torch.ones(len(ids)) if self.draws else self._of(ids).float()

    def hard(self, ids: Sequence[str]) -> Tensor:
        return self._of(ids) > self.scores.median()

    def draw_weights(self, ids: Any = None) -> Tensor | None:
        return self.scores if self.draws else None

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "epochs": list(self.epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.epochs = state["scores"].clone(), list(state["epochs"])


class Mean(Supervised):
    """Cross-entropy, and a buffer that changes when an epoch begins and after each step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, lambda z, y: F.cross_entropy(z, y, reduction="none"))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("begun", torch.zeros(()))

    def begin_epoch(self, epoch: int) -> None:
        first = next(self.model.parameters()).detach()
        self.begun.copy_(first.sum() + torch.rand(()))

    def after_step(self) -> None:
        self.mean.mul_(0.9).add_(next(self.model.parameters()).detach().mean() + self.begun)


def network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(4, 16), *norms, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def trainer_of(
    out: Any = None,
    *,
    broken: Sequence[int] = (),
    pause: float = 0.0,
    dropout: float = 0.0,
    norm: bool = False,
    attention: str = "",
    data: Any = None,
    lr: float = 0.02,
    epochs: int = 4,
    batch_size: int = 8,
    **options: Any,
) -> Trainer:
    """A small training; `attention` is "", "weights" or "draws"."""
    objective = Mean(network(dropout, norm))
    optimizer = torch.optim.SGD(objective.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return Trainer(
        objective,
        Points(broken, pause) if data is None else data,
        optimizer=optimizer,
        scheduler=scheduler,
        epochs=epochs,
        batch_size=batch_size,
        attention=MovingAttention(objective.model, attention == "draws") if attention else None,
        out=out,
        progress=False,
        **options,
    )


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that is trained or kept, of tensors."""
    state = {f"objective.{k}": v.clone() for k, v in trainer.objective.state_dict().items()}
    for i, slots in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{i}.{k}": v.clone() for k, v in slots.items() if isinstance(v, Tensor)}
    if trainer.attention is not None:
        state["attention"] = trainer.attention.scores
    return state


def check_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------------ in other processes


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A process forked from a server that has imported all of this already."""
    context = multiprocessing.get_context("forkserver")
    # The first step of an optimizer imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload(["fastpie.training.trainer.trainer", "torch._dynamo"])
    process = context.Process(target=_alone, args=(target, arguments))
    process.start()
    return process


def _alone(target: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)
    target(*arguments)


def train(folder: Path, options: dict[str, Any]) -> None:
    """A training to its end; `final.pt` beside its folder tells of it, `begun` of its beginning."""
    trainer = trainer_of(folder, **options)
    folder.with_suffix(".begun").touch()
    trainer.fit()
    torch.save(state_of(trainer), folder.with_suffix(".final.pt"))


def train_shared(
    rank: int,
    processes: int,
    store: Path,
    folder: Path | None,
    final: Path,
    options: dict[str, Any],
) -> None:
    """One of several processes that train together."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    trainer = trainer_of(folder, **options)
    result = trainer.fit()
    torch.save(
        {"state": state_of(trainer), "history": result.history, "errors": result.errors},
        final.with_suffix(f".{rank}.pt"),
    )
    dist.destroy_process_group()
