"""`mine()`: the dual forward over a whole data set, resumable."""

from __future__ import annotations

import bisect
import copy
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fastpie import _C
from fastpie._digest import digest_of
from fastpie.dual import DualEngine, DualModel
from fastpie.dual.calibration import statistics_of
from fastpie.dual.inputs import as_arguments
from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.lanes import Lanes
from fastpie.mining.plan import Plan, fingerprint_of, known_sample_ids
from fastpie.mining.reading import Batch, Kind, Problem, Reader, Sample, path_of
from fastpie.mining.result import MiningResult
from fastpie.mining.run_folder import NO_ROWS, RunFolder, config_hash, explained
from fastpie.mining.scoring import Scorer
from fastpie.pruning import prune
from fastpie.scores.disagreement import TASKS

__all__ = ["DEFAULT_LADDER", "mine"]

DEFAULT_LADDER = (0.1, 0.3, 0.5, 0.7)
"""Levels that a plain model is pruned at: moderate ones, at which it keeps its accuracy."""

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


def mine(
    dual: DualModel | nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    out: str | os.PathLike[str],
    *,
    task: str = "multiclass",
    batch_size: int | None = None,
    num_workers: int | None = None,
    sample_ids: Sequence[Any] | None = None,
    recalibrate: bool = True,
    keep_logits: bool = False,
    keep_features: bool = False,
    output: str | int | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    device: str | torch.device | None = None,
    retry_errors: bool = False,
    progress: bool | None = None,
    note: dict[str, Any] | None = None,
) -> MiningResult:
    """Score every sample by the disagreement of the dense and the pruned model.

    Runs in eval mode and leaves `dual` and its model as they were. Samples are taken in sample_id
    order in batches of fixed content, and the kernels that were chosen by timing are kept with the
    run (`plan.json`), so the table is the same bits for equal batch size, threads, instruction set
    and versions, however often the run is interrupted. Call it again with the same
    arguments to go on where a run stopped; a finished run is returned as it is. A crash at any
    instant loses at most the open part (about 10 s of work).

    Args:
        dual: the dual model; a plain model is pruned by magnitude at .1, .3, .5 and .7.
        data: a map-style data set of `(image[, label[, sample_id]])` or of dicts with `image`,
            `label`, `sample_id`; or a DataLoader, which lends its data set, batch size, workers and
            collate function (its order is not used). The data set must return the same sample for
            the same index (no random augmentation). With a string attribute `fingerprint` (of its
            labels and preprocessing) a run is refused when that has changed.
        out: the run folder, made if it is not there.
        task: "multiclass" (labels: class indices), "multilabel" (labels: [C] of 1, 0, NaN),
            "segmentation" or "embedding" (labels are not scored).
        batch_size: samples in a pass; by default the DataLoader's, else 64.
        num_workers: processes that read; by default the DataLoader's, else none.
        sample_ids: one for each sample of the data set, for one that does not tell them itself. A
            data set tells them by an attribute `sample_ids`, or through its items (then all are
            read once before the run starts). Without any, the index is the id.
        recalibrate: give the pruned model BatchNorm statistics from the 2,048 samples of lowest id
            hash, on a private copy. The published protocol (PruneCXR) does not.
        keep_logits: write both models' outputs beside the scores (PIE and forgettability need them).
        keep_features: write both models' features; `dual` must name a feature module.
        output: key or index of the logits in a model that returns a dict or tuple.
        precision: "fp32", "bf16" or, on a GPU, "fp16".
        backend: of the engine, see `DualModel.compile`.
        device: to run on; by default where the model is.
        retry_errors: read again the samples that are in the errors table of a run.
        progress: whether to show a bar; by default where stderr is a terminal.
        note: anything JSON can hold, kept in `run.json`.

    Returns:
        MiningResult: the table, the errors, and the choice of the hardest.

    Raises:
        FastpieError: for a run folder of another configuration, unusable data, labels or outputs,
            a full disk. Samples that cannot be read or scored do not raise: they are in
            `result.errors`.
    """
    if task not in TASKS:
        raise FastpieError(f"Expected `task` to be one of {TASKS}, but got {task!r}.")
    if not isinstance(dual, DualModel):
        dual = DualModel(dual, prune(dual, DEFAULT_LADDER))
    if keep_features and dual.feature_module is None:
        raise FastpieError(
            "Expected a DualModel with a feature module for keep_features=True, but it names none."
        )
    _check_finite(dual)
    try:
        json.dumps(note)
    except (TypeError, ValueError) as error:
        raise FastpieError(f"Expected a `note` that JSON can hold, but: {error}.") from error
    reader = Reader(data, batch_size=batch_size, num_workers=num_workers)
    folder = RunFolder(Path(out))
    folder.lock()
    try:
        run = _Run(folder, reader, dual, task, _usable_device(device, dual), progress)
        run.plan_samples(sample_ids)
        run.open(
            {
                "recalibrate": recalibrate,
                "keep_logits": keep_logits,
                "keep_features": keep_features,
                "output": output,
                "precision": precision,
                "backend": backend,
            },
            note,
        )
        run.score(retry_errors)
    finally:
        folder.unlock()
    return MiningResult(out)


class _Run:
    """One call of `mine`."""

    def __init__(
        self,
        folder: RunFolder,
        reader: Reader,
        dual: DualModel,
        task: str,
        device: torch.device,
        progress: bool | None,
    ) -> None:
        self.folder = folder
        self.reader = reader
        self.source = dual
        self.task = task
        self.device = device
        self.bar_disabled = None if progress is None else not progress
        self.plan: Plan
        self.scorer: Scorer
        self.config: dict[str, Any]
        self.record: dict[str, Any]
        self.lanes = Lanes(device)
        self.engine: DualEngine | None = None
        self.ids_in_items = False

    # ------------------------------------------------------------------ before the first part

    def plan_samples(self, sample_ids: Sequence[Any] | None) -> None:
        """Find every sample's id and cut the work."""
        dataset: Any = self.reader.dataset
        ids = known_sample_ids(dataset) if sample_ids is None else sample_ids
        if ids is None:
            ids = self._ids_from_items(dataset)
        if len(ids) != len(dataset):
            raise FastpieError(
                f"Expected one sample id for each of the {len(dataset)} samples, but got {len(ids)}."
            )
        self.plan = Plan.cut(ids, self.reader.batch_size)

    def _ids_from_items(self, dataset: Any) -> Sequence[Any]:
        stored = self.folder.path / "sample_ids.json"
        if self.folder.record() is not None and stored.exists():
            self.ids_in_items = True
            return list(json.loads(stored.read_bytes()))
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
                    stacklevel=4,
                )
            return range(count)
        with self._bar(count, "sample ids") as bar:
            ids = self.reader.read_sample_ids(bar.update)
        Plan.cut(ids, self.reader.batch_size)  # refuses duplicates before they are kept
        self.folder.write_file("sample_ids.json", json.dumps(ids).encode())
        self.ids_in_items = True
        return ids

    def open(self, options: dict[str, Any], note: dict[str, Any] | None) -> None:
        """Start a new run, or take up the one in the folder."""
        masks = self.source.masks
        self.config = {
            "task": self.task,
            "batch_size": self.plan.batch_size,
            "sparsities": masks.sparsities,
            "is_ladder": masks.is_ladder,
            "features": self.source.feature_module,
            "device": self.device.type,
            **options,
        }
        fingerprints = {
            "model": digest_of(_tensors(self.source.model)),
            "masks": digest_of(masks.levels),
            "statistics": digest_of(_statistics(self.source)),
            "data": f"{len(self.plan)} samples, {self.plan.fingerprint()}",
            "samples": fingerprint_of(self.reader.dataset),
        }
        record = self.folder.record()
        if record is None:
            self._start(fingerprints, note)
        else:
            self._check_same(record, fingerprints)
            self._take_up(record)

    def _take_up(self, record: dict[str, Any]) -> None:
        self.record = record
        self.plan = replace(self.plan, batches_per_part=record["batches_per_part"])
        self.scorer = Scorer(
            self.task,
            self.config["sparsities"],
            self.config["is_ladder"],
            record["labelled"],
            self.config["output"],
            self.config["keep_logits"],
            self.config["keep_features"],
        )

    def _start(self, fingerprints: dict[str, str | None], note: dict[str, Any] | None) -> None:
        """Try the first batches, cut the parts by the time that one takes, and write `run.json`."""
        if self.folder.done_parts():
            raise FastpieError(
                f"Expected a new folder or a run in {self.folder.path}, but it holds scores without "
                "a run.json. Choose another folder, or remove this one."
            )
        kind = self._first_samples()
        record = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "config": self.config,
            "config_hash": config_hash(self.config),
            "fingerprints": fingerprints,
            "labelled": kind.label is not None,
            "label_kind": kind.label,
            "masks_of_these_weights": self._masks_of_these_weights(),
            "image_shape": kind.image,
            "batches_per_part": 1,
            "note": note or {},
        }
        self._take_up(record)
        seconds, size = self._try_batches()
        with explained(self.folder.path):
            self.source.masks.save(self.folder.path / "masks.safetensors")
        self._write_errors([], [])
        record["hardness"] = self.scorer.hardness
        record["batches_per_part"] = max(
            1, min(int(_PART_SECONDS / max(seconds, 1e-3)), _PART_BYTES // max(size, 1))
        )
        self.folder.write_record(record)
        self._take_up(record)

    def _masks_of_these_weights(self) -> bool | None:
        """Whether the masks were chosen from the weights in force; None where they do not say."""
        masks = self.source.masks
        parameters = dict(self.source.model.named_parameters(remove_duplicate=False))
        made_from = masks.info.get("weights")
        now = digest_of({name: parameters[name] for name in masks})
        return None if made_from is None else bool(made_from == now)

    def _first_samples(self) -> Kind:
        """What the first readable samples in sample_id order are like, by majority."""
        samples, problems = [], []
        for position, index in enumerate(self.plan.order):
            sample = self.reader.read_one(index)
            if isinstance(sample, Sample):
                samples.append(sample)
                if len(samples) == _SAMPLES_LOOKED_AT:
                    break
            else:
                problems.append(Problem(position, "read", sample))
        if not samples:
            raise self._refusal(problems)
        # Labels of the other tasks are not scored: they need not be there, nor of one shape.
        scored = self.task in ("multiclass", "multilabel")
        labelled = scored and 2 * sum(s.label is not None for s in samples) >= len(samples)
        return Kind.of_most(samples, labelled=labelled, batch_size=self.plan.batch_size)

    def _try_batches(self) -> tuple[float, int]:
        """Score batches until one sample has a score; seconds of the last batch, bytes that it keeps."""
        problems: list[Problem] = []
        tried = 0
        start = time.perf_counter()
        for batch in self._read(range(self.plan.batches)):
            problems += batch.problems
            if batch.images is not None:
                args = self._arguments(batch.images)
                waited = time.perf_counter() - start
                if self.engine is None:
                    self.engine = self._engine(args, fresh=True)
                start = time.perf_counter()
                _, _, unusable, kept = self.scorer.score(
                    self.engine(*args), batch.labels, batch.positions, batch.slots
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

    def _refusal(self, problems: list[Problem]) -> FastpieError:
        """Why a run cannot begin; what was seen is in the errors table."""
        self._write_errors([], problems)
        return FastpieError(
            f"Expected samples that can be scored, but of the first {len(problems)} of "
            f"{len(self.plan)} none can; the first: {problems[0].error} (all are in "
            f"{self.folder.path / 'errors.parquet'})"
        )

    def _check_same(self, record: dict[str, Any], fingerprints: dict[str, str | None]) -> None:
        missing = _NEEDED_TO_RESUME - record.keys()
        if missing:
            raise FastpieError(
                f"Expected a run.json in {self.folder.path} to go on from, but it has no "
                f"{sorted(missing)}. Choose another folder, or remove this one."
            )
        before = {**record["config"], **record["fingerprints"]}
        now = {**self.config, **fingerprints}
        differing = [
            f"{key}: {_short(before.get(key))} in the folder, {_short(now.get(key))} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise FastpieError(
                f"Expected the configuration of the run in {self.folder.path}, but it differs in "
                + "; ".join(differing)
                + ". Choose another folder, or remove this one."
            )
        changed = {k: v for k, v in versions().items() if record["versions"].get(k) != v}
        if changed:
            warnings.warn(
                f"This run was started with other versions ({changed} now); rows scored from here on "
                "can differ in the last bits.",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ the run

    def score(self, retry_errors: bool) -> None:
        """Score the parts that are not done, and with `retry_errors` those with errors again."""
        stored = self.folder.errors().to_pylist()
        done, errors = self._what_holds(stored)
        if errors != stored:
            self.folder.write_errors(errors)
        again = {self.plan.part_of(self._position(row)) for row in errors if retry_errors}
        todo = sorted((set(range(self.plan.parts)) - done) | again)
        batches = [b for part in todo for b in self.plan.batches_of(part)]
        finished = len(self.plan) - sum(len(self.plan.samples_of(part)) for part in todo)
        collected = _Part()
        with self._bar(len(self.plan), "mining", initial=finished) as bar:
            for (number, _), found in self.lanes.overlapped(
                zip(batches, self._read(batches), strict=True),
                lambda item: self._forward(item[1]),
                lambda item, out: self._scored(item[1], out),
            ):
                collected.add(found)
                part = number // self.plan.batches_per_part
                if number == self.plan.batches_of(part)[-1]:
                    if part in done:
                        self._keep_scored(part, collected)
                    errors = self._write_part(part, collected, errors)
                    collected = _Part()
                bar.update(len(self.plan.positions(number)))

    def _what_holds(self, stored: list[dict[str, Any]]) -> tuple[set[int], list[dict[str, Any]]]:
        """The parts that are done, and the errors of samples in them that have no score."""
        extras = [kind for kind in ("logits", "features") if self.config[f"keep_{kind}"]]
        by_part: dict[int, list[dict[str, Any]]] = {}
        for row in stored:
            by_part.setdefault(self.plan.part_of(self._position(row)), []).append(row)
        done, errors = set(), []
        for part in self.folder.done_parts():
            if not self.folder.readable(part, extras):
                warnings.warn(f"Part {part} cannot be read and is scored again.", stacklevel=4)
                continue
            rows, scored = by_part.get(part, []), self.folder.part_rows(part)
            if rows:
                ids = set(self.folder.part_ids(part))
                rows = [row for row in rows if row["sample_id"] not in ids]
            if scored + len(rows) == len(self.plan.samples_of(part)):
                done.add(part)
                errors += rows
        return done, errors

    def _position(self, row: dict[str, Any]) -> int:
        return bisect.bisect_left(self.plan.sample_ids, row["sample_id"])

    def _read(self, batches: Sequence[int]) -> Iterator[Batch]:
        return self._read_positions([self.plan.positions(b) for b in batches])

    def _read_positions(self, positions: list[list[int]]) -> Iterator[Batch]:
        kind = Kind(self.record["image_shape"], self.record["label_kind"])
        for batch in self.reader.read(
            self.plan,
            positions,
            like=kind,
            check_ids=self.ids_in_items,
            pin_memory=self.device.type == "cuda",
        ):
            changed = [problem.error for problem in batch.problems if problem.stage == "id"]
            if changed:
                raise FastpieError(
                    f"Expected the data set that the run in {self.folder.path} was started with, but "
                    f"the ids of its samples have changed: {changed[0]}. Choose another folder."
                )
            yield batch

    def _arguments(self, images: Any) -> tuple[Any, ...]:
        """Images on the device, as the model's positional arguments."""
        images = self.lanes.to_device(images)
        return as_arguments(tuple(images) if isinstance(images, list) else images)

    def _engine(self, args: tuple[Any, ...], *, fresh: bool) -> DualEngine:
        """A private copy of the model, recalibrated, compiled for batches like `args`."""
        private = copy.deepcopy(self.source).to(self.device).eval().requires_grad_(False)
        try:
            if self.config["recalibrate"] and statistics_of(private.model):
                stored = self.folder.path / "recalibration.safetensors"
                if fresh:
                    private.recalibrate(self._recalibration_batches())
                    self.folder.write_file(stored.name, save(_statistics(private)))
                own = _statistics(private)
                for name, value in self._stored_statistics(stored).items():
                    own[name].copy_(value)
            engine = private.compile(
                args,
                precision=self.config["precision"],
                backend=self.config["backend"],
                plan=None if fresh else self._stored_plan(),
            )
            if fresh:  # kernels are chosen by timing: what goes on later must choose alike
                self.folder.write_file("plan.json", json.dumps(engine.plan).encode())
            return engine
        except (FastpieError, OSError):
            raise
        except Exception as error:
            shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
            raise FastpieError(
                f"Expected the model to take a batch of shape {shapes}, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _stored_plan(self) -> dict[str, Any] | None:
        path = self.folder.path / "plan.json"
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise FastpieError(
                f"Expected the plan of the run in {path}, but: {error}. Choose another folder."
            ) from error

    def _stored_statistics(self, path: Path) -> dict[str, Tensor]:
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise FastpieError(
                f"Expected the statistics of the run in {path}, but: {error}. Choose another folder."
            ) from error

    def _recalibration_batches(self) -> Iterator[tuple[Any, ...]]:
        positions = sorted(self.plan.lowest_hashes(_RECALIBRATION_SAMPLES))
        size = self.plan.batch_size
        found = False
        for batch in self._read_positions(
            [positions[i : i + size] for i in range(0, len(positions), size)]
        ):
            if batch.images is None:
                continue
            found = True
            slots = torch.as_tensor(batch.slots, device=self.device)
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

    def _forward(self, batch: Batch) -> DualOutput | None:
        """Both models on a batch; on a GPU without waiting for them."""
        if batch.images is None:
            return None
        args = self._arguments(batch.images)
        if self.engine is None:
            self.engine = self._engine(args, fresh=False)
        return self.engine(*args)

    def _scored(self, batch: Batch, out: DualOutput | None) -> _Part:
        """What a batch adds to its part."""
        found = _Part()
        if out is not None:
            rows, columns, found.problems, kept = self.scorer.score(
                out, batch.labels, batch.positions, batch.slots
            )
            ids = pa.array([self.plan.sample_ids[batch.positions[r]] for r in rows], pa.string())
            found.tables.append(pa.table({"sample_id": ids, **columns}))
            for kind, (dense, pruned) in kept.items():
                found.extras.setdefault(kind, []).append(
                    pa.table({"sample_id": ids, "dense": _lists(dense), "pruned": _lists(pruned)})
                )
        found.problems += batch.problems
        return found

    def _keep_scored(self, part: int, collected: _Part) -> None:
        """Of a retry, take over only samples that had no score: one that fails now keeps its row."""
        scores = self.folder.read_part(part)
        ids = set(scores.column("sample_id").to_pylist())

        def rows(table: pa.Table, scored: bool) -> pa.Table:
            column = table.column("sample_id").to_pylist()
            return table.filter(pa.array([(i in ids) == scored for i in column], pa.bool_()))

        def merged(old: pa.Table, new: list[pa.Table]) -> list[pa.Table]:
            # Old extras can hold samples that a crash kept out of the scores.
            tables = [rows(old, True), *(rows(table, False) for table in new)]
            return [pa.concat_tables(tables, promote_options="default").sort_by("sample_id")]

        for kind, tables in collected.extras.items():
            if ids:
                collected.extras[kind] = merged(self.folder.read_part(part, kind), tables)
        collected.tables = merged(scores, collected.tables)
        collected.problems = [
            p for p in collected.problems if self.plan.sample_ids[p.position] not in ids
        ]

    def _write_part(
        self, part: int, collected: _Part, errors: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Write one part: all errors, old and new, then the rows, then only the errors that hold."""
        own = {self.plan.sample_ids[i] for i in self.plan.samples_of(part)}
        failed = {self.plan.sample_ids[p.position] for p in collected.problems}
        before = [row for row in errors if row["sample_id"] not in failed]
        holding = [row for row in before if row["sample_id"] not in own]
        if collected.problems:
            self._write_errors(before, collected.problems)
        scores = pa.concat_tables(collected.tables) if collected.tables else NO_ROWS
        extras = {kind: pa.concat_tables(tables) for kind, tables in collected.extras.items()}
        self.folder.write_part(part, scores, extras)
        if len(holding) == len(before):  # nothing old to drop
            return self._error_rows(holding, collected.problems)
        return self._write_errors(holding, collected.problems)

    def _write_errors(
        self, rows: list[dict[str, Any]], problems: Sequence[Problem]
    ) -> list[dict[str, Any]]:
        rows = self._error_rows(rows, problems)
        self.folder.write_errors(rows)
        return rows

    def _error_rows(
        self, rows: list[dict[str, Any]], problems: Sequence[Problem]
    ) -> list[dict[str, Any]]:
        """Rows of the errors table with those of `problems`, in sample_id order."""
        fresh = [
            {
                "sample_id": self.plan.sample_ids[problem.position],
                "path": path_of(self.reader.dataset, self.plan.order[problem.position]),
                "stage": problem.stage,
                "error": problem.error,
            }
            for problem in problems
        ]
        return sorted(rows + fresh, key=lambda row: row["sample_id"])

    def _bar(self, total: int, what: str, initial: int = 0) -> Any:
        return tqdm(
            total=total,
            initial=initial,
            desc=what,
            unit="img",
            disable=self.bar_disabled,
            leave=False,
        )


class _Part:
    """Rows of the open part."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.extras: dict[str, list[pa.Table]] = {}
        self.problems: list[Problem] = []

    def add(self, other: _Part) -> None:
        """Append the rows of the next batch."""
        self.tables += other.tables
        for kind, tables in other.extras.items():
            self.extras.setdefault(kind, []).extend(tables)
        self.problems += other.problems


def versions() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "fastpie": metadata.version("fastpie"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_capability(),
    }


def _statistics(dual: DualModel) -> dict[str, Tensor]:
    """The pruned model's own buffers at every level, by one flat name."""
    return {
        f"{level}/{name}": buffer
        for level in range(len(dual.sparsities))
        for name, buffer in dual.statistics(level).items()
    }


def _usable_device(device: str | torch.device | None, dual: DualModel) -> torch.device:
    if device is None:
        return next(dual.model.parameters()).device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise FastpieError(
            f"Expected a device that torch can use, but got {device!r}: {error}"
        ) from error


def _check_finite(dual: DualModel) -> None:
    # Other buffers may hold infinities by design: the mask of an attention layer, say.
    tensors = {**dict(dual.model.named_parameters()), **statistics_of(dual.model)}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise FastpieError(
                f"Expected finite weights, but `{name}` holds {count} NaN or infinite of "
                f"{tensor.numel()}."
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def _lists(values: np.ndarray) -> pa.FixedSizeListArray:  # [n, ...]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
