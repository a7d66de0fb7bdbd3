"""How far a training is: what its checkpoint holds besides tensors, and what `fit` returns."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from typing_extensions import Self

from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Problem, path_of
from fastpie.training.trainer.feed import Feed

__all__ = ["Progress", "TrainResult"]


@dataclass
class TrainResult:
    """What a training came to.

    Attributes:
        history: a row an epoch, by name: `epoch`, `loss` (mean over samples of the weighted loss),
            `images` (of the steps taken), `unreadable` (samples left out), `skipped_steps`
            (gradients not finite), `skipped_batches` (nothing readable in some process), `lr`, `seconds` and
            `images_per_second` of the steps, what `valid` or `evaluate` found (`valid_loss`, ...),
            `evaluation_seconds`, `mining_seconds`, and of a GPU its utilisation, power and memory.
        best: the epoch whose `monitor` is best; None without one.
        epoch: how many epochs are done.
        stopped_early: whether `patience` ended it.
        errors: samples that could not be read: by id `path`, `stage`, `error`, `epoch` (the first).
    """

    history: list[dict[str, Any]]
    best: int | None
    epoch: int
    stopped_early: bool
    errors: dict[str, dict[str, Any]]


@dataclass
class Progress:
    """Where a training is; plain values alone.

    Attributes:
        epoch: the one that is trained or comes next.
        begun: whether the epoch has begun: what is done before its first batch.
        batch: the batch of it that comes next.
        loss: sum of the epoch's weighted losses so far, of this process.
        images: of the epoch's steps that were taken so far, in all processes.
        seconds: of the epoch's steps so far.
        skipped_steps: of the epoch.
        skipped_batches: of the epoch.
        unreadable: of the epoch, of this process.
        not_finite: steps in a row that were not taken.
        best: epoch.
        best_value: of the monitor.
        stopped_early: by `patience`.
        history: see `TrainResult`.
        errors: see `TrainResult`.
    """

    epoch: int = 0
    begun: bool = False
    batch: int = 0
    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_batches: int = 0
    unreadable: int = 0
    not_finite: int = 0
    best: int | None = None
    best_value: float = math.nan
    stopped_early: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def begin_epoch(self) -> None:
        """No batch of the epoch is done."""
        self.begun = True
        self.batch = self.images = self.skipped_steps = self.skipped_batches = self.unreadable = 0
        self.loss = self.seconds = 0.0

    def note(self, feed: Feed, problems: list[Problem]) -> None:
        """Remember samples that could not be read."""
        self.unreadable += len(problems)
        for index, stage, error in problems:
            path = path_of(feed.dataset, index)
            row = {"path": path, "stage": stage, "error": error, "epoch": self.epoch}
            self.errors.setdefault(feed.sample_id(index), row)

    def share_errors(self, ranks: Ranks, samples: int) -> int:
        """Let every process know what could not be read, and the user; how many in this epoch."""
        unreadable = ranks.sum([self.unreadable])[0]
        known: dict[str, dict[str, Any]] = {}
        for of_one in ranks.all(self.errors):
            known = {**of_one, **known}
        self.errors = dict(sorted(known.items()))
        new = [k for k, row in self.errors.items() if row["epoch"] == self.epoch]
        if new and not ranks.rank:
            warnings.warn(
                f"{unreadable} of {samples} samples could not be read in epoch {self.epoch} and were "
                f"left out, for example {new[0]!r}: {self.errors[new[0]]['error']}",
                stacklevel=6,
            )
        return unreadable

    def improved(self, value: float, *, lower: bool) -> bool:
        """Whether the epoch is the best so far, which is kept."""
        better = value < self.best_value if lower else value > self.best_value
        if math.isnan(value) or not (self.best is None or better):
            return False
        self.best, self.best_value = self.epoch, value
        return True

    def be_patient(self, patience: int | None) -> None:
        """Stop early where so many epochs, or more, were no better than the best one before."""
        waited = 0 if self.best is None else self.epoch - 1 - self.best
        self.stopped_early = patience is not None and waited >= patience

    def result(self) -> TrainResult:
        """What `fit` returns."""
        return TrainResult(
            [dict(row) for row in self.history],
            self.best,
            self.epoch,
            self.stopped_early,
            {k: dict(v) for k, v in self.errors.items()},
        )

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        """As it was."""
        return cls(**{f.name: state[f.name] for f in fields(cls)})
