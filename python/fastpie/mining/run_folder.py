"""The run folder: what a run has written, whole or not at all.

Layout: `run.json`, `scores/part-<n>.parquet`, `errors.parquet`, `masks.safetensors`,
`recalibration.safetensors` (networks with BatchNorm), `plan.json` (the kernels of the engine),
`sample_ids.json` (data sets that tell ids only
through their items), `report.html`, `.lock`, and where asked for `logits/`, `features/`. A part is written in the order errors, logits and features, scores, and is
done when its scores are there and every sample of it is in the scores or in the errors. What a crash
leaves behind can then be told from what holds: an error of a part that is not done, or of a sample
that has a score, is dropped on the next start.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpie._files import atomic_path, write_atomically
from fastpie.errors import FastpieError

__all__ = ["ERRORS_SCHEMA", "NO_ROWS", "RunFolder", "config_hash", "explained"]

FORMAT = "fastpie-run-1"
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
        "sample_ids.",
    )
)
NO_ROWS = pa.table({"sample_id": pa.array([], pa.string())})
"""Scores of a part in which nothing could be scored."""

_held: dict[str, IO[str]] = {}  # folders that this process is writing to, with their lock files
_PART = re.compile(r"part-(\d+)\.parquet")


class RunFolder:
    """Reads and writes one run folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        """A handle; nothing is read or written yet."""
        self.path = path
        self._lock: Any = None

    # ------------------------------------------------------------------ one writer

    def lock(self) -> None:
        """Create the folder and keep other runs out until `unlock` or the end of the process.

        Raises:
            FastpieError: if another run holds it, or it cannot be written.
        """
        with explained(self.path):
            (self.path / "scores").mkdir(parents=True, exist_ok=True)
        # A lock of the process, not of the open file (flock): reading processes that outlive a
        # killed run would hold on to the latter. It does not keep out other threads, hence `_held`,
        # and closing any handle of the file drops it, hence no second one is opened.
        key = str(self.path.resolve())
        try:
            if key in _held:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by this process")
            with explained(self.path):
                file = (self.path / ".lock").open("w")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = error.errno in (errno.EACCES, errno.EAGAIN)
            raise FastpieError(
                f"Expected {self.path} for this run alone, but "
                + ("another run is writing to it." if taken else f"it cannot be locked: {error}.")
            ) from error
        self._lock = file
        _held[key] = file
        for folder in (self.path, *(self.path / f for f in ("scores", "logits", "features"))):
            for leftover in folder.glob(".*.????????"):
                if leftover.name.startswith(_TEMPORARY):
                    leftover.unlink()

    def unlock(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            del _held[str(self.path.resolve())]
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------------------ run.json

    @property
    def record_path(self) -> Path:
        """Where `run.json` is."""
        return self.path / "run.json"

    def record(self) -> dict[str, Any] | None:
        """The content of `run.json`, or None where there is none yet.

        Raises:
            FastpieError: if it is not a record of this format.
        """
        try:
            record = json.loads(self.record_path.read_bytes())
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastpieError(
                f"Expected a run of format {FORMAT!r} in {self.path}, but run.json holds: {error}."
            ) from error
        return dict(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace `run.json`."""
        with explained(self.path):
            data = json.dumps({"format": FORMAT, **record}, indent=2) + "\n"
            write_atomically(self.record_path, data.encode())

    # ------------------------------------------------------------------ parts

    def part_path(self, part: int, folder: str = "scores") -> Path:
        """Where a part is."""
        return self.path / folder / f"part-{part:06d}.parquet"

    def done_parts(self) -> list[int]:
        """Numbers of the parts that are there, increasing."""
        matches = (_PART.fullmatch(p.name) for p in (self.path / "scores").glob("part-*.parquet"))
        return sorted(int(m[1]) for m in matches if m)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of the folder whole."""
        with explained(self.path):
            write_atomically(self.path / name, data)

    def write_part(self, part: int, scores: pa.Table, extras: Mapping[str, pa.Table]) -> None:
        """Write a part's extras (logits, features) and then, as the sign that it is done, its scores."""
        with explained(self.path):
            for folder, table in extras.items():
                (self.path / folder).mkdir(exist_ok=True)
                with atomic_path(self.part_path(part, folder)) as temporary:
                    pq.write_table(table, temporary)
            with atomic_path(self.part_path(part)) as temporary:
                pq.write_table(scores, temporary)

    def read_part(self, part: int, folder: str = "scores") -> pa.Table:
        """The rows of one part."""
        return pq.read_table(self.part_path(part, folder))

    def read_parts(self) -> pa.Table:
        """The scores of the parts that are done, in their order."""
        tables = [self.read_part(part) for part in self.done_parts()]
        if not tables:
            return NO_ROWS
        # A part in which nothing could be scored has no rows and no other column.
        return pa.concat_tables(tables, promote_options="default")

    def read_extras(self, folder: str) -> pa.Table:
        """Logits or features of the parts that are done: the rows of `read_parts`, in its order.

        They are written before the scores, so after a crash they can hold samples that the scores
        do not have yet.
        """
        tables = []
        for part in self.done_parts():
            ids = self.part_ids(part)
            if ids:
                table = self.read_part(part, folder)
                row = {i: r for r, i in enumerate(table.column("sample_id").to_pylist())}
                tables.append(table.take([row[i] for i in ids]))
        return pa.concat_tables(tables) if tables else None

    def part_rows(self, part: int) -> int:
        """How many samples of a part have a score."""
        return int(pq.read_metadata(self.part_path(part)).num_rows)

    def part_ids(self, part: int) -> list[str]:
        """Sample ids of one part."""
        column = pq.read_table(self.part_path(part), columns=["sample_id"]).column("sample_id")
        return list(column.to_pylist())

    def readable(self, part: int, extras: Iterable[str]) -> bool:
        """Whether a part can be read (a disk can tear what the rename had made whole)."""
        try:
            rows = pq.read_metadata(self.part_path(part)).num_rows
            for folder in extras if rows else ():
                pq.read_metadata(self.part_path(part, folder))
        except (OSError, pa.ArrowException):
            return False
        return True

    # ------------------------------------------------------------------ errors

    def errors(self) -> pa.Table:
        """The errors table: sample_id, path, stage, error."""
        path = self.path / "errors.parquet"
        if not path.exists():
            return ERRORS_SCHEMA.empty_table()
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(
                f"Expected a Parquet table at {path}, but: {error}. Remove it, and the next call of "
                "mine() reads the samples without a score again."
            ) from error

    def write_errors(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the errors table."""
        with explained(self.path), atomic_path(self.path / "errors.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=ERRORS_SCHEMA), temporary)


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of what decides the results of a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failed write into a FastpieError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FastpieError(
            f"Expected to write to {path}, but {'the disk is full' if full else error}. The parts "
            f"written before are whole; {'free space' if full else 'mend that'} and run the same "
            "command again to go on from there."
        ) from error
