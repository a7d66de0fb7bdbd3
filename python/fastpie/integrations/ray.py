"""`mine_on_ray()`: a run on a Ray cluster. Actors hold the engine, Ray Data hands them the parts."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.mining.member import Member
from fastpie.mining.population import merge_parts
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Reader
from fastpie.mining.result import MiningResult
from fastpie.mining.run import Model, check_arguments, loader_of
from fastpie.mining.run_folder import RunFolder
from fastpie.mining.session import Session, lock_run
from fastpie.mining.telemetry import Telemetry

__all__ = ["mine_on_ray"]

Data = Dataset[Any] | DataLoader[Any]

_BLOCKS = 4096
"""At most: Ray Data keeps account of every block, and shows progress and hands out work by them."""
_ATTEMPTS = 4
"""Times that a part is begun at most: a sample may be what kills its actor, which Ray always restarts."""


def mine_on_ray(
    dual: Model | Callable[[], Model] | Sequence[Model | Callable[[], Model]],
    data: Data | Callable[[], Data],
    out: str | os.PathLike[str],
    *,
    actors: int | tuple[int, int] | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    task: str = "multiclass",
    batch_size: int | None = None,
    num_workers: int | None = None,
    read_timeout: float | None = None,
    sample_ids: Sequence[Any] | None = None,
    recalibrate: bool = True,
    keep_logits: bool = False,
    keep_features: bool | str = False,
    committee: int = 0,
    output: str | int | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    models_at_once: int | None = None,
    limit: int | None = None,
    retry_errors: bool = False,
    progress: bool | None = None,
    note: dict[str, Any] | None = None,
) -> MiningResult:
    """`fastpie.mine` on a Ray cluster: the same run folder with the same bits, whoever scored what.

    One task with the resources of an actor begins the run or takes it up (plan, recalibration,
    kernels: they are timed where they will run). Then Ray Data hands the parts that remain to the
    actors, which write them. An actor that dies is started again by Ray, and its open part is
    redone; Ctrl-C drops the open parts. Call it again with the same arguments, or `fastpie.mine`, to
    go on where a run stopped.

    A cluster that is not connected yet is by `ray.init()`: it is found by the variable RAY_ADDRESS,
    or else started on this machine, without Ray's usage statistics unless RAY_USAGE_STATS_ENABLED
    asks for them. fastpie must be installed on every node, in one version.

    Args:
        dual: as for `fastpie.mine`, or a function that builds the model, say from a checkpoint that
            every node sees. A model travels through Ray's object store, once to each node.
        data: a map-style data set (or a DataLoader) that can be pickled, or a function that opens it
            on a node.
        out: the run folder, which all nodes must see (NFS), or a URL that fsspec knows ("s3://...").
            No lock keeps two runs out of a URL.
        actors: how many, or (fewest, most) between which Ray Data chooses; by default as many as the
            cluster holds.
        num_cpus: cores of an actor. Its threads are as many, and the last bits depend on them.
        num_gpus: GPUs of an actor; an actor computes on its first one. 0 computes on the CPU.
        task: see `fastpie.mine`, as for every argument below.
        batch_size: samples in a pass.
        num_workers: processes that read, of each actor.
        read_timeout: seconds that such a process may take for one sample.
        sample_ids: one for each sample.
        recalibrate: give the pruned model BatchNorm statistics of its own.
        keep_logits: write both models' outputs.
        keep_features: write both models' features.
        committee: this many copies with noise on their weights score each sample too.
        output: key or index of the logits.
        precision: "fp32", "bf16" or, on a GPU, "fp16".
        backend: of the engine.
        models_at_once: of several models, how many an actor holds.
        limit: score about this many samples more (whole parts) and stop.
        retry_errors: read again the samples in the errors table.
        progress: whether to show a bar.
        note: kept in `run.json`.

    Returns:
        MiningResult: as of `fastpie.mine`.

    Raises:
        FastpieError: as `fastpie.mine`; for a model or data set that cannot be sent to an actor, a
            folder that an actor does not see, an actor that dies again and again, or if Ray
            (`fastpie[ray]`) is not installed. What an actor raised is the cause.
    """
    ray = _ray()
    check_arguments(task, limit, note, committee, keep_features)
    pool = _pool_size(actors)
    several = not (isinstance(dual, nn.Module) or callable(dual))
    models = [dual] if isinstance(dual, nn.Module) or callable(dual) else list(dual)
    if not models:
        raise FastpieError("Expected at least one model, but got an empty list.")
    location = os.fspath(out)
    if "://" not in location:
        location = str(Path(location).absolute())  # actors have working directories of their own
    job = _Job(
        models=[_on_cpu(model) for model in models],
        several=several,
        data=data,
        location=location,
        task=task,
        options={
            "recalibrate": recalibrate,
            "keep_logits": keep_logits,
            "keep_features": keep_features,
            "output": output,
            "precision": precision,
            "backend": backend,
            **({"committee": committee} if committee else {}),
        },
        device="cuda" if num_gpus else "cpu",
        threads=max(1, int(num_cpus)),
        batch_size=batch_size,
        num_workers=num_workers,
        read_timeout=read_timeout,
        sample_ids=sample_ids,
        models_at_once=models_at_once,
        limit=limit,
        retry_errors=retry_errors,
        note=note,
    )
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init()
    folder = RunFolder(location)
    folder.create()
    lock = lock_run(folder, (0, 1), len(models) if several else 0)
    try:
        cluster = _Cluster(ray, num_cpus, num_gpus, pool, progress)
        reference = cluster.put(job)
        begun = cluster.begin(reference)
        for group, todo in begun["groups"]:
            if todo:
                cluster.score(reference, group, todo)
        if several:
            changed = {part for _, todo in begun["groups"] for part in todo}
            merge_parts(folder, len(models), range(begun["parts"]), changed)
        folder.export_errors()
    finally:
        if lock is not None:
            lock.release()
    return MiningResult(out)


# ---------------------------------------------------------------------- on the nodes


@dataclass(frozen=True)
class _Job:
    """What a call asks for, as it travels to the actors; see `mine_on_ray`."""

    models: Sequence[Model | Callable[[], Model]]
    several: bool
    data: Any
    location: str
    task: str
    options: dict[str, Any]
    device: str
    threads: int
    batch_size: int | None
    num_workers: int | None
    read_timeout: float | None
    sample_ids: Sequence[Any] | None
    models_at_once: int | None
    limit: int | None
    retry_errors: bool
    note: dict[str, Any] | None

    def session(self) -> Session:
        """With models and data of this process."""
        data = self.data
        if callable(data) and (isinstance(data, type) or not hasattr(data, "__getitem__")):
            data = data()
        reader = Reader(
            data,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            read_timeout=self.read_timeout,
        )
        loaders = [loader_of(model, self.options["keep_features"]) for model in self.models]
        session = Session(
            RunFolder(self.location), reader, loaders, self.several, Ranks(), progress=False
        )
        session.configure(self.task, self.options, self.device)
        session.telemetry = Telemetry(device=session.lanes.device)
        return session


def _begin(job: _Job) -> dict[str, Any]:
    """Begin the run or take it up.

    Returns:
        `parts`, how many the run has; `groups`, of each group of models its numbers and, by part,
        the samples that remain; and what `_told` gives.
    """
    answer: dict[str, Any] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with _told(answer), contextlib.ExitStack() as stack:
            session = job.session()
            stack.callback(session.telemetry.close)
            answer["groups"] = []
            for group in session.groups(job.models_at_once):
                members = session.open(group, job.sample_ids, job.note, None)
                parts = range(session.plan.parts)
                answer["parts"] = len(parts)
                todo: dict[int, int] = {}
                left = len(session.plan) if job.limit is None else job.limit
                for work in session.todo(members, parts, job.retry_errors):
                    if left <= 0:
                        break
                    todo[work.part] = sum(len(session.plan.positions(b)) for b in work.batches)
                    left -= todo[work.part]
                answer["groups"].append((group, todo))
    finally:
        torch.set_num_threads(before)  # other tasks use this process
    return answer


class _Actor:
    """Scores the parts that it is given; the engine is made for the first one."""

    def __init__(self, reference: Any, attempts: Any, group: range) -> None:
        """Nothing that can fail: an error here would be taken for a broken node."""
        self._reference = reference
        self._attempts = attempts
        self._group = group
        self._job: _Job
        self._session: Session | None = None
        self._members: list[Member] = []

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        part = int(batch["part"][0])
        start = time.perf_counter()
        scored = errors = 0
        answer: dict[str, Any] = {}
        with _told(answer):
            self._check_attempts(part)
            session = self._opened()
            # What another actor wrote of it before it died, or before the answer was lost, stays.
            todo = session.todo(self._members, [part], self._job.retry_errors)
            scored, errors = session.score(self._members, todo)
        return {
            "part": [part],
            "scored": [scored],
            "errors": [errors],
            "seconds": [time.perf_counter() - start],
            "told": [json.dumps(answer)],
        }

    def _check_attempts(self, part: int) -> None:
        number, most = _ray().get(self._attempts.begin.remote(self._group.start, part))
        if number > most:
            raise FastpieError(
                f"Expected actors that live, but {most} in a row died over part {part} (Ray's logs say "
                "of what). The parts written before are whole; the same call goes on from there. With "
                "num_workers=1 a sample that kills the process that reads it goes to the errors table."
            )

    def _opened(self) -> Session:
        if self._session is None:
            self._job = _ray().get(self._reference)
            torch.set_num_threads(self._job.threads)
            session = self._job.session()
            self._members = session.take_up(self._group, self._job.sample_ids)
            self._session = session
        return self._session


@contextlib.contextmanager
def _told(answer: dict[str, Any]) -> Iterator[None]:
    """Puts the warnings of a block into `answer`, and what it raises, for the driver to say again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            text = str(error)
            if not isinstance(error, FastpieError):
                text = (
                    f"Expected {platform.node()} to do its part of the run, but it raised "
                    f"{type(error).__name__}: {error}"
                )
            answer["failure"] = text
            answer["traceback"] = traceback.format_exc()
    answer["warnings"] = [str(w.message) for w in caught if w.category is UserWarning]


# ---------------------------------------------------------------------- on the driver


class _RemoteError(Exception):
    """What was raised on a node, as text."""


class _Cluster:
    """Ray as one call uses it."""

    def __init__(
        self,
        ray: Any,
        num_cpus: float,
        num_gpus: float,
        pool: tuple[int, int] | None,
        progress: bool | None,
    ) -> None:
        self._ray = ray
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._pool = pool
        self._bar_disabled = None if progress is None else not progress
        self._said: set[str] = set()
        self._attempts: Any = None
        self._room = sum(
            int(min(node["Resources"].get(k, 0) // v for k, v in wanted.items()))
            for wanted in [{k: v for k, v in {"CPU": num_cpus, "GPU": num_gpus}.items() if v}]
            for node in ray.nodes()
            if node["Alive"]
        )
        if not self._room:
            warnings.warn(
                f"No node of the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs for an actor: the "
                "run waits until one joins.",
                stacklevel=3,
            )

    def put(self, job: _Job) -> Any:
        """Models and data into the object store, once."""
        try:
            return self._ray.put(job)
        except Exception as error:  # whatever a class raises that does not want to be pickled
            raise FastpieError(
                "Expected models and a data set that can be pickled, or functions that build and open "
                f"them on a node, but: {type(error).__name__}: {error}"
            ) from error

    def begin(self, reference: Any) -> dict[str, Any]:
        """See the function `_begin`."""
        remote = self._ray.remote(**self._resources)(_begin)
        with self._explained():
            answer: dict[str, Any] = self._ray.get(remote.remote(reference))
        self._say(answer)
        return answer

    def score(self, reference: Any, group: range, todo: Mapping[int, int]) -> None:
        """Have the parts scored that remain (by part: its samples) for a group of models."""
        if self._attempts is None:
            self._attempts = self._counter()
        blocks = min(len(todo), _BLOCKS)
        data = self._ray.data.from_items(
            [{"part": part} for part in todo], override_num_blocks=blocks
        )
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        least, most = (min(n, blocks) for n in self._pool or (max(1, self._room),) * 2)
        answers = data.map_batches(
            _Actor,
            fn_constructor_args=(reference, self._attempts, group),
            batch_size=1,
            batch_format="numpy",
            # One part at a time: the last ones go to whoever is free.
            compute=self._ray.data.ActorPoolStrategy(
                min_size=least, max_size=most, max_tasks_in_flight_per_actor=1
            ),
            **self._resources,
        )
        errors = 0
        bar = tqdm(
            total=sum(todo.values()),
            desc="mining",
            unit="img",
            disable=self._bar_disabled,
            leave=False,
        )
        with self._explained(), bar:
            for answer in answers.iter_batches(
                batch_size=1, batch_format="numpy", prefetch_batches=0
            ):
                self._say(json.loads(answer["told"][0]))
                errors += int(answer["errors"][0])
                bar.update(todo[int(answer["part"][0])])
                if errors:
                    bar.set_postfix(errors=errors)

    def _counter(self) -> Any:
        """An actor that counts how often each part is begun, and outlives those that do it."""
        most = _ATTEMPTS

        class Attempts:  # a local class travels by value: its process imports no torch
            def __init__(self) -> None:
                self.begun: dict[tuple[int, int], int] = {}

            def begin(self, group: int, part: int) -> tuple[int, int]:
                self.begun[group, part] = self.begun.get((group, part), 0) + 1
                return self.begun[group, part], most

        return self._ray.remote(num_cpus=0, max_restarts=-1)(Attempts).remote()

    def _say(self, answer: Mapping[str, Any]) -> None:
        """Warn as the nodes did, once, and raise what one of them raised."""
        for message in answer["warnings"]:
            if message not in self._said:
                self._said.add(message)
                warnings.warn(message, stacklevel=4)
        if "failure" in answer:
            raise FastpieError(answer["failure"]) from _RemoteError("\n" + answer["traceback"])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._ray.exceptions.RayError as error:
            text = str(error).strip()
            raise FastpieError(
                f"Expected Ray to do the work, but {type(error).__name__}: {text}\nThe parts written "
                "before are whole; the same call goes on from there."
            ) from error


def _ray() -> Any:
    load_extra("ray.data", "ray", "a run on a cluster")
    return load_extra("ray", "ray", "a run on a cluster")


def _pool_size(actors: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if actors is None:
        return None
    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most:
        raise FastpieError(f"Expected `actors` to be n or (fewest, most) from 1, but got {actors}.")
    return least, most


def _on_cpu(model: Any) -> Any:
    """A model that a node without a GPU can receive; the caller's stays where it is."""
    if isinstance(model, nn.Module):
        tensors = (*model.parameters(), *model.buffers())
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return copy.deepcopy(model).cpu()
    return model
