"""Runs killed with SIGKILL at random instants, many times each, against an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastpie
from fault_runs import (
    BATCH,
    COUNT,
    Process,
    check_equal,
    finish,
    parts_of,
    send,
    start,
    start_two,
)

pytestmark = pytest.mark.faults
PARTS = COUNT // BATCH
KILLS = 10  # of a run folder


def wait_for(instants: random.Random, phase: str, process: Process, folder: Path) -> None:
    """Until a random instant of a phase, or the end of the process."""
    last = PARTS * max(1, len(list(folder.glob("models/*"))))
    if phase == "set-up":
        time.sleep(instants.uniform(0.0, 0.4))
        return
    goal = last if phase == "end" else min(parts_of(folder) + instants.randrange(1, 8), last)
    while parts_of(folder) < goal and process.code is None:
        time.sleep(0.001)
    time.sleep(instants.uniform(0.0, 0.03))


def phases(kills: int) -> list[str]:
    """Of the kills of a folder: most while it scores, the last ones at its end."""
    before = ["set-up", "part", "part"] * kills
    return [*before[: kills - 2], "end", "end"]


def check_progress(progress: list[int]) -> None:
    print(f"parts after each kill: {progress}")
    assert progress == sorted(progress)


def disturbed(instants: random.Random, folder: Path, kills: int, **options: Any) -> None:
    """`kills` kills of one process, at random instants."""
    progress, codes = [], []
    for phase in phases(kills):
        process = start(folder, pause=0.005, **options)
        wait_for(instants, phase, process, folder)
        codes.append(process.kill())
        progress.append(parts_of(folder))
    check_progress(progress)
    assert set(codes) <= {0, -signal.SIGKILL}, process.log.read_text()
    assert codes.count(0) <= 4  # an end before the kill


@pytest.mark.parametrize("number", range(3))
def test_kills(
    number: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    disturbed(instants, folder, KILLS)
    finish(folder)
    check_equal(folder, undisturbed())


@pytest.mark.parametrize("at_once", [1, 2])
def test_kills_of_a_run_of_two_models(
    at_once: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Between the models, between their groups, and while their tables are merged."""
    folder = tmp_path / "run"
    disturbed(instants, folder, KILLS, models=2, models_at_once=at_once)
    finish(folder, models=2)
    check_equal(folder, undisturbed(models=2))


@pytest.mark.parametrize("models", [0, 2])
def test_kills_of_a_retry(
    models: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    finish(folder, models=models)
    errors = fastpie.MiningResult(folder).errors.num_rows
    for _ in range(8):
        process = start(folder, pause=0.002, models=models, mended=True, retry_errors=True)
        time.sleep(instants.uniform(0.05, 0.6))
        process.kill()
        result = fastpie.MiningResult(folder)
        assert len(result) + result.errors.num_rows == COUNT
        assert result.errors.num_rows <= errors
        errors = result.errors.num_rows
    finish(folder, models=models, mended=True, retry_errors=True)
    check_equal(folder, undisturbed(retried=True, models=models))


# ------------------------------------------------------------------ two processes


def wait_for_ranks(process: Process, gone: list[int]) -> None:
    """Until the agent has started both, other ones than before, or has ended."""
    while process.code is None:
        ranks = process.ranks
        if len(ranks) == 2 and not set(ranks) & set(gone):
            return
        time.sleep(0.001)


@pytest.mark.parametrize(("models", "number"), [(0, 0), (0, 1), (2, 0)])
def test_kills_of_one_rank(
    models: int,
    number: int,
    instants: random.Random,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """torchrun's agent starts both again, without anybody's help."""
    folder = tmp_path / "run"
    process = start_two(folder, restarts=2 * KILLS, pause=0.01, models=models)
    ranks: list[int] = []
    progress = []
    for phase in phases(KILLS):
        wait_for_ranks(process, ranks)
        ranks = process.ranks
        wait_for(instants, phase, process, folder)
        if ranks:
            send(instants.choice(ranks), signal.SIGKILL)
        progress.append(parts_of(folder))
    check_progress(progress)
    assert process.wait() == 0, process.log.read_text()
    check_equal(folder, undisturbed(models=models))


@pytest.mark.parametrize("models", [0, 2])
def test_kills_of_agent_and_ranks(
    models: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    progress = []
    for phase in phases(KILLS):
        process = start_two(folder, pause=0.005, models=models)
        wait_for_ranks(process, [])
        wait_for(instants, phase, process, folder)
        process.kill()
        progress.append(parts_of(folder))
    check_progress(progress)
    finish(folder, models=models)  # by one process
    check_equal(folder, undisturbed(models=models))


@pytest.mark.parametrize("victims", ["agent", "agent and rank 0", "agent and rank 1"])
def test_ranks_that_outlive_the_agent(
    victims: str, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """A new run at once is refused while the old rank 0 goes on, or goes on beside the old rank 1."""
    folder = tmp_path / "run"
    process = start_two(folder, pause=0.01)
    wait_for_ranks(process, [])
    wait_for(instants, "part", process, folder)
    ranks = sorted(process.ranks)
    assert process.process.pid is not None
    for pid in [process.process.pid, *(ranks[int(v[-1])] for v in [victims] if "rank" in v)]:
        send(pid, signal.SIGKILL)
    for _ in range(100):
        process = start_two(folder)
        if process.wait() == 0:
            break
        assert "another run is writing" in process.log.read_text()
    check_equal(folder, undisturbed())
