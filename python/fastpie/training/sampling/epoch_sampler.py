"""`EpochSampler`: the order of each epoch for a `DataLoader`, drawn by what an `Attention` has mined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.utils.data import Sampler

from fastpie.errors import FastpieError
from fastpie.training.sampling.order import epoch_order

if TYPE_CHECKING:
    from fastpie.training.attention.attention import Attention

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """Indices of an epoch: a permutation, or draws by `attention.draw_weights()` as they are then.

    For loops other than `Trainer` (plain PyTorch, Lightning, Ignite). Call `set_epoch` before each
    epoch; Lightning does it by itself. Processes share one sequence: each takes every R-th index,
    the first ones once more where they do not come out even. Lightning is then to leave the sampler
    as it is: `Trainer(use_distributed_sampler=False)`.
    """

    def __init__(
        self,
        samples: int,
        attention: Attention | None = None,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            samples: of the data set, at least 1.
            attention: with `attend="oversample"`, whose draws follow each mining; else a permutation.
            seed: at least 0.
            num_replicas: processes; by default those of torch.distributed when an epoch begins.
            rank: this process; by default likewise.

        Raises:
            FastpieError: for numbers out of range.
        """
        if samples < 1 or seed < 0:
            raise FastpieError(
                "Expected at least one sample and a `seed` of at least 0, but got "
                f"{samples} and {seed}."
            )
        self.samples, self.attention, self.seed = samples, attention, seed
        self.epoch = 0
        self._replicas, self._rank = num_replicas, rank

    def set_epoch(self, epoch: int) -> None:
        """The epoch to draw next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """How many indices this process gets."""
        return (self.samples + self._processes()[0] - 1) // self._processes()[0]

    def __iter__(self) -> Iterator[int]:
        """The indices of this process."""
        weights = None if self.attention is None else self.attention.draw_weights()
        order = epoch_order(self.samples, self.seed, self.epoch, weights)
        replicas, rank = self._processes()
        for place in range(rank, len(self) * replicas, replicas):
            yield int(order[place % self.samples])

    def _processes(self) -> tuple[int, int]:
        joined = dist.is_available() and dist.is_initialized()
        replicas = self._replicas or (dist.get_world_size() if joined else 1)
        rank = self._rank if self._rank is not None else dist.get_rank() if joined else 0
        return replicas, rank
