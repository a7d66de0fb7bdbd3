"""Runs for the tests of faults: in processes that are killed, alone or two under torchrun's agent.

`python fault_runs.py JSON` is a process of its own; `start` forks one from a server that has imported
torch already, which saves the seconds of that.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import Dataset

import fastpie
import fastpie.mining.session

COUNT = 120
BATCH = 4
IDS = [f"case-{(i * 7919) % COUNT:03d}" for i in range(COUNT)]
UNREADABLE = range(4, COUNT, 31)
MISLABELLED = range(7, COUNT, 53)


class Cases(Dataset):
    """Generated images, some of which cannot be read or scored until `mended`.

    Attributes:
        pause: seconds that reading one takes once the run has begun.
        reads: a file that lists what was read since then.
    """

    sample_ids = IDS

    def __init__(self, folder: Path, pause: float, mended: bool) -> None:
        self.begun = folder / "run.json"
        self.pause, self.mended = pause, mended
        self.reads = folder.with_suffix(".reads")

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        number = int(IDS[index][5:])
        if self.begun.exists():
            time.sleep(self.pause)
            with self.reads.open("a") as file:
                file.write(f"{number}\n")
        if number in UNREADABLE and not self.mended:
            raise OSError(f"cannot read {number}")
        label = 99 if number in MISLABELLED and not self.mended else number % 3
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number)), label


class Fragile(nn.Module):
    """Gives NaN for an image in which one pixel is above a threshold."""

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner, self.threshold = inner, threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0, 0, :1] > self.threshold, torch.nan, self.inner(x))


def dual_of(seed: int) -> fastpie.DualModel:
    """A small network with BatchNorm; that of seed 1 cannot score a few images."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    model: nn.Module = nn.Sequential(*layers)
    model = (Fragile(model, 1.5) if seed == 1 else model).eval()
    return fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]))


def run(
    folder: str,
    *,
    pause: float = 0.0,
    models: int = 0,
    mended: bool = False,
    batches_a_part: int = 1,
    clock: int | None = None,
    **options: Any,
) -> None:
    """One call of `mine`.

    Args:
        folder: of the run.
        pause: see `Cases`.
        models: how many; 0: one, without a list.
        mended: see `Cases`.
        batches_a_part: 1, or all for any other number.
        clock: seed of a clock that jumps by years.
        options: of `mine`.
    """
    fastpie.mining.session._PART_SECONDS = 0.0 if batches_a_part == 1 else 1e6
    torch.set_num_threads(1)
    if clock is not None:
        jump(random.Random(clock))
    fastpie.mine(
        [dual_of(seed) for seed in range(models)] if models else dual_of(0),
        Cases(Path(folder), pause, mended),
        folder,
        batch_size=BATCH,
        keep_logits=True,
        **options,
    )


def jump(steps: random.Random) -> None:
    """A wall clock that is set forth and back by years at every look."""
    real, years = time.time, 365 * 86400

    class Jumping(fastpie.mining.session.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: real() + steps.uniform(-20, 20) * years
    fastpie.mining.session.datetime = Jumping


# ------------------------------------------------------------------ two processes


def agent(folder: str, options: dict[str, Any], restarts: int) -> None:
    """What torchrun does: two ranks, started again when one of them dies."""
    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.02,
        start_method="fork",
    )
    try:
        elastic_launch(config, rank)(folder, options)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def rank(folder: str, options: dict[str, Any]) -> None:
    """One of them."""
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # as after exec; here those of the agent are inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A rank killed while gloo connects can leave the next ones waiting for each other: they try again.
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    run(folder, **options)
    dist.destroy_process_group()


# ------------------------------------------------------------------ processes of the tests


class Process:
    """A run in a process forked from the server."""

    def __init__(self, target: Callable[..., None], folder: Path, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fault_server"])
        self.log = folder.with_suffix(".log")
        self.process = context.Process(target=_logged, args=(target, self.log, folder, arguments))
        self.process.start()

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    @property
    def ranks(self) -> list[int]:
        """Process ids of its children that run."""
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [int(child) for child in children if running(int(child))]

    def kill(self) -> int:
        """End it and its children at once; gives the exit code."""
        assert self.process.pid is not None
        every = [self.process.pid, *self.ranks]
        random.shuffle(every)
        for pid in every:
            send(pid, signal.SIGKILL)
        while any(map(running, every)):
            time.sleep(0.001)
        return self.wait()

    def wait(self, timeout: float = 100.0) -> int:
        """The exit code at its end."""
        self.process.join(timeout)
        if self.code is None:
            self.process.kill()
            raise AssertionError(f"Expected an end within {timeout} s; {self.log.read_text()}")
        return self.code


def send(pid: int | None, number: int) -> None:
    """A signal to a process, if it is still there."""
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(folder: Path, **options: Any) -> Process:
    """`run` in a process."""
    return Process(_run, folder, options)


def start_two(folder: Path, *, restarts: int = 0, **options: Any) -> Process:
    """`agent` in a process."""
    return Process(agent, folder, options, restarts)


def finish(folder: Path, **options: Any) -> None:
    """`run` to its end."""
    process = start(folder, **options)
    assert process.wait() == 0, process.log.read_text()


def _run(folder: str, options: dict[str, Any]) -> None:
    run(folder, **options)


def _logged(target: Callable[..., None], log: Path, folder: Path, arguments: Any) -> None:
    os.setsid()  # signals to the group are for this run alone
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of the processes that read, as elsewhere
    target(str(folder), *arguments)


# ------------------------------------------------------------------ what must hold


def parts_of(folder: Path) -> int:
    """How many parts are written, of all models together."""
    return len(list(folder.rglob("scores/part-*.parquet")))


def check_equal(folder: Path, whole: Path) -> None:
    """The same bits as an undisturbed run; every sample once; nothing left of interrupted writes."""
    result, want = fastpie.MiningResult(folder), fastpie.MiningResult(whole)
    assert result.table.equals(want.table)
    assert result.errors.equals(want.errors)
    ids = result.table["sample_id"].to_pylist() + result.errors["sample_id"].to_pylist()
    assert sorted(ids) == sorted(IDS)
    for mine, theirs in zip(result.members or [result], want.members or [want], strict=True):
        assert mine.table.equals(theirs.table)
        assert mine.errors.equals(theirs.errors)
        for one, two in zip(mine.logits(), theirs.logits(), strict=True):
            assert one.tobytes() == two.tobytes()
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if dist.is_torchelastic_launched():
        rank(arguments.pop("folder"), arguments)
    else:
        run(**arguments)
