"""The order of an epoch, and how it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpie import FastpieError
from fastpie.training.sampling.order import Cut, epoch_order


@pytest.mark.parametrize("samples", [1, 2, 17, 5000])
def test_an_order_is_a_permutation_of_its_own(samples: int) -> None:
    orders = [epoch_order(samples, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(samples))
    assert (orders[0] == orders[3]).all()
    if samples > 10:
        assert (orders[0] != orders[1]).any()
        assert (orders[0] != orders[2]).any()


def test_the_order_is_the_same_on_every_machine() -> None:
    """Philox's raw numbers are promised never to change."""
    key = np.random.SeedSequence(3, spawn_key=(5,)).generate_state(2, np.uint64)
    raw = np.random.Philox(key=key).random_raw(9)
    assert epoch_order(9, 3, 5).tolist() == sorted(range(9), key=lambda i: raw[i])


def test_every_place_is_uniform() -> None:
    scipy = pytest.importorskip("scipy.stats")
    firsts = np.bincount([epoch_order(8, 11, epoch)[0] for epoch in range(800)], minlength=8)
    assert scipy.chisquare(firsts).pvalue > 1e-4


def test_draws_are_in_proportion_to_the_weights() -> None:
    scipy = pytest.importorskip("scipy.stats")
    weights = torch.rand(40, dtype=torch.float64)
    weights[7] = 0
    drawn = np.concatenate([epoch_order(40, 1, epoch, weights) for epoch in range(500)])
    counts = np.bincount(drawn, minlength=40)
    assert counts[7] == 0
    kept = weights.numpy() > 0
    expected = (weights / weights.sum()).numpy() * len(drawn)
    assert scipy.chisquare(counts[kept], expected[kept]).pvalue > 1e-4


def test_draw_weights_of_another_data_set() -> None:
    with pytest.raises(FastpieError, match="40 samples, but got shape \\[39\\]"):
        epoch_order(40, 0, 0, torch.ones(39, dtype=torch.float64))


@pytest.mark.parametrize(("samples", "size", "processes"), [(61, 8, 1), (61, 8, 3), (7, 7, 7), (33, 32, 16), (5, 1, 1)])  # fmt: skip
def test_batches_and_shares_are_those_of_tensor_split(
    samples: int, size: int, processes: int
) -> None:
    cut = Cut(samples, size, processes)
    want = torch.arange(samples).tensor_split(-(-samples // size))
    assert len(cut) == len(want)
    for number, batch in enumerate(want):
        assert list(cut.batch(number)) == batch.tolist()
        for rank, share in enumerate(batch.tensor_split(processes)):
            assert list(Cut(samples, size, processes, rank).share(number)) == share.tolist()


def test_fewer_samples_than_processes() -> None:
    with pytest.raises(FastpieError, match="9 samples in batches of at most 4 leave some of 4 "):
        Cut(9, 4, 4)
