"""One dual model of a run: its engine, and the parts that it has scored."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastpie._digest import digest_of
from fastpie.dual import DualEngine, DualModel
from fastpie.dual.calibration import statistics_of
from fastpie.dual.committee import Committee
from fastpie.dual.features import feature_widths
from fastpie.dual.output import DualOutput
from fastpie.dual.reference import device_of
from fastpie.errors import FastpieError
from fastpie.mining.part import PartRows, kept_table
from fastpie.mining.plan import Plan
from fastpie.mining.reading import Batch, Problem
from fastpie.mining.restore import model_digest
from fastpie.mining.run_folder import NO_ROWS, RunFolder, explained
from fastpie.mining.scoring import Scorer

__all__ = ["Member", "Outputs", "Remaining", "error_rows"]


_COMMITTEE = "committee-"  # begins the names of its files


class Outputs(NamedTuple):
    """What the models of a member give for a batch.

    Attributes:
        dual: of the dense and the pruned model.
        copies: of the committee, the model's structure of tensors [K, N, ...]; None without one.
    """

    dual: DualOutput
    copies: Any


class Remaining(NamedTuple):
    """What is to be done of a part.

    Attributes:
        batches: that hold a sample without a score or an error, increasing.
        rows: whether the part has rows, which stay.
    """

    batches: list[int]
    rows: bool


class Member:
    """A dual model with a run folder of its own.

    Attributes:
        folder: where its rows go.
        dual: the model as the caller gave it.
        plan: the cut of the work.
        scorer: names the columns.
        engine: None until `compile`.
    """

    def __init__(
        self,
        folder: RunFolder,
        dual: DualModel,
        plan: Plan,
        config: Mapping[str, Any],
        *,
        labelled: bool,
        paths: Callable[[int], str | None],
    ) -> None:
        """Prepare to score; nothing is written.

        Args:
            folder: of this model.
            dual: the model.
            plan: the cut of the work.
            config: of the run.
            labelled: whether the samples have labels.
            paths: the file of a position, for the errors table.
        """
        self.folder = folder
        self.dual = dual
        self.plan = plan
        self.config = config
        self.paths = paths
        self.engine: DualEngine | None = None
        self._committee: DualEngine | None = None
        self.scorer = Scorer(
            config["task"],
            dual.sparsities,
            dual.is_ladder,
            labelled,
            config["output"],
            config["keep_logits"],
            config["keep_features"],
        )
        self._extras = [kind for kind in ("logits", "features") if config[f"keep_{kind}"]]

    # ------------------------------------------------------------------ the engine

    def fingerprints(self) -> dict[str, str]:
        """What tells this model from another."""
        return {
            "model": model_digest(self.dual.model),
            "masks": digest_of(self.dual.masks.levels),
            "statistics": digest_of(self.dual.own_statistics()),
        }

    def compile(
        self,
        args: tuple[Any, ...],
        device: torch.device,
        recalibration: Callable[[], Iterator[Any]] | None,
    ) -> None:
        """Make the engine for batches like `args` from a private copy of the model.

        Args:
            args: a batch, as the model's positional arguments.
            device: to run on.
            recalibration: batches to recalibrate BatchNorm from: the run begins, and statistics and
                kernels are chosen and kept in the folder. None: those of the folder are used.
        """
        fresh = recalibration is not None
        private = copy.deepcopy(self.dual).to(device).eval().requires_grad_(False)
        try:
            models = {"": private}
            if self.config.get("committee"):
                models[_COMMITTEE] = Committee(private.model, self.config["committee"])
            if self.config["recalibrate"] and statistics_of(private.model):
                if recalibration is not None:
                    pooled = [model.calibration() for model in models.values()]
                    for batch in recalibration():
                        for one in pooled:
                            one.add(batch)
                        if all(one.idle for one in pooled):
                            break
                    for (prefix, model), one in zip(models.items(), pooled, strict=True):
                        one.finish()
                        self.folder.write_file(
                            f"{prefix}recalibration.safetensors", save(model.own_statistics())
                        )
                for prefix, model in models.items():
                    own = model.own_statistics()
                    for name, value in self._stored_statistics(prefix).items():
                        own[name].copy_(value)
            engines = {
                prefix: self._compiled(model, args, f"{prefix}plan.json", fresh)
                for prefix, model in models.items()
            }
            self.engine, self._committee = engines[""], engines.get(_COMMITTEE)
        except (FastpieError, OSError):
            raise
        except Exception as error:
            shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
            raise FastpieError(
                f"Expected the model to take a batch of shape {shapes}, but it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def forward(self, args: tuple[Any, ...]) -> Outputs:
        """A batch through all models; on a GPU without waiting for them."""
        assert self.engine is not None
        copies = None if self._committee is None else Committee.outputs(self._committee(*args))
        return Outputs(self.engine(*args), copies)

    def _compiled(
        self, dual: DualModel, args: tuple[Any, ...], file: str, fresh: bool
    ) -> DualEngine:
        """An engine; kernels are chosen by timing, and what goes on later must choose alike."""
        engine = dual.compile(
            args,
            precision=self.config["precision"],
            backend=self.config["backend"],
            plan=None if fresh else self._stored_plan(file),
        )
        if fresh:
            self.folder.write_file(file, json.dumps(engine.plan).encode())
        return engine

    def _stored_plan(self, file: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self.folder.storage.read(file)))
        except (OSError, ValueError) as error:
            raise FastpieError(
                f"Expected the plan of the run in {self.folder.location}/{file}, but: {error}. "
                "Choose another folder."
            ) from error

    def _stored_statistics(self, prefix: str) -> dict[str, Tensor]:
        name = f"{prefix}recalibration.safetensors"
        try:
            return dict(load(self.folder.storage.read(name)))
        except (OSError, SafetensorError) as error:
            raise FastpieError(
                f"Expected the statistics of the run in {self.folder.location}/{name}, but: {error}. "
                "Choose another folder."
            ) from error

    def about_features(self, args: tuple[Any, ...]) -> dict[str, list[int]]:
        """For run.json: of kept features how many columns each of their parts has."""
        name = self.dual.feature_module
        if not self.config["keep_features"] or name is None:
            return {}
        private = copy.deepcopy(self.dual.model).to(device_of(args))
        return {"feature_widths": feature_widths(private, name, args)}

    def save_masks(self) -> None:
        """Keep the masks in the folder."""
        with (
            explained(self.folder.location),
            self.folder.storage.file("masks.safetensors") as path,
        ):
            self.dual.masks.save(path)

    # ------------------------------------------------------------------ what remains

    def remaining(self, parts: Sequence[int], *, retry_errors: bool) -> dict[int, Remaining]:
        """What holds a sample that is neither scored nor an error, by part.

        Args:
            parts: to look at.
            retry_errors: take an error for nothing.

        Returns:
            Only parts of which something remains.
        """
        there = self.folder.done_among(parts)
        failed = self.folder.done_among(parts, "errors")
        found = self.folder.each(
            lambda p: self._remaining(p, p in there, p in failed, retry_errors), parts
        )
        states = dict(zip(parts, found, strict=True))
        for part, state in states.items():
            if part in there and not state.rows:
                warnings.warn(f"Part {part} cannot be read and is scored again.", stacklevel=5)
        return {part: state for part, state in states.items() if state.batches}

    def _remaining(self, part: int, there: bool, with_errors: bool, retry: bool) -> Remaining:
        batches = list(self.plan.batches_of(part))
        if not there:
            return Remaining(batches, False)
        try:
            scored = self.folder.part_rows(part)
            for kind in self._extras if scored else ():
                # A disk can tear what the rename had made whole.
                if self.folder.part_rows(part, kind) < scored:
                    return Remaining(batches, False)
        except (OSError, pa.ArrowException):
            return Remaining(batches, False)
        try:
            failed = self.folder.part_rows(part, "errors") if with_errors else 0
            whole = scored + failed == len(self.plan.samples_of(part))
            if whole and not (retry and failed):
                return Remaining([], True)
            errors = {row["sample_id"] for row in self.folder.errors_of(part)}
        except (OSError, pa.ArrowException):
            errors = set()
        accounted = set(self.folder.part_ids(part))
        if errors & accounted:
            rows = [r for r in self.folder.errors_of(part) if r["sample_id"] not in accounted]
            self.folder.write_errors(part, rows)
        if not retry:
            accounted |= errors
        ids = self.plan.sample_ids
        positions = [p for p in self.plan.samples_of(part) if ids[p] not in accounted]
        return Remaining(sorted({p // self.plan.batch_size for p in positions}), True)

    # ------------------------------------------------------------------ rows

    def score(self, batch: Batch, out: Outputs | None) -> PartRows:
        """What a batch adds to its part."""
        found = PartRows()
        if out is not None:
            rows, columns, found.problems, kept = self.scorer.score(
                out.dual, batch.labels, batch.positions, batch.slots, out.copies
            )
            ids = pa.array([self.plan.sample_ids[batch.positions[r]] for r in rows], pa.string())
            found.tables.append(pa.table({"sample_id": ids, **columns}))
            for kind, (dense, pruned) in kept.items():
                found.extras[kind] = [kept_table(ids, dense, pruned)]
        found.problems += batch.problems
        return found

    def write(self, part: int, rows: PartRows, *, add: bool) -> None:
        """Write a part: all errors, old and new, then the rows, then only the errors that hold.

        Args:
            part: its number.
            rows: of batches of it.
            add: to the rows that are there, which stay as they are; else in their place.
        """
        old: list[dict[str, Any]] = []
        scored: set[str] = set()
        whole = not add
        if add:
            try:
                old = self.folder.errors_of(part)
            except (OSError, pa.ArrowException):
                whole = True  # its samples were read again
            before = self.folder.read_part(part)
            extras = {}
            if len(before):
                extras = {kind: self.folder.read_part(part, kind) for kind in self._extras}
            scored = rows.merge(before, extras)
        new = self._error_rows([p for p in rows.problems if self._id(p.position) not in scored])
        scores = pa.concat_tables(rows.tables) if rows.tables else NO_ROWS
        scored = set(scores["sample_id"].to_pylist())
        failed = {row["sample_id"] for row in new}
        before_rows = [row for row in old if row["sample_id"] not in failed]
        holding = [row for row in before_rows if row["sample_id"] not in scored]
        if new or whole:
            self.folder.write_errors(part, _in_order(before_rows + new))
        if not add:  # what is there is torn; a crash must not leave it beside new logits
            self.folder.remove_scores(part)
        self.folder.write_part(
            part, scores, {kind: pa.concat_tables(t) for kind, t in rows.extras.items()}
        )
        if len(holding) < len(before_rows):
            self.folder.write_errors(part, _in_order(holding + new))

    def _id(self, position: int) -> str:
        return self.plan.sample_ids[position]

    def _error_rows(self, problems: list[Problem]) -> list[dict[str, Any]]:
        return error_rows(self.plan, self.paths, problems)


def error_rows(
    plan: Plan, paths: Callable[[int], str | None], problems: list[Problem]
) -> list[dict[str, Any]]:
    """Rows of the errors table."""
    return [
        {
            "sample_id": plan.sample_ids[problem.position],
            "path": paths(problem.position),
            "stage": problem.stage,
            "error": problem.error,
        }
        for problem in problems
    ]


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["sample_id"])
