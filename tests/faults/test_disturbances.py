"""Processes that share a folder, a clock that jumps, a model that cannot score everything."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fastpie
from fault_runs import BATCH, COUNT, check_equal, finish, parts_of, start

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("models", [0, 2])
def test_shards_at_once(
    models: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Three shards of different sizes begin together, one is killed; none refuses another."""
    folder = tmp_path / "run"
    shards = [(0, 2), (2, 4), (3, 4)]
    processes = [start(folder, shard=s, models=models, pause=0.005) for s in shards]
    time.sleep(instants.uniform(0.0, 0.8))
    processes[0].kill()
    for process in processes[1:]:
        assert process.wait() == 0, process.log.read_text()
    again = start(folder, shard=shards[0], models=models)
    assert again.wait() == 0, again.log.read_text()
    check_equal(folder, undisturbed(models=models))


@pytest.mark.parametrize("shards", [((0, 1), (0, 1)), ((0, 2), (1, 3)), ((1, 2), (0, 1))])
def test_overlapping_shards_are_refused(
    shards: tuple[tuple[int, int], tuple[int, int]],
    undisturbed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    first = start(folder, shard=shards[0], pause=0.02)
    while parts_of(folder) < 2:
        assert first.code is None, first.log.read_text()
        time.sleep(0.001)
    second = start(folder, shard=shards[1])
    assert second.wait() == 1
    assert first.code is None
    assert "another run is writing to it. Wait for its end" in second.log.read_text()
    assert first.wait() == 0
    finish(folder)
    check_equal(folder, undisturbed())


def test_a_clock_that_jumps(
    instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """By years, forth and back, while the run is killed and taken up."""
    folder = tmp_path / "run"
    for _ in range(3):
        parts = parts_of(folder)
        process = start(folder, clock=instants.randrange(100), pause=0.01)
        while parts_of(folder) <= parts and process.code is None:
            time.sleep(0.001)
        process.kill()
    finish(folder, clock=instants.randrange(100))
    check_equal(folder, undisturbed())


def test_a_limit_at_a_time(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for call in range(1, 6):
        finish(folder, limit=21, models=2)  # six batches
        result = fastpie.MiningResult(folder)
        assert len(result) + result.errors.num_rows == min(call * 6 * BATCH, COUNT)
    check_equal(folder, undisturbed(models=2))
