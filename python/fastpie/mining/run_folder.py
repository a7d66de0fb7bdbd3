"""The run folder: what a run has written, whole or not at all.

Layout (docs of the design): `run.json`, `scores/part-<n>.parquet`, `errors.parquet`, and where asked
for `logits/`, `features/`. A part counts as done when its scores file is there; that file is written
last, after the errors, logits and features of the same samples. Rows in `errors.parquet` of parts
that are not done are therefore leftovers of a crash and are dropped on the next start.
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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpie._files import atomic_path, write_atomically
from fastpie.errors import FastpieError

__all__ = ["ERRORS_SCHEMA", "RunFolder"]

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
    f".{name}" for name in ("part-", "errors.", "run.json.", "masks.", "recalibration.", "report.")
)
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
        try:
            (self.path / "scores").mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise FastpieError(
                f"Expected a folder to write at {self.path}, but: {error}."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise FastpieError(
                f"Expected {self.path} for this run alone, but another run is writing to it."
            ) from error
        for folder in (self.path, *(self.path / f for f in ("scores", "logits", "features"))):
            for leftover in folder.glob(".*.????????"):
                if leftover.name.startswith(_TEMPORARY):
                    leftover.unlink()

    def unlock(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            self._lock.close()

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
            text = self.record_path.read_text()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise FastpieError(
                f"Expected a run of format {FORMAT!r} in {self.path}, but run.json holds: {error}."
            ) from error
        return dict(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace `run.json`."""
        with _explained(self.path):
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

    def write_part(
        self,
        part: int,
        scores: pa.Table,
        extras: Mapping[str, pa.Table],
    ) -> None:
        """Write a part's extras (logits, features) and then, as the sign that it is done, its scores."""
        with _explained(self.path):
            for folder, table in extras.items():
                (self.path / folder).mkdir(exist_ok=True)
                with atomic_path(self.part_path(part, folder)) as temporary:
                    pq.write_table(table, temporary)
            with atomic_path(self.part_path(part)) as temporary:
                pq.write_table(scores, temporary)

    def read_parts(self, folder: str = "scores") -> pa.Table:
        """All rows of the parts that are done, in order of the parts."""
        tables = [pq.read_table(self.part_path(n, folder)) for n in self.done_parts()]
        if not tables:
            return pa.table({"sample_id": pa.array([], pa.string())})
        # A part in which nothing could be read has no rows and no other column.
        return pa.concat_tables(tables, promote_options="default")

    def part_ids(self, part: int) -> list[str]:
        """Sample ids of one part."""
        column = pq.read_table(self.part_path(part), columns=["sample_id"]).column("sample_id")
        return list(column.to_pylist())

    def readable(self, part: int) -> bool:
        """Whether a part's scores can be read (a disk can tear what the rename had made whole)."""
        try:
            pq.read_metadata(self.part_path(part))
        except (OSError, pa.ArrowException):
            return False
        return True

    # ------------------------------------------------------------------ errors

    def errors(self) -> pa.Table:
        """The errors table: sample_id, path, stage, error."""
        path = self.path / "errors.parquet"
        return pq.read_table(path) if path.exists() else ERRORS_SCHEMA.empty_table()

    def write_errors(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the errors table."""
        with _explained(self.path), atomic_path(self.path / "errors.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=ERRORS_SCHEMA), temporary)


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of what decides the results of a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
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
