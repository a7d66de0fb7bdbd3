"""Loss weights from a mined table."""

import numpy as np
import pytest
import torch

import fastpie
from fastpie.training import hardness_weights


class Rows(torch.utils.data.Dataset):
    sample_ids = [f"r{i:02d}" for i in range(40)]  # noqa: RUF012

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    return fastpie.mine(torch.nn.Linear(4, 3), Rows(), tmp_path / "run", progress=False)


def test_weights_rise_with_rank_and_have_mean_one(run):
    weights = hardness_weights(run, strength=4.0)
    hardest_first = [weights[i] for i in run.select(1.0)]
    assert sorted(hardest_first, reverse=True) == hardest_first
    assert np.mean(hardest_first) == pytest.approx(1)
    assert hardest_first[0] / hardest_first[-1] == pytest.approx(5)


def test_doubtful_samples_are_left_out(run):
    weights = hardness_weights(run, doubtful=0.1)
    out = set(run.select(0.1))
    assert {i for i, w in weights.items() if w == 0} == out
    assert len(out) == 4
    assert np.mean(list(weights.values())) == pytest.approx(1)


def test_strength_zero_is_plain_training(run):
    assert set(hardness_weights(run, strength=0).values()) == {1.0}


@pytest.mark.parametrize("bad", [{"strength": -1}, {"strength": float("nan")}, {"doubtful": 1.0}])
def test_bad_options_are_refused(run, bad):
    with pytest.raises(fastpie.FastpieError, match=next(iter(bad))):
        hardness_weights(run, **bad)
