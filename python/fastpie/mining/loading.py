"""Processes that read ahead, and what becomes of a sample that ends or stops the process that reads it.

torch's DataLoader ends the run when a worker is killed (its handler of SIGCHLD raises wherever the main
thread happens to be), and waits for ever for one that hangs. Here each worker marks in shared memory which
sample it reads and since when. When one dies or is overdue it is replaced, and that sample is read once
more, alone: no other worker reads meanwhile, so that nobody's memory is to blame. If that ends in the same
way, the sample is lost; otherwise its batch is read again, as it was. Neither changes a bit of any other.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import multiprocessing as mp
import os
import pickle
import random
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data._utils import worker as torch_worker

from fastpie.errors import FastpieError
from fastpie.mining.channel import receive, send

__all__ = ["READ_TIMEOUT", "Job", "load"]

READ_TIMEOUT = 300.0
"""Seconds that a sample may take: network file systems recover from failures within minutes."""

_STARTING, _WAITING = -2, -1  # in place of the slot that a worker reads
_START_SECONDS = 120.0  # at least: a spawned process imports torch first
_STOP_SECONDS = 2.0  # that a worker has to end by itself
_DEATHS = 3  # of workers at one batch, without a sample to blame


class Job(Protocol):
    """What the workers do. It is handed to each of them once.

    Attributes:
        dataset: what `torch.utils.data.get_worker_info()` shows.
    """

    dataset: Any

    def read(self, item: Any) -> Any:
        """Read one item."""

    def lost(self, item: Any, reason: str) -> Any:
        """What stands for an item whose reading ended or stopped its process."""

    def batch(self, reads: list[Any]) -> Any:
        """What is made of the items of a task."""


def load(
    job: Job,
    tasks: Iterable[Sequence[Any]],
    *,
    workers: int = 0,
    prefetch: int = 2,
    timeout: float = READ_TIMEOUT,
    context: Any = None,
    init: Callable[[int], None] | None = None,
    then: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """`job.batch` of the items of each task, in order.

    Args:
        job: what to do.
        tasks: items of each batch; taken as they are needed.
        workers: processes that read; 0 reads in this one.
        prefetch: tasks that each worker has at a time.
        timeout: seconds for one item, or for `job.batch`. Without workers there is none.
        context: of multiprocessing; by default the one that is set.
        init: called in each worker with its number, before it reads.
        then: applied to each batch in this process; with workers in a thread, ahead of time.

    Raises:
        FastpieError: the workers cannot start, raise, or die or hang again and again.
    """
    if workers:
        team = _Team(job, tasks, workers, prefetch, timeout, context, init, then)
        try:
            yield from team.results()
        finally:
            team.close()
        return
    for items in tasks:
        result = job.batch([job.read(item) for item in items])
        yield then(result) if then else result


@dataclass(eq=False)
class _Task:
    number: int
    items: list[Any]
    lost: dict[int, str] = field(default_factory=dict)  # by slot, why
    alone: int | None = None  # the slot to read, and nothing else
    deaths: int = 0
    how: str = ""  # the last one


class _Worker:
    """A process and what it has been given; `at` is (slot, since when, whether to stop)."""

    def __init__(self, number: int, team: _Team) -> None:
        self.number = number
        self.tasks: deque[_Task] = deque()
        self.given = 0.0
        try:
            self.at = team.context.RawArray("d", [_STARTING, time.monotonic(), 0])
            self.link, self.theirs = socket.socketpair()
        except OSError as error:
            raise _no_resources(error) from error
        self.process = team.context.Process(
            target=_work,
            args=(self.theirs, self.at, team.job, team.init, number, team.count),
            daemon=True,
        )

    def start(self) -> None:
        try:
            self.process.start()
        except OSError as error:
            raise _no_resources(error) from error
        except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
            raise FastpieError(
                "Expected a data set and collate function that processes which are started afresh "
                f"(spawn) can be given, but: {error}. Use num_workers=0 or the context 'fork'."
            ) from error
        finally:
            self.theirs.close()  # or the end of the process would not be the end of the link

    def give(self, task: _Task) -> None:
        if not self.tasks:
            self.given = time.monotonic()
        self.tasks.append(task)
        try:
            send(self.link, (task.items, task.lost, task.alone))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died; that will be noticed
        except OSError as error:
            raise _no_resources(error) from error

    def overdue(self, timeout: float) -> bool:
        if not self.tasks:
            return False
        limit = max(timeout, _START_SECONDS) if self.at[0] == _STARTING else timeout
        return bool(time.monotonic() - max(self.at[1], self.given) > limit)

    def end(self, seconds: float = 0.0) -> None:
        """End the process, by force after some time."""
        if self.process.pid is not None:
            self.process.join(seconds)
            self.process.kill()
            self.process.join()
        self.theirs.close()
        self.link.close()


class _Team:
    """The workers of one `load`."""

    def __init__(
        self,
        job: Job,
        tasks: Iterable[Sequence[Any]],
        count: int,
        prefetch: int,
        timeout: float,
        context: Any,
        init: Callable[[int], None] | None,
        then: Callable[[Any], Any] | None,
    ) -> None:
        self.job, self.init, self.then = job, init, then
        self.count, self.prefetch, self.timeout = count, prefetch, timeout
        self.context: Any = mp.get_context(context) if isinstance(context, str | None) else context
        self.workers: list[_Worker] = []
        self.source = (_Task(n, list(items)) for n, items in zip(itertools.count(), tasks))
        self.again: list[_Task] = []  # to be read once more, before new ones
        self.suspects: deque[_Task] = deque()
        self.ready: dict[int, Any] = {}
        self.expected = self.taken = 0
        self.thread = ThreadPoolExecutor(1, "fastpie-batches") if then else None
        self.process = os.getpid()
        # Before multiprocessing's own, which sends SIGTERM to what is left and waits for it.
        atexit.register(self.close)

    def results(self) -> Iterator[Any]:
        """Batches in order."""
        while self._hand_out() or self.ready:
            if self.expected not in self.ready:
                self._collect(min(1.0, self.timeout / 4))
                continue
            result = self.ready.pop(self.expected)
            self.expected += 1
            self._collect(0.0)
            self._hand_out()  # the workers go on while the caller computes
            yield result.result() if isinstance(result, Future) else result
            del result  # the caller may drop it while the next is awaited

    def close(self) -> None:
        """End all workers; those that do not at once are killed."""
        if os.getpid() != self.process:
            return  # a fork of this process; the workers are not its own
        atexit.unregister(self.close)
        for worker in self.workers:
            worker.at[2] = 1
            with contextlib.suppress(OSError):
                send(worker.link, None)
        until = time.monotonic() + _STOP_SECONDS
        for worker in self.workers:
            worker.end(max(0.0, until - time.monotonic()))
        self.workers.clear()
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------ giving

    def _hand_out(self) -> bool:
        """Give the workers what they have room for; whether any has something to do."""
        if not self.suspects:
            while (task := self._next()) is not None:
                self._least_busy().give(task)
        elif not self._busy():
            self._least_busy().give(self.suspects[0])
        return self._busy()

    def _busy(self) -> bool:
        return any(worker.tasks for worker in self.workers)

    def _next(self) -> _Task | None:
        """The next task, unless enough are under way or wait to be fetched."""
        room = self.count * self.prefetch
        if sum(len(worker.tasks) for worker in self.workers) >= room:
            return None
        if self.again:
            self.again.sort(key=lambda task: task.number)
            return self.again.pop(0)
        if self.taken - self.expected >= room:
            return None
        task = next(self.source, None)
        self.taken += task is not None
        return task

    def _least_busy(self) -> _Worker:
        least = min(self.workers, key=lambda worker: len(worker.tasks), default=None)
        if least is None or (least.tasks and len(self.workers) < self.count):
            number = min(set(range(self.count)) - {worker.number for worker in self.workers})
            least = _Worker(number, self)
            self.workers.append(least)  # before it starts: an interrupt must not leave it behind
            least.start()
        return least

    # ------------------------------------------------------------------ taking

    def _collect(self, seconds: float) -> None:
        """Take what the workers have sent, after at most `seconds`; replace those that are lost."""
        handles = [handle for w in self.workers for handle in (w.link, w.process.sentinel)]
        found = wait(handles, seconds)
        for worker in list(self.workers):
            gone = worker.link in found and not self._take(worker)
            # Where the data set has forked, only the system knows that its process has ended.
            gone = gone or worker.process.sentinel in found
            if gone or not (found or worker.process.is_alive()):
                while wait([worker.link], 0) and self._take(worker):  # what it sent before
                    pass
                worker.process.join(1.0)
                self._replace(worker, _end_of(worker.process.exitcode), overdue=False)
            elif worker.link not in found and worker.overdue(self.timeout):
                self._replace(worker, f"took longer than {self.timeout:g} s", overdue=True)

    def _take(self, worker: _Worker) -> bool:
        """Take one message; False where there is none any more."""
        try:
            done, value = receive(worker.link)
        except (EOFError, ConnectionResetError):
            return False
        except OSError as error:
            raise _no_resources(error) from error
        if not done:
            raise _failure(*value)
        task = worker.tasks.popleft()
        if task.alone is not None:  # its sample can be read
            self.suspects.popleft()
            task.alone = None
            self._read_again(task)
        elif self.thread is not None and self.then is not None:
            self.ready[task.number] = self.thread.submit(self.then, value)
        else:
            self.ready[task.number] = value
        return True

    def _replace(self, worker: _Worker, how: str, *, overdue: bool) -> None:
        """Drop a worker that died or was overdue, and see to what it was reading."""
        slot = int(worker.at[0])
        self.workers.remove(worker)
        worker.end()
        if not worker.tasks:
            return
        task = worker.tasks.popleft()
        self.again += worker.tasks
        task.how = how
        if task.alone is not None:
            self.suspects.popleft()
            blamed, task.alone = task.alone, None
            if slot >= 0:
                what = "Reading it" if overdue else "The process that read it"
                task.lost[blamed] = f"{what} {how}."
                self.again.append(task)
            else:
                self._read_again(task)
        elif 0 <= slot < len(task.items):
            task.alone = slot
            self.suspects.append(task)
        else:
            self._read_again(task)

    def _read_again(self, task: _Task) -> None:
        task.deaths += 1
        if task.deaths >= _DEATHS:
            raise FastpieError(
                f"Expected workers that read every batch, but {task.deaths} in a row were lost at the "
                f"same one, and no sample of it alone does that; the last one {task.how}. Use fewer "
                "workers or smaller batches if memory is short, or num_workers=0 to see where it "
                "happens."
            )
        self.again.append(task)


def _end_of(code: int | None) -> str:
    """How a process ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    hints: dict[int, str] = {
        signal.SIGKILL: ", as the system does when memory is short",
        signal.SIGBUS: ", as when /dev/shm is too small or a mapped file has shrunk",
    }
    hint = hints.get(-code, "")
    with contextlib.suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name}{hint})"
    return f"was killed by signal {-code}"


def _no_resources(error: OSError) -> FastpieError:
    return FastpieError(
        f"Expected to start and to reach the processes that read, but: {error}. {_advice(error.errno)}"
    )


def _failure(number: int | None, text: str) -> FastpieError:
    advice = "" if number is None else _advice(number) + "\n"
    return FastpieError(
        f"Expected a process that reads without an exception, but it raised one. {advice}{text}"
    )


def _advice(number: int | None) -> str:
    if number in (errno.EMFILE, errno.ENFILE):
        return "Close files that are not needed, raise the limit (ulimit -n), or use fewer workers."
    return "Use fewer workers or smaller batches."


# ---------------------------------------------------------------------- in the worker


class _UnwantedError(Exception):
    """Nobody wants the batch any more."""


def _work(
    link: socket.socket,
    at: Any,
    job: Job,
    init: Callable[[int], None] | None,
    number: int,
    count: int,
) -> None:
    # Both go to the whole process group; the process that started this one decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (what data sets use)
    torch.manual_seed(number)
    info = torch_worker.WorkerInfo(id=number, num_workers=count, seed=number, dataset=job.dataset)
    spare = os.open(os.devnull, os.O_RDONLY)  # a place for the file that says that there is none
    try:
        if init is not None:
            with _shown(info):
                init(number)
        while True:
            at[1], at[0] = time.monotonic(), _WAITING
            task = receive(link)
            if task is None:
                return
            send(link, (True, _do(job, at, info, *task)))
    except (_UnwantedError, EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        os.close(spare)
        with contextlib.suppress(BrokenPipeError):
            send(link, (False, (getattr(error, "errno", None), traceback.format_exc())))


def _do(
    job: Job, at: Any, info: Any, items: list[Any], lost: dict[int, str], alone: int | None
) -> Any:
    reads = []
    for slot, item in enumerate(items):
        if alone is not None and slot != alone:
            continue
        if at[2]:
            raise _UnwantedError
        if slot in lost:
            reads.append(job.lost(item, lost[slot]))
            continue
        at[1], at[0] = time.monotonic(), slot
        with _shown(info):
            reads.append(job.read(item))
    if alone is not None:
        return None
    at[1], at[0] = time.monotonic(), len(items)
    return job.batch(reads)


@contextlib.contextmanager
def _shown(info: Any) -> Iterator[None]:
    """What `get_worker_info()` tells; not to collate functions: torch's would use /dev/shm."""
    torch_worker._worker_info = info
    try:
        yield
    finally:
        torch_worker._worker_info = None


def _end_with(parent: int) -> None:
    """End this process, whatever it is doing, when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
