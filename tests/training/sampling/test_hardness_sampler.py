"""`HardnessSampler`: what is drawn, how it is shared, how it resumes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset, Subset

import fastpie
from fastpie import FastpieError, HardnessSampler
from fastpie.training import hardness_weights
from fastpie.training.sampling import hardness_sampler
from fastpie.training.sampling.draws import BLOCK, WeightedDraws

COUNT = 40
IDS = [f"s{i:02d}" for i in range(COUNT)]
ORDER = np.random.default_rng(5).permutation(COUNT)  # ORDER[k]: the index of the k-th id
ERRORS = (3, 17)  # of the sorted ids


class Images(Dataset[Any]):
    def __init__(self, sample_ids: Sequence[Any]) -> None:
        self.sample_ids = sample_ids

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> int:
        return index


def write_run(folder: Path, ids: Sequence[str], failed: Sequence[int] = ()) -> fastpie.MiningResult:
    """A run over sorted ids in three parts, hardness at random."""
    (folder / "scores").mkdir(parents=True)
    scored = [i for i in range(len(ids)) if i not in failed]
    hardness = np.random.default_rng(1).random(len(scored)).astype(np.float32)
    table = pa.table({"sample_id": [ids[i] for i in scored], "hardness": hardness})
    for part, (first, last) in enumerate(itertools.pairwise([0, 10, 11, len(scored)])):
        path = folder / "scores" / f"part-{part:06d}.parquet"
        pq.write_table(table.slice(first, last - first), path)
    (folder / "run.json").write_text(json.dumps({"format": "fastpie-run-2", "config": {}}))
    return fastpie.MiningResult(folder)


def write_order(folder: Path, ids: Sequence[str], index: Sequence[int]) -> None:
    table = pa.table({
        "sample_id": pa.array(ids, pa.large_string()), "index": pa.array(index, pa.int64())
    }).replace_schema_metadata({"source": "data set", "digest": ""})  # fmt: skip
    with pa.ipc.new_file(str(folder / "samples.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


@pytest.fixture
def run(tmp_path: Path) -> fastpie.MiningResult:
    result = write_run(tmp_path / "run", IDS, ERRORS)
    write_order(result.path, IDS, ORDER)
    return result


def expected(run: fastpie.MiningResult, temperature: float = 1.0, **options: Any) -> np.ndarray:
    """Probabilities by index."""
    weights = hardness_weights(run, **options)
    found = np.zeros(COUNT)
    for name, index in zip(IDS, ORDER, strict=True):
        weight = weights.get(name, 0)
        found[index] = weight ** (1 / temperature) if weight else 0
    return found / found.sum()


def set_block(draws_of_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardness_sampler, "BLOCK", draws_of_one)


def counts(drawn: HardnessSampler, size: int = COUNT) -> np.ndarray:
    return np.bincount(list(drawn), minlength=size)


def fits(counted: np.ndarray, probability: np.ndarray) -> bool:
    assert (counted[probability == 0] == 0).all()
    possible = probability > 0
    test = stats.chisquare(counted[possible], counted.sum() * probability[possible])
    return bool(test.pvalue > 1e-3)


@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        (1.0, {}),
        (1.0, {"strength": 20.0, "doubtful": 0.1}),
        (0.3, {"strength": 1.0}),
        (5.0, {}),
        (math.inf, {"doubtful": 0.25}),
        (1.0, {"strength": 0.0}),
    ],
)
def test_draws_are_by_the_weights(
    run: fastpie.MiningResult, temperature: float, options: dict[str, float]
) -> None:
    drawn = HardnessSampler(run, temperature, num_samples=200_000, seed=7, **options)
    counted = counts(drawn)
    assert counted.sum() == len(drawn) == 200_000
    assert fits(counted, expected(run, temperature, **options))
    if not options:  # the test sees a difference where there is one
        possible = expected(run) > 0
        assert not fits(counted, possible / possible.sum())


def test_the_coldest_draws_the_hardest_alone(run: fastpie.MiningResult) -> None:
    hardest = int(ORDER[IDS.index(run.select(0.05)[0])])
    assert set(HardnessSampler(run, 1e-300)) == {hardest}


def test_samples_without_a_score(run: fastpie.MiningResult) -> None:
    failed = {int(ORDER[i]) for i in ERRORS}
    assert not failed & set(HardnessSampler(run, num_samples=20_000))
    probability = expected(run)
    probability[list(failed)] = probability[probability > 0].mean()
    counted = counts(HardnessSampler(run, num_samples=100_000, unscored="mean"))
    assert fits(counted, probability / probability.sum())


# ---------------------------------------------------------------------------- ids to indices


def test_a_data_set_brings_its_own_order(run: fastpie.MiningResult) -> None:
    want = list(HardnessSampler(run, num_samples=500))
    by_index = [IDS[k] for k in np.argsort(ORDER)]
    for given in (
        Images(by_index), by_index, np.array(by_index), pa.array(by_index),
        pa.chunked_array([by_index[:9], by_index[9:]]),
    ):  # fmt: skip
        assert list(HardnessSampler(run, dataset=given, num_samples=500)) == want
    subset = Subset(Images(by_index), range(30))
    assert set(HardnessSampler(run, dataset=subset, num_samples=5000)) == {
        i for i in range(30) if i not in [ORDER[e] for e in ERRORS]
    }
    twice = HardnessSampler(run, dataset=[*by_index, "new", by_index[0]], num_samples=10_000)
    drawn = counts(twice, COUNT + 2)
    assert drawn[COUNT] == 0
    assert drawn[COUNT + 1] > 0


def test_runs_that_do_not_tell_the_order(tmp_path: Path, run: fastpie.MiningResult) -> None:
    with pytest.raises(FastpieError, match="Pass `dataset`"):
        HardnessSampler(write_run(tmp_path / "old", IDS))
    with pytest.raises(FastpieError, match="none of the 1 has one"):
        HardnessSampler(run, dataset=run.select(0.03), doubtful=0.1)
    with pytest.raises(FastpieError, match="none of its 2 samples"):
        HardnessSampler(run, dataset=["x", "y"])
    with pytest.raises(FastpieError, match="TensorDataset"):
        HardnessSampler(run, dataset=torch.utils.data.TensorDataset(torch.zeros(3)))
    write_order(run.path, IDS[:-1], ORDER[:-1])
    with pytest.raises(FastpieError, match=r"samples\.arrow"):
        HardnessSampler(run)
    write_order(run.path, IDS, ORDER + 1)
    with pytest.raises(FastpieError, match="others"):
        HardnessSampler(run)


def test_a_run_of_mine(tmp_path: Path) -> None:
    class Rows(Images):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3

    data = Rows([f"r{i * 7 % 40:02d}" for i in range(40)])  # in another order than the ids'
    result = fastpie.mine(torch.nn.Linear(4, 3), data, tmp_path / "run", progress=False)
    drawn = HardnessSampler(result, dataset=data, num_samples=50_000)
    weights = hardness_weights(result)
    want = np.array([weights[i] for i in data.sample_ids])
    assert fits(counts(drawn), want / want.sum())
    loader = DataLoader(data, batch_size=8, sampler=HardnessSampler(result, dataset=data))
    assert sum(len(labels) for _, labels in loader) == 40
    assert list(HardnessSampler(result)) == list(HardnessSampler(result, dataset=data))


# ---------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("blocks", [64, 2**20])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_processes_share_one_sequence(
    replicas: int, blocks: int, run: fastpie.MiningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_block(blocks, monkeypatch)
    shares = [
        list(HardnessSampler(run, num_samples=500, num_replicas=replicas, rank=rank, seed=3))
        for rank in range(replicas)
    ]
    assert len({len(share) for share in shares}) == 1
    together = [index for row in zip(*shares, strict=True) for index in row]
    assert len(together) == math.ceil(500 / replicas) * replicas
    assert together == list(HardnessSampler(run, num_samples=len(together), seed=3))
    assert together[:500] == list(HardnessSampler(run, num_samples=500, seed=3))


def test_torch_distributed_tells_the_shares(
    run: fastpie.MiningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert list(HardnessSampler(run)) == list(HardnessSampler(run, num_replicas=3, rank=2))


# ---------------------------------------------------------------------------- epochs, resuming


def test_epochs_and_seeds_differ_and_repeat(run: fastpie.MiningResult) -> None:
    drawn = HardnessSampler(run, num_samples=300)
    first, again = list(drawn), list(drawn)
    assert first == again
    drawn.set_epoch(1)
    second = list(drawn)
    assert first != second
    drawn.set_epoch(0)
    assert list(drawn) == first
    others = [list(HardnessSampler(run, num_samples=300, seed=seed)) for seed in (1, 2, 2**40)]
    assert len({tuple(x) for x in (first, second, *others)}) == 5


def test_the_sequence_is_the_same_on_any_machine(run: fastpie.MiningResult) -> None:
    """Of the draws, an index and a fraction from two raw numbers each; seed and epoch make the key."""
    drawn = HardnessSampler(run, num_samples=3, seed=12)
    drawn.set_epoch(4)
    key = np.random.SeedSequence(12, spawn_key=(4,)).generate_state(2, np.uint64)
    raw = [int(x) for x in np.random.Philox(key=key).random_raw(6)]
    want = []
    for draw in range(3):
        index = raw[2 * draw] * COUNT >> 64
        stays = (raw[2 * draw + 1] >> 11) / 2**53 < drawn._draws.probability[index]
        want.append(index if stays else int(drawn._draws.alias[index]))
    assert list(drawn) == want


def test_indices_beyond_2_to_the_24(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2**32 - 1
    drawn = WeightedDraws(np.ones(1))
    monkeypatch.setattr(drawn, "probability", np.broadcast_to(1.0, count))
    monkeypatch.setattr(drawn, "alias", np.broadcast_to(0, count))
    key = np.array([3, 2**63], np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([0, 9, 0, 0], np.uint64)).random_raw(20_000)
    assert drawn.block(key, 9, 10_000).tolist() == [int(x) * count >> 64 for x in raw[::2]]


def test_more_than_one_block() -> None:
    drawn = WeightedDraws(np.array([1.0, 0.0, 3.0]))
    blocks = [drawn.block(np.array([1, 1], np.uint64), number) for number in range(2)]
    assert not np.array_equal(*blocks)
    for block in blocks:
        assert len(block) == BLOCK
        assert np.bincount(block)[2] / BLOCK == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("blocks", [64, 2**20])
@pytest.mark.parametrize(("replicas", "rank"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("stop", [0, 1, 31, 64, 65, 150, 166])
def test_a_stopped_epoch_goes_on(
    stop: int, replicas: int, rank: int, blocks: int,
    run: fastpie.MiningResult, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_block(blocks, monkeypatch)

    def make(seed: int = 0) -> HardnessSampler:
        return HardnessSampler(run, num_samples=498, num_replicas=replicas, rank=rank, seed=seed)

    undisturbed = make()
    undisturbed.set_epoch(2)
    whole, following = list(undisturbed), list(undisturbed)
    assert whole == following
    stop = min(stop, len(whole))
    stopped = make()
    stopped.set_epoch(2)
    head = list(itertools.islice(stopped, stop))
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["position"] == stop
    resumed = make(seed=99)  # the state brings its own
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(2)  # as a training loop says at the start of each epoch
    assert head + list(resumed) == whole
    assert list(resumed) == whole  # from the beginning again
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # another epoch is another beginning
    undisturbed.set_epoch(3)
    assert list(resumed) == list(undisturbed)


def test_states_of_other_samplers_are_refused(run: fastpie.MiningResult) -> None:
    state = HardnessSampler(run, num_samples=100).state_dict()
    for options in (
        {"num_samples": 99}, {"strength": 1.0}, {"num_replicas": 2, "rank": 0},
    ):  # fmt: skip
        other = HardnessSampler(run, **{"num_samples": 100, **options})
        with pytest.raises(FastpieError, match="Expected the state of a sampler"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0}, {"temperature": math.nan}, {"strength": -1.0}, {"doubtful": 1.0},
        {"num_samples": 0}, {"num_samples": 1.5}, {"seed": -1}, {"rank": 2, "num_replicas": 2},
        {"num_replicas": 0}, {"unscored": "zero"}, {"by": "entropy"},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(bad: dict[str, Any], run: fastpie.MiningResult) -> None:
    with pytest.raises(FastpieError, match=next(iter(bad)) if "by" not in bad else "entropy"):
        HardnessSampler(run, **bad)


def test_epochs_below_zero_are_refused(run: fastpie.MiningResult) -> None:
    with pytest.raises(FastpieError, match="epoch"):
        HardnessSampler(run).set_epoch(-1)
