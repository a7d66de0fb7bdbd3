"""The sampler for loops of other libraries."""

from __future__ import annotations

import pytest
import torch

from fastpie import FastpieError
from fastpie.training.sampling.epoch_sampler import EpochSampler
from fastpie.training.sampling.order import epoch_order


class Draws:
    """What the sampler asks of an attention."""

    def __init__(self) -> None:
        self.weights: torch.Tensor | None = None

    def draw_weights(self) -> torch.Tensor | None:
        return self.weights


def test_the_epochs_of_the_trainer() -> None:
    sampler = EpochSampler(23, seed=4)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        assert list(sampler) == epoch_order(23, 4, epoch).tolist()
    assert len(sampler) == 23


def test_processes_share_an_epoch() -> None:
    parts = [EpochSampler(23, num_replicas=4, rank=rank) for rank in range(4)]
    drawn = [list(part) for part in parts]
    assert [len(part) for part in parts] == [6] * 4 == [len(d) for d in drawn]
    order = epoch_order(23, 0, 0).tolist()
    assert [i for row in zip(*drawn, strict=True) for i in row] == [*order, order[0]]
    assert [list(EpochSampler(2, num_replicas=5, rank=4))] == [[epoch_order(2, 0, 0)[0]]]


def test_draws_are_those_of_the_moment() -> None:
    attention = Draws()
    sampler = EpochSampler(9, attention)  # type: ignore[arg-type]
    assert sorted(sampler) == list(range(9))
    attention.weights = torch.zeros(9, dtype=torch.float64)
    attention.weights[5] = 2.0
    assert list(sampler) == [5] * 9


@pytest.mark.parametrize(("samples", "seed"), [(0, 0), (3, -1)])
def test_numbers_out_of_range(samples: int, seed: int) -> None:
    with pytest.raises(FastpieError, match="at least one sample and a `seed`"):
        EpochSampler(samples, seed=seed)
