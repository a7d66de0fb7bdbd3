"""A sequence of weighted draws that can be entered anywhere."""

from __future__ import annotations

import numpy as np
import torch

from fastpie._digest import digest_of
from fastpie.errors import FastpieError
from fastpie.ops import alias_table

__all__ = ["BLOCK", "WeightedDraws"]

BLOCK = 2**20
"""Draws that share a run of random numbers: 16 MiB of them."""


class WeightedDraws:
    """Draws with replacement, entry i in proportion to weights[i], exact in fp64.

    A draw depends on the key and its place in the sequence alone: Philox numbers are counted, so
    each block of draws has its own stretch of them. They are taken raw, as 64-bit numbers, which is
    what NumPy promises never to change (its distributions may).
    """

    def __init__(self, weights: np.ndarray) -> None:
        """Make the table.

        Args:
            weights: fp64 [n], finite, at least 0, not all 0; n below 2^32.

        Raises:
            FastpieError: for other weights.
        """
        if len(weights) >= 2**32:
            raise FastpieError(f"Expected fewer than 2^32 samples, but got {len(weights)}.")
        probability, alias = alias_table(torch.from_numpy(weights))
        self.probability: np.ndarray = probability.numpy()
        self.alias: np.ndarray = alias.numpy()

    def digest(self) -> str:
        """A hash of the table."""
        tables = {"probability": self.probability, "alias": self.alias}
        return digest_of({name: torch.from_numpy(table) for name, table in tables.items()})

    def block(
        self, key: np.ndarray, number: int, count: int = BLOCK, first: int = 0, step: int = 1
    ) -> np.ndarray:  # int64
        """Every `step`-th draw of one block.

        Args:
            key: uint64 [2], which sequence.
            number: of the block: draws number * BLOCK and on.
            count: of the block's draws to make, at most BLOCK.
            first: draw to return.
            step: from one draw returned to the next.
        """
        counter = np.array([0, number, 0, 0], np.uint64)
        raw = np.random.Philox(key=key, counter=counter).random_raw(2 * count)
        raw = raw.reshape(count, 2)[first::step]
        # floor(raw * n / 2^64), by halves of 32 bits: uniform but for less than 2^-32 of itself.
        n, half = np.uint64(len(self.probability)), np.uint64(32)
        high, low = raw[:, 0] >> half, raw[:, 0] & np.uint64(2**32 - 1)
        index = ((high * n + (low * n >> half)) >> half).astype(np.int64)
        uniform = (raw[:, 1] >> np.uint64(11)) * 2.0**-53
        drawn: np.ndarray = np.where(uniform < self.probability[index], index, self.alias[index])
        return drawn
