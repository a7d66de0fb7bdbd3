"""The run folder: what a run has written, whole or not at all.

Layout: `run.json`, `scores/part-<n>.parquet`, `errors/part-<n>.parquet` and at the end of a call
`errors.parquet` (all of them), `samples.arrow` (sample ids and where the data set has them),
`masks.safetensors`, `recalibration.safetensors` (networks with BatchNorm), `plan.json` (the kernels of
the engine; of a committee there are both, too, with names that begin with `committee-`),
`manifest.parquet` (data sets that have one), `report.html`, `.lock`, where asked for `logits/`,
`features/`, `log/`, and of several models `models/<k>/`, each a run folder.

A part is written in the order errors, logits and features, scores, and is done when its scores are
there and every sample of it is in the scores or in the errors. What a crash leaves behind can then be
told from what holds: an error of a part without scores, or of a sample that has a score, is dropped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastpie.data.texts import Texts
from fastpie.errors import FastpieError
from fastpie.mining.parts import Parts
from fastpie.mining.storage import LocalStorage, storage_at

__all__ = ["ERRORS_SCHEMA", "NO_ROWS", "RunFolder", "SampleIndex", "config_hash", "explained"]

FORMAT = "fastpie-run-2"
_T = TypeVar("_T")
ERRORS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("path", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)
# Prefixes of the temporary files of fastpie._files.atomic_path, left behind by a kill.
_TEMPORARY = tuple(
    f".{name}"
    for name in (
        "part-",
        "errors.",
        "run.json.",
        "masks.",
        "recalibration.",
        "plan.",
        "report.",
        "samples.",
        "manifest.",
    )
)
NO_ROWS = pa.table({"sample_id": pa.array([], pa.string())})
"""Scores of a part in which nothing could be scored."""

_MEMBER = re.compile(r"(.+)/models/\d+")
_PART = re.compile(r"part-(\d+)\.parquet")


class SampleIndex(NamedTuple):
    """Which sample is where in the data set.

    Attributes:
        sample_ids: all of them, increasing.
        order: index of each in the data set, int64.
        source: of the ids: "data set" (its attribute, or an argument), "items" or "index".
        digest: of the ids in the data set's order.
    """

    sample_ids: Texts
    order: np.ndarray
    source: str
    digest: str


class RunFolder:
    """Reads and writes one run folder.

    Attributes:
        storage: where it is.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        """A handle; nothing is read or written yet.

        Args:
            location: a path, or a URL that fsspec knows.
        """
        self.storage = storage_at(location)

    @property
    def location(self) -> str:
        """The path or URL."""
        return self.storage.location

    @property
    def path(self) -> Path | None:
        """The folder; None for a URL."""
        return self.storage.path if isinstance(self.storage, LocalStorage) else None

    def member(self, number: int) -> RunFolder:
        """The folder of one of several models; see `_MEMBER`."""
        return RunFolder(f"{self.location.rstrip('/')}/models/{number:03d}")

    def create(self) -> None:
        """Make the folder, where there is such a thing."""
        if self.path is not None:
            with explained(self.location):
                (self.path / "scores").mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Delete the temporary files of processes that were killed; no other may be writing."""
        if self.path is not None:
            folders = (".", "scores", "errors", "logits", "features")
            with explained(self.location):
                for folder in (self.path / f for f in folders):
                    for leftover in folder.glob(".*.????????"):
                        if leftover.name.startswith(_TEMPORARY):
                            # A rank that outlives the first one may remove its own.
                            leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------------ single files

    def record(self) -> dict[str, Any] | None:
        """The content of `run.json`, or None where there is none yet.

        Raises:
            FastpieError: if it is not a record of this format.
        """
        try:
            record = json.loads(self.storage.read("run.json"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreachable(self.location, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastpieError(
                f"Expected a run of format {FORMAT!r} in {self.location}, but run.json holds: {error}. "
                "Choose another folder, or remove this one."
            ) from error
        return dict(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace `run.json`."""
        data = json.dumps({"format": FORMAT, **record}, indent=2) + "\n"
        self.write_file("run.json", data.encode())

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of the folder whole."""
        with explained(self.location), self.storage.file(name) as path:
            path.write_bytes(data)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file of the folder whole."""
        with explained(self.location), self.storage.file(name) as path:
            pq.write_table(table, path)

    # ------------------------------------------------------------------ which sample is where

    def write_samples(self, samples: SampleIndex) -> None:
        """Keep where each sample is."""
        table = pa.table({"sample_id": samples.sample_ids.array, "index": pa.array(samples.order)})
        table = table.replace_schema_metadata({"source": samples.source, "digest": samples.digest})
        with (
            explained(self.location),
            self.storage.file("samples.arrow") as path,
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)

    def samples(self) -> SampleIndex | None:
        """What `write_samples` wrote, memory-mapped where the folder is local; None without it.

        The models of a run of several have it in the folder of the run.

        Raises:
            FastpieError: if the file is no such table.
        """
        try:
            if self.path is not None:
                source = pa.memory_map(str(self.path / "samples.arrow"))
            else:
                source = pa.BufferReader(self.storage.read("samples.arrow"))
            table = pa.ipc.open_file(source).read_all()
            origin = table.schema.metadata
            return SampleIndex(
                Texts(table["sample_id"]),
                table["index"].to_numpy(),
                origin[b"source"].decode(),
                origin[b"digest"].decode(),
            )
        except FileNotFoundError:
            whole = _MEMBER.fullmatch(self.location)
            return RunFolder(whole[1]).samples() if whole else None
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise FastpieError(
                f"Expected the ids of the samples in {self.location}/samples.arrow, but: {error}. "
                "Remove that file: the next call of mine() makes it again from the data set."
            ) from error

    def manifest(self) -> pa.Table | None:
        """The table of the data set, see `fastpie.data.Manifest`; None for one without."""
        try:
            with self.storage.parquet("manifest.parquet") as file:
                return file.read()
        except FileNotFoundError:
            whole = _MEMBER.fullmatch(self.location)
            return RunFolder(whole[1]).manifest() if whole else None

    # ------------------------------------------------------------------ parts

    def part_name(self, part: int, folder: str = "scores") -> str:
        """The file of a part."""
        return f"{folder}/part-{part:06d}.parquet"

    def done_parts(self, folder: str = "scores") -> list[int]:
        """Numbers of the parts that are there, increasing."""
        try:
            names = self.storage.names(folder)
        except OSError as error:
            raise unreachable(f"{self.location}/{folder}", error) from error
        matches = map(_PART.fullmatch, names)
        return sorted(int(m[1]) for m in matches if m)

    def done_among(self, parts: Sequence[int], folder: str = "scores") -> set[int]:
        """Those of some parts that are there; a long folder is not listed for a few."""
        if len(parts) > self.storage.parallel:
            return set(self.done_parts(folder)).intersection(parts)
        try:
            return {p for p in parts if self.storage.exists(self.part_name(p, folder))}
        except OSError as error:
            raise unreachable(f"{self.location}/{folder}", error) from error

    def each(self, read: Callable[[int], _T], parts: Sequence[int]) -> list[_T]:
        """read(part) of some parts, in their order, several side by side."""
        with ThreadPoolExecutor(self.storage.parallel) as pool:
            return list(pool.map(read, parts))

    def write_part(self, part: int, scores: pa.Table, extras: Mapping[str, pa.Table]) -> None:
        """Write a part's extras (logits, features) and then, as the sign that it is done, its scores.

        Scores that are there must be of samples in the new extras too; else see `remove_scores`.
        """
        for folder, table in extras.items():
            self.write_table(self.part_name(part, folder), table)
        self.write_table(self.part_name(part), scores)

    def remove_scores(self, part: int) -> None:
        """Take back the sign that a part is done, if it is there."""
        name = self.part_name(part)
        if self.storage.exists(name):
            with explained(self.location):
                self.storage.remove(name)

    def read_part(
        self, part: int, folder: str = "scores", columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows of one part."""
        with self.storage.parquet(self.part_name(part, folder)) as file:
            return file.read(columns=columns)

    def read_parts(self) -> pa.Table:
        """The scores of the parts that are done, in their order."""
        tables = self.each(self.read_part, self.done_parts())
        if not tables:
            return NO_ROWS
        # A part in which nothing could be scored has no rows and no other column.
        return pa.concat_tables(tables, promote_options="default").replace_schema_metadata()

    def read_extras(self, folder: str) -> pa.Table:
        """Logits or features of the parts that are done: the rows of `read_parts`, in its order.

        They are written before the scores, so after a crash they can hold samples that the scores
        do not have yet.
        """

        def read(part: int) -> pa.Table | None:
            ids = self.read_part(part, columns=["sample_id"])["sample_id"]
            if not len(ids):
                return None
            table = self.read_part(part, folder)
            return table.take(pc.index_in(ids, table["sample_id"]))

        tables = [table for table in self.each(read, self.done_parts()) if table is not None]
        return pa.concat_tables(tables) if tables else None

    def part_rows(self, part: int, folder: str = "scores") -> int:
        """How many samples of a part have a score; 0 where there is no such file.

        Raises:
            OSError, pa.ArrowException: if it cannot be read.
        """
        try:
            with self.storage.parquet(self.part_name(part, folder)) as file:
                return int(file.metadata.num_rows)
        except FileNotFoundError:
            return 0

    def part_ids(self, part: int) -> list[str]:
        """Sample ids of one part."""
        return list(self.read_part(part, columns=["sample_id"])["sample_id"].to_pylist())

    def parts(self) -> Parts:
        """The scores of the parts that are done, to be read batch by batch."""
        return Parts(self.storage, [self.part_name(part) for part in self.done_parts()])

    # ------------------------------------------------------------------ errors

    def errors(self) -> pa.Table:
        """What could not be read or scored, of the parts that are there: see ERRORS_SCHEMA."""

        def read(part: int) -> pa.Table:
            try:
                rows = self.read_part(part, "errors")
            except FileNotFoundError:  # another shard has mended it since
                return ERRORS_SCHEMA.empty_table()
            except (OSError, pa.ArrowException) as error:
                raise FastpieError(
                    f"Expected a table in {self.location}/{self.part_name(part, 'errors')}, but: "
                    f"{error}. Remove it, and the next call of mine() reads its samples again."
                ) from error
            scored = self.read_part(part, columns=["sample_id"])["sample_id"]
            return rows.filter(pc.invert(pc.is_in(rows["sample_id"], scored)))

        there = set(self.done_parts())
        parts = [part for part in self.done_parts("errors") if part in there]
        return pa.concat_tables([ERRORS_SCHEMA.empty_table(), *self.each(read, parts)])

    def errors_of(self, part: int) -> list[dict[str, Any]]:
        """The errors of one part, in sample_id order; none where there is no file.

        Raises:
            OSError, pa.ArrowException: if it cannot be read.
        """
        try:
            return list(self.read_part(part, "errors").to_pylist())
        except FileNotFoundError:
            return []

    def write_errors(self, part: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the errors of one part; without any there is no file."""
        table = pa.Table.from_pylist(list(rows), schema=ERRORS_SCHEMA)
        name = self.part_name(part, "errors")
        if len(table):
            self.write_table(name, table)
            return
        with explained(self.location):
            if self.storage.exists(name):
                self.storage.remove(name)

    def export_errors(self, errors: pa.Table | None = None) -> None:
        """Write `errors.parquet`, for people: the errors given, or those of all parts."""
        errors = self.errors() if errors is None else errors
        try:
            with self.storage.parquet("errors.parquet") as file:
                same = file.read().equals(errors)
        except (OSError, pa.ArrowException):
            same = False  # not there, or torn
        if not same:
            self.write_table("errors.parquet", errors)


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of what decides the results of a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def unreachable(location: str, error: OSError) -> FastpieError:
    """A failed look at a run as a FastpieError that says what to do."""
    return FastpieError(
        f"Expected to read {location}, but {type(error).__name__}: {error}. Check the address and the "
        "rights to it, and run the same command again."
    )


@contextmanager
def explained(location: str) -> Iterator[None]:
    """Turns a failed write into a FastpieError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FastpieError(
            f"Expected to write to {location}, but {'the disk is full' if full else error}. The parts "
            f"written before are whole; {'free space' if full else 'mend that'} and run the same "
            "command again to go on from there."
        ) from error
