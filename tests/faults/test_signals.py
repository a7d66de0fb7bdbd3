"""SIGTERM and Ctrl-C: the batch is finished and kept, the process ends by the signal, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fastpie
import fault_runs
from fault_runs import BATCH, COUNT, check_equal, finish, parts_of, send, start, start_two

pytestmark = pytest.mark.faults


def rows_of(folder: Path) -> int:
    """Samples that the run accounts for so far."""
    if not (folder / "run.json").exists():
        return 0
    result = fastpie.MiningResult(folder)
    return len(result) + result.errors.num_rows


def reads_of(folder: Path) -> list[int]:
    return [int(line) for line in folder.with_suffix(".reads").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_sample_is_read_twice(
    number: int, instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Ten signals while one part of all batches is open: each leaves whole batches behind."""
    folder, rows = tmp_path / "run", 0
    for _ in range(10):
        process = start(folder, pause=0.01, batches_a_part=0)
        before = len(reads_of(folder)) if rows else 0
        while process.code is None and (
            not folder.with_suffix(".reads").exists() or len(reads_of(folder)) <= before
        ):
            time.sleep(0.001)
        time.sleep(instants.uniform(0.0, 0.1))
        send(process.process.pid, number)
        # multiprocessing turns a KeyboardInterrupt into the code 1.
        assert process.wait(30) in (0, 1 if number == signal.SIGINT else -number)
        assert rows_of(folder) > rows or rows == COUNT
        rows = rows_of(folder)
        assert rows % BATCH == 0
        assert rows == len(reads_of(folder))
    finish(folder, batches_a_part=0)
    assert len(reads_of(folder)) == COUNT
    check_equal(folder, undisturbed())


def test_worker_processes_of_a_group_that_is_signalled(
    undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """Ctrl-C in a terminal and a batch system's SIGTERM reach the reading processes as well."""
    folder = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        rows = rows_of(folder)
        process = start(folder, pause=0.03, batches_a_part=0, num_workers=2)
        deadline = time.monotonic() + 30
        while not folder.with_suffix(".reads").exists() or len(reads_of(folder)) < rows + 12:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert process.process.pid is not None
        os.killpg(process.process.pid, number)
        assert process.wait(30) == (1 if number == signal.SIGINT else -number)
        assert rows_of(folder) > rows, process.log.read_text()
    finish(folder, batches_a_part=0)
    check_equal(folder, undisturbed())


def launched(folder: Path, *, torchrun: bool = False, **options: object) -> subprocess.Popen[bytes]:
    """A process as users start it."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "3"]
    arguments = json.dumps({"folder": str(folder), **options})
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen([*command, fault_runs.__file__, arguments], stdout=log, stderr=log)


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while parts_of(folder) < count:
        assert process.poll() is None, folder.with_suffix(".log").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code(
    number: int, code: int, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with launched(folder, pause=0.02) as process:
        wait_for_parts(folder, 2, process)
        process.send_signal(number)
        assert process.wait(30) == 128 - code  # by the signal itself: a shell says 128 + number
    assert 0 < rows_of(folder) < COUNT
    finish(folder)
    check_equal(folder, undisturbed())


def test_torchrun(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    """A killed rank is started again by torchrun alone; SIGTERM to torchrun ends all, with no loss."""
    folder = tmp_path / "run"
    with launched(folder, torchrun=True, pause=0.1) as process:
        wait_for_parts(folder, 2, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        send(int(children[-1]), signal.SIGKILL)
        wait_for_parts(folder, parts_of(folder) + 4, process)
        process.terminate()
        assert process.wait(60) != 0
    assert 6 <= parts_of(folder) < COUNT // BATCH
    reads = len(reads_of(folder))
    with launched(folder, torchrun=True) as process:
        assert process.wait(60) == 0, folder.with_suffix(".log").read_text()
    check_equal(folder, undisturbed())
    assert len(reads_of(folder)) - reads < COUNT


def test_sigterm_to_the_agent(
    instants: random.Random, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    """It passes the signal on: each rank keeps its batch, and nobody waits."""
    folder = tmp_path / "run"
    for _ in range(5):
        rows = rows_of(folder)
        process = start_two(folder, pause=0.01)
        while parts_of(folder) * BATCH <= rows and process.code is None:
            time.sleep(0.001)
        time.sleep(instants.uniform(0.0, 0.05))
        send(process.process.pid, signal.SIGTERM)
        process.wait(30)
        assert rows_of(folder) == len(set(reads_of(folder)))
    finish(folder)
    assert len(reads_of(folder)) == COUNT
    check_equal(folder, undisturbed())
