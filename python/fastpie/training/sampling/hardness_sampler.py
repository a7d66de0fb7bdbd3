"""`HardnessSampler`: draws the samples of an epoch by what a run found hard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from fastpie._checks import whole_number
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.training.sampling.draws import BLOCK, WeightedDraws
from fastpie.training.sampling.positions import rows_of_samples
from fastpie.training.sampling.weights import rank_weights

__all__ = ["HardnessSampler"]

_LIST = 2**14  # indices that are Python objects at a time


class HardnessSampler(Sampler[int]):
    """Indices into a data set, hard samples more often, with replacement; for a `DataLoader`.

    A sample comes with a probability in proportion to `w ** (1 / temperature)`, `w` being its weight
    of `hardness_weights`. One sequence is drawn for all processes, and process r of R takes the draws
    r, r + R, r + 2R, ...; every process gets as many, the sequence being as much longer as it takes.

    A draw depends on seed, epoch and its place in the sequence alone, by a counter-based generator
    (Philox), so it is the same on any machine and any place is reached at once. The table of
    probabilities (`fastpie.ops.alias_table`) is exact for any number of samples, in fp64. Memory: 16
    bytes a sample, some more while it is made.

    Call `set_epoch` before each epoch; an epoch that is not announced repeats the one before. To
    resume, restore `state_dict()`: the next iteration goes on behind the last index that was handed
    out, and after that iterations start at the beginning again. With a DataLoader's own workers
    indices are handed out before their batch is used; torchdata's `StatefulDataLoader` accounts for
    that. The state is the same in all processes that have taken as many.
    """

    def __init__(
        self,
        result: MiningResult,
        temperature: float = 1.0,
        *,
        dataset: Any = None,
        by: str = "hardness",
        strength: float = 4.0,
        doubtful: float = 0.0,
        unscored: str = "leave_out",
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Read the scores and make the table of probabilities.

        Args:
            result: a mined run.
            temperature: above 0. 1 draws by the weights; higher is flatter, `math.inf` draws all of
                weight above 0 alike; towards 0 the hardest sample alone is left.
            dataset: the one to draw from, or its sample ids in order: a data set that tells them
                without reading samples, as `mine` takes it. None for the data set that was mined, in
                the order in which it was then. It may hold fewer or more samples than were mined.
            by: the column to rank by, as in `MiningResult.select`.
            strength: how much more weight the hardest sample has than the easiest.
            doubtful: fraction of the hardest samples to leave out, in [0, 1).
            unscored: what becomes of samples of the data set without a score (see `result.errors`):
                "leave_out", or "mean" for the mean of the others' weights, temperature included.
            num_samples: draws in an epoch, in all processes together; by default as many as the data
                set has samples.
            seed: at least 0.
            num_replicas: processes that share an epoch; by default those of torch.distributed where
                that is initialised, else 1.
            rank: this process, in [0, num_replicas); by default as above, else 0.

        Raises:
            FastpieError: for bad arguments, a run that does not tell where its samples are in the
                data set (pass `dataset`), or if no sample is left to draw.
        """
        if not temperature > 0:
            raise FastpieError(f"Expected `temperature` above 0, but got {temperature}.")
        if unscored not in ("leave_out", "mean"):
            raise FastpieError(
                f"Expected `unscored` to be 'leave_out' or 'mean', but got {unscored!r}."
            )
        self.seed = whole_number("seed", seed, 0)
        self.epoch = 0
        self.num_replicas, self.rank = _replica(num_replicas, rank)
        weights = _weights(result, temperature, dataset, by, strength, doubtful, unscored)
        if not weights.any():
            raise FastpieError(
                f"Expected samples with a weight above 0, but none of the {len(weights)} has one."
            )
        self.num_samples = whole_number(
            "num_samples", len(weights) if num_samples is None else num_samples, 1
        )
        self._draws = WeightedDraws(weights)
        self._digest: str | None = None
        self._position = 0  # of this process: indices handed out
        self._start = 0  # of the next iteration

    def __len__(self) -> int:
        """How many indices this process gets in an epoch."""
        return (self.num_samples + self.num_replicas - 1) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """The epoch to draw next. One that is new starts at its beginning."""
        if whole_number("epoch", epoch, 0) != self.epoch:
            self.epoch = epoch
            self._position = self._start = 0

    def __iter__(self) -> Iterator[int]:
        """The indices of this process."""
        position, self._start = self._start, 0
        self._position = position
        key = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,)).generate_state(
            2, np.uint64
        )
        while position < len(self):
            block, offset = divmod(position * self.num_replicas + self.rank, BLOCK)
            last = min(BLOCK, len(self) * self.num_replicas - block * BLOCK)
            drawn = self._draws.block(key, block, last, offset, self.num_replicas)
            for first in range(0, len(drawn), _LIST):
                for index in drawn[first : first + _LIST].tolist():
                    position += 1
                    self._position = position
                    yield index

    def state_dict(self) -> dict[str, Any]:
        """Where this sampler is; numbers and text alone."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`; the next iteration starts there.

        Raises:
            FastpieError: if the state is of a sampler with other weights, another number of draws or
                another number of processes.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise FastpieError(
                    f"Expected the state of a sampler with {name} {value!r}, but got "
                    f"{state.get(name)!r}. Make the sampler as it was, from the same run."
                )
        self.seed = whole_number("seed", state["seed"], 0)
        self.epoch = whole_number("epoch", state["epoch"], 0)
        self._position = self._start = min(
            whole_number("position", state["position"], 0), len(self)
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same draws."""
        if self._digest is None:
            self._digest = self._draws.digest()
        return {
            "num_samples": self.num_samples,
            "num_replicas": self.num_replicas,
            "weights": self._digest,
        }


def _weights(
    result: MiningResult,
    temperature: float,
    dataset: Any,
    by: str,
    strength: float,
    doubtful: float,
    unscored: str,
) -> np.ndarray:  # fp64 [samples of the data set]
    hardest_first = result.select_rows(1.0, by=by)
    by_row = np.empty(len(hardest_first))
    by_row[hardest_first] = rank_weights(len(hardest_first), strength, doubtful)
    del hardest_first  # of 100 million rows 800 MB
    rows = rows_of_samples(result, dataset)
    scored = rows >= 0
    weights = by_row[rows[scored]]
    # 0 stays 0 at any temperature. The largest becomes 1, so that nothing overflows.
    weights /= weights.max(initial=0) or 1
    np.power(weights, 1 / temperature, out=weights, where=weights > 0)
    found = np.zeros(len(rows))
    found[scored] = weights
    if unscored == "mean" and len(weights):
        found[~scored] = weights.mean()
    return found


def _replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    distributed = torch.distributed
    initialised = distributed.is_available() and distributed.is_initialized()
    if num_replicas is None:
        num_replicas = distributed.get_world_size() if initialised else 1
    if rank is None:
        rank = distributed.get_rank() if initialised else 0
    whole_number("num_replicas", num_replicas, 1)
    if whole_number("rank", rank, 0) >= num_replicas:
        raise FastpieError(
            f"Expected `rank` below `num_replicas` ({num_replicas}), but got {rank}."
        )
    return num_replicas, rank
