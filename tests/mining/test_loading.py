"""Workers that raise, hang or die: no sample lost but the one to blame, no bit changed, no process left."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fastpie import FastpieError
from fastpie.mining.loading import load
from fastpie.mining.plan import Plan
from fastpie.mining.reading import Batch, Kind, Reader
from hostile_data import FATES, Hostile, children, meet

LIKE = Kind([[1, 8, 8]], [])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    mp.resource_tracker.ensure_running()  # multiprocessing's own, started by the first spawn
    before = children()
    yield
    assert children() <= before


def plan_of(reader: Reader) -> Plan:
    count = len(reader.dataset)
    return Plan([f"{i:03d}" for i in range(count)], list(range(count)), reader.batch_size)


def read_all(data: Any, batch_size: int | None = 3, **options: Any) -> list[Batch]:
    reader = Reader(data, batch_size=batch_size, **options)
    plan = plan_of(reader)
    return list(reader.read(plan, map(plan.positions, range(plan.batches)), like=LIKE))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.positions, a.slots) == (b.positions, b.slots)
        assert [(p.position, p.stage) for p in a.problems] == [
            (p.position, p.stage) for p in b.problems
        ]
        assert (a.images is None) == (b.images is None)
        if b.images is not None:
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


WORDS = {
    "exit": "ended with exit code 3",
    "kill": r"killed by signal 9 \(SIGKILL",
    "segfault": r"killed by signal 11 \(SIGSEGV",
    "hang": "took longer than 0.5 s",
    "spin": "took longer than 0.5 s",
}


@pytest.mark.parametrize("fate", FATES)
def test_a_sample_that_takes_its_process_with_it(fate: str) -> None:
    found = read_all(Hostile(14, {4: fate}), num_workers=2, read_timeout=0.5)
    assert_same(found, read_all(Hostile(14, {4: "broken"})))
    assert found[1].positions == [3, 5]
    (problem,) = found[1].problems
    assert re.search(WORDS[fate], problem.error)


def test_in_processes_started_afresh() -> None:
    loader = DataLoader(
        Hostile(5, {3: "kill"}), batch_size=2, num_workers=1, multiprocessing_context="spawn"
    )
    found = read_all(loader, None)
    assert_same(found, read_all(Hostile(5, {3: "broken"}), 2))
    assert "SIGKILL" in found[1].problems[0].error


def test_samples_that_all_do() -> None:
    fates = dict(zip(range(8), itertools.cycle(["exit", "kill"]), strict=False))
    found = read_all(Hostile(8, fates), num_workers=2)
    assert [len(batch.problems) for batch in found] == [3, 3, 2]
    assert all(batch.images is None for batch in found)
    assert "exit code 3" in found[0].problems[0].error
    assert "SIGKILL" in found[0].problems[1].error


@pytest.mark.parametrize("fate", ["exit", "kill", "hang"])
def test_a_sample_that_is_not_to_blame(fate: str, tmp_path: Path) -> None:
    """Read again, alone, it can be read: something else had ended the process."""
    data = Hostile(14, {4: fate, 9: fate}, once=tmp_path)
    assert_same(read_all(data, num_workers=2, read_timeout=0.5), read_all(Hostile(14, {})))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_second_reading_is_alone(tmp_path: Path) -> None:
    """No other worker takes memory while the question is whether a sample takes too much."""

    class Watched(Hostile):
        def __getitem__(self, index: int) -> Any:
            (tmp_path / f"{index}.{os.getpid()}.{time.monotonic_ns()}").touch()
            time.sleep(0.02)
            (tmp_path / f"{index}.{os.getpid()}.{time.monotonic_ns()}").touch()
            return super().__getitem__(index)

    batches = read_all(Watched(24, {6: "kill"}), 2, num_workers=3)
    assert sum(len(batch.positions) for batch in batches) == 23
    events = sorted(
        (int(at), int(index)) for index, _, at in (p.name.split(".") for p in tmp_path.iterdir())
    )
    times = [at for at, index in events if index == 6]
    assert len(times) == 4
    assert not [e for e in events if times[2] < e[0] < times[3] and e[1] != 6]


@pytest.mark.parametrize("between", [True, False])
def test_workers_that_die_idle_or_at_work(between: bool) -> None:
    """Nothing is raised in the caller's own code, and nothing is lost."""
    reader = Reader(Hostile(40, {}), batch_size=2, num_workers=2)
    plan = plan_of(reader)
    before = children()
    found = []
    for batch in reader.read(plan, map(plan.positions, range(plan.batches)), like=LIKE):
        found.append(batch)
        if len(found) in (4, 11):
            if between:
                time.sleep(0.1)
            for process in children() - before:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.1)  # a handler of SIGCHLD that raises would do so here
    assert_same(found, read_all(Hostile(40, {}), 2))


def test_signals_to_the_whole_group_are_for_the_process_that_decides() -> None:
    class Signalled(Hostile):
        def __getitem__(self, index: int) -> Any:
            if index == 2 and get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    assert_same(read_all(Signalled(6, {}), num_workers=2), read_all(Hostile(6, {})))


def test_an_interrupt_leaves_nothing_behind() -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read_all(Hostile(9, {0: "hang"}), num_workers=2)
    timer.join()


# ---------------------------------------------------------------------- without a sample to blame


class Ending:
    """A collate function that meets a fate."""

    def __init__(self, fate: str) -> None:
        self.fate = fate

    def __call__(self, items: list[Any]) -> Any:
        meet(self.fate)


@pytest.mark.parametrize(("fate", "words"), [("kill", "SIGKILL.*memory"), ("hang", "longer than")])
def test_batches_that_end_every_worker(fate: str, words: str) -> None:
    loader = DataLoader(Hostile(6, {}), 3, collate_fn=Ending(fate), num_workers=1, timeout=0.3)
    with pytest.raises(FastpieError, match=rf"3 in a row.*{words}.*num_workers=0"):
        read_all(loader, None)


def test_workers_that_cannot_begin() -> None:
    def init(worker: int) -> None:
        raise KeyError("no such archive")

    loader = DataLoader(Hostile(6, {}), 3, num_workers=2, worker_init_fn=init)
    with pytest.raises(FastpieError, match=r"(?s)raised one.*KeyError.*no such archive"):
        read_all(loader, None)


def test_batches_that_cannot_be_sent() -> None:
    loader = DataLoader(Hostile(6, {}), 3, num_workers=2, collate_fn=lambda items: (lambda: items,))
    with pytest.raises(FastpieError, match=r"(?s)raised one.*lambda"):
        read_all(loader, None)


def test_data_sets_that_cannot_be_sent() -> None:
    data = Hostile(6, {})
    data.handle = threading.Lock()
    loader = DataLoader(data, 3, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(FastpieError, match=r"spawn.*lock.*num_workers=0"):
        read_all(loader, None)


def test_too_many_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 1024), limits[1]))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(9):
            os.close(opened.pop())
        with pytest.raises(FastpieError, match=r"Too many open files.*ulimit -n"):
            read_all(Hostile(60, {}), 3, num_workers=20)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_data_set_that_leaves_its_files_open() -> None:
    class Leaking(Hostile):
        def __getitem__(self, index: int) -> Any:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
            self.kept = [*getattr(self, "kept", []), *(os.open("/dev/null", 0) for _ in range(99))]
            return super().__getitem__(index)

    with pytest.raises(FastpieError, match=r"(?s)raised one.*ulimit -n.*Too many open files"):
        read_all(Leaking(60, {}), 6, num_workers=1)


# ---------------------------------------------------------------------- laziness, ends


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_taken_as_they_are_needed(workers: int) -> None:
    reader = Reader(Hostile(8, {}), batch_size=2, num_workers=workers)
    taken = itertools.count()
    batches = ([next(taken) % 8, 7] for _ in itertools.count())
    reading = reader.read(plan_of(reader), batches, like=LIKE)
    found = [next(reading) for _ in range(5)]
    assert [batch.positions[0] for batch in found] == [0, 1, 2, 3, 4]
    assert next(taken) <= 5 + 2 * workers
    start = time.monotonic()
    reading.close()
    assert time.monotonic() - start < 1.9  # they end by themselves
    assert list(reader.read(plan_of(reader), [], like=LIKE)) == []


def test_close_does_not_wait_for_a_sample_that_hangs() -> None:
    reader = Reader(Hostile(8, {2: "hang", 4: "hang"}), batch_size=2, num_workers=3)
    reading = reader.read(plan_of(reader), [[0, 1], [2, 3], [4, 5]], like=LIKE)
    next(reading)
    start = time.monotonic()
    reading.close()
    assert time.monotonic() - start < 10


SCRIPT = """
import sys, time
from fastpie.mining.plan import Plan
from fastpie.mining.reading import Kind, Reader
from hostile_data import Hostile, children
fates = {4: "hang"} if sys.argv[1] == "hang" else {}
reader = Reader(Hostile(6, fates), batch_size=2, num_workers=2)
plan = Plan(list("abcdef"), list(range(6)), 2)
reading = reader.read(plan, [[0, 1], [2, 3], [4, 5]], like=Kind([[1, 8, 8]], []))
next(reading)
print(*children(), flush=True)
if sys.argv[1] == "hang":
    list(reading)
"""


@pytest.mark.parametrize("end", ["hang", "leave"])
def test_workers_end_with_the_process_that_began_them(end: str) -> None:
    """Killed in the middle, or ended with an iterator that nobody closed."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, end],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        if end == "hang":
            process.kill()
        assert process.wait(20) == (-signal.SIGKILL if end == "hang" else 0)
    assert len(workers) == 2
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        state = [Path(f"/proc/{pid}/stat") for pid in workers]
        if all(not s.exists() or s.read_text().rpartition(")")[2].split()[0] == "Z" for s in state):
            break  # nobody has asked how they ended: the container's first process, as a rule
        assert time.monotonic() < until
        time.sleep(0.1)


# ---------------------------------------------------------------------- what passes between them


class Everything:
    """A job that hands on a bit of everything."""

    dataset = None

    def read(self, item: int) -> Any:
        return item

    def lost(self, item: int, reason: str) -> Any:
        return reason

    def batch(self, reads: list[int]) -> Any:
        base = torch.arange(24).reshape(4, 6)
        return {
            "dtypes": [base.to(dtype) for dtype in DTYPES],
            "strided": (base.T, base[::2, 1:3], torch.tensor(reads[0]), torch.empty(0, 3)),
            "gradient": torch.ones(2, requires_grad=True),
            "subclass": torch.nn.Parameter(torch.ones(3)),
            "complex": torch.tensor([1 + 2j]).conj(),
            "arrays": [np.arange(5, dtype=np.uint16), np.float32(2), np.array(["a", "bc"])],
            "text": "ü" * 100_000,
        }


DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


def test_what_arrives_is_what_was_sent() -> None:
    expected = next(load(Everything(), [[7]]))
    (found,) = load(Everything(), [[7]], workers=1)
    for name in ("dtypes", "strided"):
        for a, b in zip(found[name], expected[name], strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a, b)
            a.zero_()  # in memory that is the receiver's
    for name in ("gradient", "subclass", "complex"):
        assert type(found[name]) is Tensor
        assert torch.equal(found[name], expected[name])
    for a, b in zip(found["arrays"], expected["arrays"], strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert found["text"] == expected["text"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_done_to_each_batch_in_this_process(workers: int) -> None:
    def then(batch: dict[str, Any]) -> tuple[int, int]:
        return int(batch["strided"][2]), os.getpid()

    found = list(load(Everything(), ([i] for i in range(9)), workers=workers, then=then))
    assert found == [(i, os.getpid()) for i in range(9)]


def test_worker_info() -> None:
    class Telling(Hostile):
        def __getitem__(self, index: int) -> Any:
            info = get_worker_info()
            assert info.dataset is self
            return torch.tensor([info.id, info.num_workers, info.seed]), index

    found = read_all_like(Telling(8, {}), Kind([[3]], []), num_workers=2)
    rows = torch.cat([batch.images for batch in found])
    assert rows[:, 0].unique().tolist() == [0, 1]
    assert rows[:, 1].tolist() == [2] * 8
    assert torch.equal(rows[:, 2], rows[:, 0])
    assert get_worker_info() is None


def test_batches_take_no_room_in_dev_shm() -> None:
    """Of which a container has 64 MiB: torch's function puts them there when it sees a worker."""

    def collate(items: list[Any]) -> Any:
        images, labels = torch.utils.data.default_collate(items)
        return images, labels.fill_(int(images.is_shared() or labels.is_shared()))

    loader = DataLoader(Hostile(6, {}), 3, collate_fn=collate, num_workers=1)
    assert [batch.labels.tolist() for batch in read_all(loader, None)] == [[0, 0, 0]] * 2


def read_all_like(data: Any, like: Kind, **options: Any) -> list[Batch]:
    reader = Reader(data, batch_size=1, **options)
    plan = plan_of(reader)
    return list(reader.read(plan, map(plan.positions, range(plan.batches)), like=like))


def test_ids_of_samples_that_end_their_process() -> None:
    class Named(Hostile):
        def __getitem__(self, index: int) -> Any:
            return *super().__getitem__(index), f"id{index}"

    seen: list[int] = []
    ids = Reader(Named(5, {1: "kill", 3: "x"}), num_workers=1).read_sample_ids(seen.append)
    assert ids == ["id0", "#1", "id2", "#3", "id4"]
    assert sum(seen) == 5
