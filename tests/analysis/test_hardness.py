"""Intervals of hardness against a literal bootstrap, and how often they hold the truth."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import fastpie
from fastpie import FastpieError
from fastpie.analysis.hardness import hardness_interval, hardness_values


def test_hardness_interval_literally():
    values = np.random.default_rng(8).normal(0, 1, (6, 3)).astype(np.float32)
    low, high = hardness_interval(values, resamples=4000, seed=3)
    generator = np.random.default_rng(3)
    shares = generator.multinomial(6, [1 / 6] * 6, 4000) / 6
    tail = stats.norm.cdf(stats.t.ppf(0.025, 5) * math.sqrt(6 / 5))
    for n in range(3):
        means = [
            sum(w * float(v) for w, v in zip(row, values[:, n], strict=True)) for row in shares
        ]
        assert low[n] == pytest.approx(np.quantile(means, tail))
        assert high[n] == pytest.approx(np.quantile(means, 1 - tail))
    again = hardness_interval(values, resamples=4000, seed=3)
    assert np.array_equal(again[0], low)
    assert not np.array_equal(hardness_interval(values, resamples=4000)[0], low)


def test_hardness_intervals_hold_the_truth_at_the_nominal_rate():
    generator = np.random.default_rng(9)
    for models, least in ((5, 0.88), (10, 0.92), (30, 0.93)):
        low, high = hardness_interval(generator.normal(0, 1, (models, 4000)))
        covered = ((low <= 0) & (high >= 0)).mean()
        assert least < covered < 0.97, models


def test_intervals_do_not_depend_on_the_pieces(monkeypatch):
    values = np.random.default_rng(10).random((4, 50))
    whole = hardness_interval(values, resamples=100)
    monkeypatch.setattr("fastpie.analysis.hardness._CHUNK", 700)
    for a, b in zip(hardness_interval(values, resamples=100), whole, strict=True):
        assert np.allclose(a, b, rtol=1e-14)


def test_without_a_second_value_or_with_nan_there_is_no_interval():
    assert np.isnan(hardness_interval(np.ones((1, 3)))).all()
    values = np.ones((4, 3))
    values[2, 1] = np.nan
    low, high = hardness_interval(values)
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, True, False]
    assert low[0] == high[0] == 1
    assert hardness_interval(np.ones((4, 0)))[0].shape == (0,)
    with pytest.raises(FastpieError, match="values"):
        hardness_interval(np.ones(3))
    with pytest.raises(FastpieError, match="resamples"):
        hardness_interval(values, resamples=0)


class Images(torch.utils.data.Dataset):
    sample_ids = [f"s{i:02d}" for i in range(20)]  # noqa: RUF012

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


def dual(seed, sparsity):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    return fastpie.DualModel(model, fastpie.prune(model, sparsity))


def test_the_values_behind_a_runs_hardness(tmp_path: Path) -> None:
    ladder = fastpie.mine(dual(0, [0.3, 0.8]), Images(), tmp_path / "ladder", progress=False)
    values, kind = hardness_values(ladder)
    assert (values.shape, kind) == ((2, 20), "level")
    assert np.allclose(values.mean(0), ladder.table.column("hardness").to_numpy(), rtol=1e-6)
    duals = [dual(s, 0.8) for s in range(2)]
    several = fastpie.mine(duals, Images(), tmp_path / "several", progress=False)
    values, kind = hardness_values(str(tmp_path / "several"))
    assert (values.shape, kind) == ((2, 20), "model")
    hardness = several.table.column("hardness").to_numpy()
    assert np.allclose(values.mean(0), hardness, rtol=1e-6)
    low, high = hardness_interval(values)
    assert ((low <= hardness) & (hardness <= high)).all()
    single = several.members[0]
    assert np.array_equal(hardness_values(single)[0][0], values[0])
