"""Which samples an epoch trains on, in which order, in which batches, and whose share is which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpie.errors import FastpieError
from fastpie.training.sampling.draws import BLOCK, WeightedDraws

__all__ = ["Cut", "epoch_order"]


def epoch_order(
    samples: int, seed: int, epoch: int, weights: Any = None
) -> np.ndarray:  # int64 [samples]
    """The samples of an epoch: a permutation, or as many weighted draws with replacement.

    A function of its arguments alone, the same on every machine: Philox numbers, taken raw.

    Args:
        samples: N.
        seed: at least 0.
        epoch: at least 0.
        weights: fp64 [N], finite, at least 0, not all 0: what each draw is in proportion to. None
            for a uniform permutation.

    Raises:
        FastpieError: for other weights.
    """
    key = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(2, np.uint64)
    if weights is None:
        # Sorting random numbers of 64 bits; of equal ones, below 1e-5 even for 10 million, the
        # first goes first.
        order: np.ndarray = np.random.Philox(key=key).random_raw(samples).argsort(kind="stable")
        return order.astype(np.int64, copy=False)
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (samples,):
        raise FastpieError(
            f"Expected a draw weight for each of {samples} samples, but got shape "
            f"{list(values.shape)}."
        )
    draws = WeightedDraws(values)
    blocks = [
        draws.block(key, number, min(BLOCK, samples - number * BLOCK))
        for number in range(-(-samples // BLOCK))
    ]
    return np.concatenate(blocks)


@dataclass(frozen=True)
class Cut:
    """An epoch cut into ceil(N / B) batches whose sizes differ by at most 1, and these into shares.

    No batch is a tiny rest, and the batches are the same for any number of processes: each takes
    its share of every one.

    Attributes:
        samples: N, of the epoch.
        batch_size: B, the most samples in a batch, of all processes together.
        processes: that share each batch.
        rank: of this process.
    """

    samples: int
    batch_size: int
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """Check that every process gets a sample of every batch.

        Raises:
            FastpieError: if some would get none.
        """
        if self.samples // max(len(self), 1) < self.processes:
            raise FastpieError(
                f"Expected at least one sample a process in every batch, but {self.samples} samples "
                f"in batches of at most {self.batch_size} leave some of {self.processes} processes "
                "without. Use larger batches or fewer processes."
            )

    def __len__(self) -> int:
        """How many batches."""
        return (self.samples + self.batch_size - 1) // self.batch_size

    def batch(self, number: int) -> range:
        """The places in the epoch of a batch."""
        return _piece(range(self.samples), len(self), number)

    def share(self, number: int) -> range:
        """The places of this process in a batch."""
        return _piece(self.batch(number), self.processes, self.rank)


def _piece(whole: range, pieces: int, number: int) -> range:
    """As `torch.tensor_split` cuts."""
    size, longer = divmod(len(whole), pieces)
    first = number * size + min(number, longer)
    return whole[first : first + size + (number < longer)]
