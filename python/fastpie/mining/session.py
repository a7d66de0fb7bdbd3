"""One call of `mine`: set up or take up the run, score what remains, finish."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fastpie import _C
from fastpie._digest import digest_of
from fastpie.data.manifest import Manifest
from fastpie.dual import DualModel
from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError
from fastpie.mining.follower import usable_device
from fastpie.mining.interruption import Interruption
from fastpie.mining.lanes import Lanes
from fastpie.mining.lock import RunLock
from fastpie.mining.member import Member, Outputs, Remaining, error_rows
from fastpie.mining.part import PartRows
from fastpie.mining.plan import Plan, digest_of_ids, fingerprint_of, ids_of, known_sample_ids
from fastpie.mining.population import merge_parts
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Kind, Problem, Reader, Sample, path_of
from fastpie.mining.run_folder import ERRORS_SCHEMA, RunFolder, SampleIndex, config_hash
from fastpie.mining.telemetry import Telemetry
from fastpie.mining.writer import Writer

__all__ = ["Session", "lock_run", "versions"]

_NEEDED_TO_RESUME = {
    "versions", "config", "fingerprints", "labelled", "label_kind", "image_shape", "batches_per_part",
}  # fmt: skip
_RECALIBRATION_SAMPLES = 2048
_SAMPLES_LOOKED_AT = 8  # at the start: shape and labels of most of them are those of the run
_SAMPLES_TRIED = (
    256  # at the start: if none of so many readable ones can be scored, the format is wrong
)
_PART_BYTES = 2**28  # of kept logits and features, which wait in memory for the end of the part
_PART_SECONDS = 10.0  # a part is cut to take about this long, well inside the 30 s that may be lost


@dataclass(frozen=True)
class _Work:
    """What is to be done of one part.

    Attributes:
        part: its number.
        of: by place of the member in the group, what it has not done.
    """

    part: int
    of: dict[int, Remaining]

    @property
    def batches(self) -> list[int]:
        """Of all members."""
        return sorted({b for remaining in self.of.values() for b in remaining.batches})


class Session:
    """The state of one call of `mine` in one process."""

    def __init__(
        self,
        folder: RunFolder,
        reader: Reader,
        loaders: Sequence[Callable[[], DualModel]],
        several: bool,
        ranks: Ranks,
        progress: bool | None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: of the run.
            reader: of the data.
            loaders: give the dual models.
            several: whether each model has a folder of its own.
            ranks: the processes of the run.
            progress: whether to show bars; None: on a terminal.
        """
        self.folder = folder
        self.reader = reader
        self.loaders = loaders
        self.several = several
        self.ranks = ranks
        self.bar_disabled = (None if progress is None else not progress) if not ranks.rank else True
        self.plan: Plan
        self.ids_in_items = False
        self.config: dict[str, Any]
        self.record: dict[str, Any]
        self.lanes: Lanes
        self.telemetry: Telemetry  # whoever calls `open` and `score` sets it
        self._first: DualModel
        self._example: tuple[Any, ...] | None = None
        self._changed: set[int] = set()  # parts that this call has written

    def run(
        self,
        task: str,
        options: dict[str, Any],
        device: str | torch.device | None,
        *,
        sample_ids: Sequence[Any] | None,
        models_at_once: int | None,
        limit: int | None,
        shard: tuple[int, int],
        retry_errors: bool,
        log: str | None,
        note: dict[str, Any] | None,
    ) -> None:
        """All of it; see `mine`."""
        self.configure(task, options, device)
        self.folder.create()
        self.telemetry = Telemetry(
            self.folder.path, log, rank=self.ranks.rank, device=self.lanes.device
        )
        lock = None
        try:
            if not self.ranks.rank:
                lock = lock_run(self.folder, shard, len(self.loaders) if self.several else 0)
            # Of rank 0: the memory that is free differs from one process to the next.
            for group in self.ranks.first(partial(self.groups, models_at_once)):
                members = self.open(group, sample_ids, note, lock)
                todo = self.ranks.first(
                    partial(self.todo, members, self._parts(shard), retry_errors, limit)
                )
                self._changed |= {work.part for work in todo}
                self.score(members, todo[self.ranks.rank :: self.ranks.count])
                self.ranks.wait()
            self._finish(self._parts(shard), lock)
        finally:
            self.telemetry.close()
            if lock is not None:
                lock.release()

    def configure(
        self, task: str, options: dict[str, Any], device: str | torch.device | None
    ) -> None:
        """Load the first model, and know with it what decides the results; see `mine`."""
        self._first = first = self.loaders[0]()
        self.lanes = Lanes(usable_device(device, first))
        self.config = {
            "task": task,
            "batch_size": self.reader.batch_size,
            "sparsities": first.masks.sparsities,
            "is_ladder": first.masks.is_ladder,
            "features": first.feature_module,
            "device": self.lanes.device.type,
            **options,
        }

    def groups(self, at_once: int | None) -> list[range]:
        """Numbers of the models that are held in memory together: so many, or as many as fit."""
        count = len(self.loaders)
        at_once = at_once or _models_that_fit(
            self._first, self.config.get("committee", 0), count, self.lanes.device
        )
        return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]

    def _parts(self, shard: tuple[int, int]) -> range:
        index, count = shard
        return range(index * self.plan.parts // count, (index + 1) * self.plan.parts // count)

    def _load(self, number: int) -> DualModel:
        dual = self.loaders[number]() if number else self._first
        found = {
            "sparsities": dual.masks.sparsities,
            "is_ladder": dual.masks.is_ladder,
            "features": dual.feature_module,
        }
        for key, value in found.items():
            if value != self.config[key]:
                raise FastpieError(
                    f"Expected every model with the {key} of the first, {self.config[key]}, but "
                    f"model {number} has {value}."
                )
        return dual

    # ------------------------------------------------------------------ set-up

    def open(
        self,
        group: range,
        sample_ids: Sequence[Any] | None,
        note: dict[str, Any] | None,
        lock: RunLock | None,
    ) -> list[Member]:
        """The members of a group, begun or taken up by rank 0, then taken up by the others."""
        members: list[Member] = []

        def begin() -> None:
            with contextlib.nullcontext() if lock is None else lock.set_up():
                members.extend(self._begin(group, sample_ids, note))

        self.ranks.first(begin)
        return self.take_up(group, sample_ids) if self.ranks.rank else members

    def take_up(self, group: range, sample_ids: Sequence[Any] | None) -> list[Member]:
        """The members of a group that another process has begun."""
        if self.folder.record() is None:
            raise FastpieError(
                f"Expected the run that was begun in {self.folder.location}, but "
                f"{platform.node()} finds none there: all processes must see the same folder."
            )
        return self._begin(group, sample_ids, None)

    def _begin(
        self,
        group: range,
        sample_ids: Sequence[Any] | None,
        note: dict[str, Any] | None,
    ) -> list[Member]:
        duals = [self._load(number) for number in group]
        record = self.folder.record()
        self._cut(sample_ids, resumed=record is not None)
        data = {
            "data": f"{len(self.plan)} samples, {self.plan.fingerprint()}",
            "samples": fingerprint_of(self.reader.dataset),
        }
        if record is None:
            kind = self._first_samples()
            self._take_up(
                {
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "versions": versions(),
                    "config": self.config,
                    "config_hash": config_hash(self.config),
                    "fingerprints": data,
                    "labelled": kind.label is not None,
                    "label_kind": kind.label,
                    "image_shape": kind.image,
                    "batches_per_part": 1,
                    "note": note or {},
                }
            )
        else:
            self._check_resumable(self.folder, record)
            if self.several:
                models = record.get("models", 1)
                if models != len(self.loaders):
                    raise FastpieError(
                        f"Expected the {models} models of the run in {self.folder.location}, but got "
                        f"{len(self.loaders)}. Choose another folder, or remove this one."
                    )
                self._check_same(self.folder, record, data)
            self._take_up(record)
        members = [
            self._member(self.folder.member(n) if self.several else self.folder, dual)
            for n, dual in zip(group, duals, strict=True)
        ]
        if record is None:
            self._start(members[0])
        for member in members:
            member.plan = self.plan
            member.folder.create()
            known = member.folder.record()
            if known is None:
                self._start_member(member, data)
            else:
                self._check_resumable(member.folder, known)
                self._check_same(member.folder, known, {**data, **member.fingerprints()})
        changed = {k: v for k, v in versions().items() if self.record["versions"].get(k) != v}
        if changed:
            warnings.warn(
                f"This run was started with other versions ({changed} now); rows scored from here on "
                "can differ in the last bits.",
                stacklevel=6,
            )
        return members

    def _member(self, folder: RunFolder, dual: DualModel) -> Member:
        def path(position: int) -> str | None:
            return path_of(self.reader.dataset, int(self.plan.order[position]))

        return Member(
            folder, dual, self.plan, self.config, labelled=self.record["labelled"], paths=path
        )

    def _cut(self, sample_ids: Sequence[Any] | None, *, resumed: bool) -> None:
        """Find every sample's id and cut the work, as before where the ids are as before."""
        dataset: Any = self.reader.dataset
        stored = self.folder.samples() if resumed else None
        given = known_sample_ids(dataset) if sample_ids is None else sample_ids
        source = "data set"
        if given is None and stored is not None and stored.source == "items":
            source = "items"
            self.plan = Plan(stored.sample_ids, stored.order, self.reader.batch_size)
        else:
            if given is None:
                given = self._ids_from_items(dataset)
                source = "index" if isinstance(given, range) else "items"
            ids = ids_of(given)
            digest = digest_of_ids(ids)
            if stored is not None and stored.digest == digest:
                self.plan = Plan(stored.sample_ids, stored.order, self.reader.batch_size)
            else:
                self.plan = Plan.cut(ids, self.reader.batch_size)
                if not self.ranks.rank and (
                    # Anything else is refused later, and must leave the file as it is.
                    stored is None or self.plan.sample_ids == stored.sample_ids
                ):
                    self.folder.write_samples(
                        SampleIndex(self.plan.sample_ids, self.plan.order, source, digest)
                    )
                    manifest = getattr(dataset, "manifest", None)
                    if isinstance(manifest, Manifest):
                        self.folder.write_table("manifest.parquet", manifest.table)
        self.ids_in_items = source == "items"
        if len(self.plan) != len(dataset):
            raise FastpieError(
                f"Expected one sample id for each of the {len(dataset)} samples, but got "
                f"{len(self.plan)}."
            )

    def _ids_from_items(self, dataset: Any) -> Sequence[Any]:
        count = len(dataset)
        first = next(
            (s for s in map(self.reader.read_one, range(count)) if isinstance(s, Sample)), None
        )
        if first is None or first.sample_id is None:
            if first is not None:
                warnings.warn(
                    "The data set names no sample ids, so its indices serve as ids: a run cannot "
                    "notice when its order changes. Pass `sample_ids`, or give the data set an "
                    "attribute `sample_ids`.",
                    stacklevel=8,
                )
            return range(count)
        with self._bar(count, "sample ids") as bar:
            return self.reader.read_sample_ids(bar.update)

    def _take_up(self, record: dict[str, Any]) -> None:
        self.record = record
        self.plan = replace(self.plan, batches_per_part=record["batches_per_part"])

    def _start(self, member: Member) -> None:
        """Try the first batches, and cut the parts by the time that one takes."""
        members = map(self.folder.member, range(len(self.loaders) if self.several else 0))
        if any(folder.done_parts() for folder in (self.folder, *members)):
            raise FastpieError(
                f"Expected a new folder or a run in {self.folder.location}, but it holds scores "
                "without a run.json. Choose another folder, or remove this one."
            )
        seconds, size = self._try_batches(member)
        models = len(self.loaders)
        self.record["batches_per_part"] = max(
            1,
            min(
                int(_PART_SECONDS / max(seconds * models, 1e-3)),
                _PART_BYTES // max(size * models, 1),
            ),
        )
        self._take_up(self.record)
        if self.several:
            self.folder.export_errors(ERRORS_SCHEMA.empty_table())
            hardness = f"{member.scorer.hardness}, mean over {models} models"
            self.folder.write_record({**self.record, "models": models, "hardness": hardness})

    def _start_member(self, member: Member, data: dict[str, str | None]) -> None:
        if member.engine is None:
            member.compile(self._example_arguments(), self.lanes.device, self._recalibration)
        member.save_masks()
        member.folder.export_errors(ERRORS_SCHEMA.empty_table())
        record = {key: value for key, value in self.record.items() if key != "models"}
        member.folder.write_record(
            {
                **record,
                "fingerprints": {**member.fingerprints(), **data},
                "masks_of_these_weights": _masks_of_these_weights(member.dual),
                "hardness": member.scorer.hardness,
                **member.about_features(self._example_arguments()),
            }
        )

    def _first_samples(self) -> Kind:
        """What the first readable samples in sample_id order are like, by majority."""
        samples, problems = [], []
        for position, index in enumerate(self.plan.order):
            sample = self.reader.read_one(int(index))
            if isinstance(sample, Sample):
                samples.append(sample)
                if len(samples) == _SAMPLES_LOOKED_AT:
                    break
            else:
                problems.append(Problem(position, "read", sample))
        if not samples:
            raise self._refusal(problems)
        # Labels of the other tasks are not scored: they need not be there, nor of one shape.
        scored = self.config["task"] in ("multiclass", "multilabel")
        labelled = scored and 2 * sum(s.label is not None for s in samples) >= len(samples)
        return Kind.of_most(samples, labelled=labelled, batch_size=self.plan.batch_size)

    def _try_batches(self, member: Member) -> tuple[float, int]:
        """Score batches until one sample has a score; seconds of the last batch, bytes that it keeps."""
        problems: list[Problem] = []
        tried = 0
        start = time.perf_counter()
        for batch in self._read(range(self.plan.batches)):
            problems += batch.problems
            if batch.images is not None:
                args = self._arguments(batch.images)
                waited = time.perf_counter() - start
                if member.engine is None:
                    self._example = args
                    member.compile(args, self.lanes.device, self._recalibration)
                start = time.perf_counter()
                out = member.forward(args)
                _, _, unusable, kept = member.scorer.score(
                    out.dual, batch.labels, batch.positions, batch.slots, out.copies
                )
                if len(unusable) < len(batch.positions):
                    size = sum(array.nbytes for pair in kept.values() for array in pair)
                    return waited + time.perf_counter() - start, size
                problems += unusable
            tried += self.plan.batch_size
            if tried >= _SAMPLES_TRIED and batch.images is not None:
                break
            start = time.perf_counter()
        raise self._refusal(problems)

    def _example_arguments(self) -> tuple[Any, ...]:
        """A batch to compile an engine for."""
        if self._example is None:
            for batch in self._read(range(self.plan.batches)):
                if batch.images is not None:
                    self._example = self._arguments(batch.images)
                    break
            else:
                raise FastpieError("Expected a batch that can be read, but there is none.")
        return self._example

    def _refusal(self, problems: list[Problem]) -> FastpieError:
        """Why a run cannot begin; what was seen is in the errors table."""

        def path(position: int) -> str | None:
            return path_of(self.reader.dataset, int(self.plan.order[position]))

        rows = error_rows(self.plan, path, problems)
        rows.sort(key=lambda row: row["sample_id"])
        self.folder.export_errors(pa.Table.from_pylist(rows, schema=ERRORS_SCHEMA))
        return FastpieError(
            f"Expected samples that can be scored, but of the first {len(problems)} of "
            f"{len(self.plan)} none can; the first: {problems[0].error} (all are in "
            f"{self.folder.location}/errors.parquet)"
        )

    def _check_resumable(self, folder: RunFolder, record: dict[str, Any]) -> None:
        missing = _NEEDED_TO_RESUME - record.keys()
        if missing:
            raise FastpieError(
                f"Expected a run.json in {folder.location} to go on from, but it has no "
                f"{sorted(missing)}. Choose another folder, or remove this one."
            )

    def _check_same(
        self, folder: RunFolder, record: dict[str, Any], fingerprints: dict[str, str | None]
    ) -> None:
        before = {**record["config"], **record["fingerprints"]}
        now = {**self.config, **fingerprints}
        differing = [
            f"{key}: {_short(before.get(key))} in the folder, {_short(now.get(key))} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise FastpieError(
                f"Expected the configuration of the run in {folder.location}, but it differs in "
                + "; ".join(differing)
                + ". Choose another folder, or remove this one."
            )

    def _recalibration(self) -> Iterator[tuple[Any, ...]]:
        """Batches to recalibrate BatchNorm from."""
        positions = sorted(self.plan.lowest_hashes(_RECALIBRATION_SAMPLES))
        size = self.plan.batch_size
        found = False
        for batch in self._read_positions(
            [positions[i : i + size] for i in range(0, len(positions), size)]
        ):
            if batch.images is None:
                continue
            found = True
            slots = torch.as_tensor(batch.slots, device=self.lanes.device)
            # A tuple within a tuple: `recalibrate` takes the first element of a batch, and spreads
            # it over the arguments of the model.
            yield (
                pytree.tree_map(
                    lambda leaf, slots=slots: leaf[slots] if isinstance(leaf, Tensor) else leaf,
                    self._arguments(batch.images),
                ),
            )
        if not found:
            raise FastpieError(
                "Expected readable samples to recalibrate BatchNorm from, but none of the "
                f"{len(positions)} chosen is; pass recalibrate=False or mend the data."
            )

    # ------------------------------------------------------------------ reading

    def _read(self, batches: Sequence[int]) -> Generator[Batch, None, None]:
        return self._read_positions(map(self.plan.positions, batches))

    def _read_positions(self, positions: Any) -> Generator[Batch, None, None]:
        kind = Kind(self.record["image_shape"], self.record["label_kind"])
        for batch in self.reader.read(
            self.plan,
            positions,
            like=kind,
            check_ids=self.ids_in_items,
            pin_memory=self.lanes.device.type == "cuda",
        ):
            changed = [problem.error for problem in batch.problems if problem.stage == "id"]
            if changed:
                raise FastpieError(
                    f"Expected the data set that the run in {self.folder.location} was started with, "
                    f"but the ids of its samples have changed: {changed[0]}. Choose another folder."
                )
            yield batch

    def _arguments(self, images: Any) -> tuple[Any, ...]:
        """Images on the device, as the model's positional arguments."""
        with self.telemetry.stage("copy"):
            images = self.reader.normalize(self.lanes.to_device(images))
        return as_arguments(tuple(images) if isinstance(images, list) else images)

    # ------------------------------------------------------------------ scoring

    def score(self, members: Sequence[Member], todo: Sequence[_Work]) -> tuple[int, int]:
        """Score what the members of a group have not.

        Returns:
            How many scores and how many errors that gave, of all members.
        """
        scores = errors = 0
        items = [(work, number) for work in todo for number in work.batches]
        total = sum(len(self.plan.positions(number)) for _, number in items)
        rows = [PartRows() for _ in members]
        samples = 0  # of the open part
        # Before and after, a signal ends the process at once: whatever is in the folder is whole.
        with (
            Interruption() as asked,
            Writer() as writer,
            self._bar(total, "mining") as bar,
            contextlib.closing(self._read([number for _, number in items])) as batches,
        ):
            for ((work, number), _), found in self.lanes.overlapped(
                zip(items, self._awaited(batches), strict=True),
                lambda item: self._forward(members, *item),
                lambda item, outs: self._scored(members, item[1], outs),
            ):
                for place, scored in found.items():
                    rows[place].add(scored)
                    scores += sum(table.num_rows for table in scored.tables)
                    errors += len(scored.problems)
                count = len(self.plan.positions(number))
                bar.update(count)
                samples += count
                stop = asked.requested
                if stop or number == work.batches[-1]:
                    for place, remaining in work.of.items():
                        task = partial(
                            self._write, members[place], work.part, rows[place], remaining.rows
                        )
                        writer.submit(task)
                    self.telemetry.part(samples)
                    rows, samples = [PartRows() for _ in members], 0
                if stop:
                    break
        return scores, errors

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; what is waited for them is counted."""
        while True:
            with self.telemetry.stage("wait"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _scored(
        self, members: Sequence[Member], batch: Batch, outs: dict[int, Outputs | None]
    ) -> dict[int, PartRows]:
        with self.telemetry.stage("score"):
            return {place: members[place].score(batch, out) for place, out in outs.items()}

    def _write(self, member: Member, part: int, rows: PartRows, add: bool) -> None:
        with self.telemetry.stage("write"):
            member.write(part, rows, add=add)

    def todo(
        self,
        members: Sequence[Member],
        parts: Sequence[int],
        retry_errors: bool,
        limit: int | None = None,
    ) -> list[_Work]:
        """What remains of some parts, in their order, at most `limit` samples (in whole batches)."""
        remaining = [member.remaining(parts, retry_errors=retry_errors) for member in members]
        todo = [
            _Work(part, {place: r[part] for place, r in enumerate(remaining) if part in r})
            for part in sorted(set().union(*remaining))
        ]
        if limit is None:
            return todo
        left = -(-limit // self.plan.batch_size)
        short = []
        for work in todo:
            batches = set(work.batches[:left])
            left -= len(batches)
            of = {p: r._replace(batches=sorted(batches & {*r.batches})) for p, r in work.of.items()}
            of = {p: r for p, r in of.items() if r.batches}
            if of:
                short.append(_Work(work.part, of))
        return short

    def _forward(
        self, members: Sequence[Member], item: tuple[_Work, int], batch: Batch
    ) -> dict[int, Outputs | None]:
        """A batch through the models that have not scored it; on a GPU without waiting for them."""
        work, number = item
        places = [place for place, r in work.of.items() if number in r.batches]
        if batch.images is None:
            return dict.fromkeys(places)
        args = self._arguments(batch.images)
        outs: dict[int, Outputs | None] = {}
        for place in places:
            member = members[place]
            if member.engine is None:
                member.compile(args, self.lanes.device, None)
            with self.telemetry.stage("forward"):
                outs[place] = member.forward(args)
        return outs

    def _finish(self, parts: range, lock: RunLock | None) -> None:
        """What is said of the whole run: the means over several models, the table of errors."""
        if self.several:
            mine = parts[self.ranks.rank :: self.ranks.count]
            merge_parts(self.folder, len(self.loaders), mine, self._changed)
            self.ranks.wait()
        if not self.ranks.rank:
            # One shard after the other, or the table of an earlier one could replace that of a later.
            with contextlib.nullcontext() if lock is None else lock.at_the_end():
                self.folder.export_errors()

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="img", disable=self.bar_disabled, leave=False)


def lock_run(folder: RunFolder, shard: tuple[int, int], models: int) -> RunLock | None:
    """Keep other runs out of a stretch of a run, and tidy up after killed ones.

    Args:
        folder: of the run, which is there.
        shard: the stretch.
        models: that have folders of their own.

    Returns:
        The lock, to be released; None at a URL, where there is none.

    Raises:
        FastpieError: if another run holds some of it.
    """
    if folder.path is None:
        return None
    lock = RunLock(folder.path, shard)
    lock.acquire()
    with lock.set_up() as others:
        if not others:
            for number in range(models):
                folder.member(number).remove_leftovers()
            folder.remove_leftovers()
    return lock


def versions() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "fastpie": metadata.version("fastpie"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_capability(),
    }


def _masks_of_these_weights(dual: DualModel) -> bool | None:
    """Whether the masks were chosen from the weights in force; None where they do not say."""
    parameters = dict(dual.model.named_parameters(remove_duplicate=False))
    made_from = dual.masks.info.get("weights")
    now = digest_of({name: parameters[name] for name in dual.masks})
    return None if made_from is None else bool(made_from == now)


def _models_that_fit(dual: DualModel, copies: int, count: int, device: torch.device) -> int:
    """How many engines half of the free memory should hold, at least one."""
    size = sum(t.nbytes for t in (*dual.model.parameters(), *dual.model.buffers()))
    # The private copy, the dense weights, and of each level values and places of those kept, and
    # the copies of a committee with what their kernels make of them.
    each = size * (2 + sum(2 * (1 - s) for s in dual.sparsities) + 2 * copies)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    return max(1, min(count, int(free / 2 / max(each, 1))))


def _free_memory() -> int:
    """Bytes of main memory that programs can have without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kibibytes) * 1024
    except (OSError, StopIteration):  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
