"""The scores of a run as they lie on disk: read batch by batch, never all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpie.errors import FastpieError
from fastpie.mining.storage import Storage

__all__ = ["BATCH_ROWS", "Parts"]

BATCH_ROWS = 65536
"""Rows of a batch: larger ones read no faster, in parts of ten thousand or of a million rows."""


class Parts:
    """Some tables in Parquet, one after the other, as they were when this was made.

    Attributes:
        names: of the tables that have rows.
        rows: of each.
        schema: the columns of all of them; a table without one of the columns has nulls there.
    """

    def __init__(self, storage: Storage, names: Sequence[str]) -> None:
        """Read the footers.

        Args:
            storage: where they are.
            names: of the tables, in the order in which their rows are taken.

        Raises:
            FastpieError: for a table that cannot be read.
        """
        self._storage = storage
        with ThreadPoolExecutor(storage.parallel) as pool:
            found = pool.map(self._footer, names)
            footers = [(name, *footer) for name, footer in zip(names, found, strict=True)]
        # A part in which nothing could be scored has no rows and, besides sample_id, no column.
        filled = [footer for footer in footers if footer[1]]
        self.names = [name for name, _, _ in filled]
        self.rows = [rows for _, rows, _ in filled]
        distinct: list[pa.Schema] = []
        for _, _, schema in filled:
            if not distinct or schema != distinct[-1]:
                distinct.append(schema)
        self.schema: pa.Schema = (
            pa.unify_schemas(distinct, promote_options="permissive")
            if distinct
            else pa.schema([("sample_id", pa.string())])
        )

    def __len__(self) -> int:
        return sum(self.rows)

    def scan(
        self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The rows in their order, in batches; one thread, no reading ahead.

        Args:
            columns: to read; None for all.
            batch_rows: rows of a batch at most.

        Raises:
            FastpieError: for an unknown column; while reading, for a table that has changed.
        """
        schema = self._schema_of(columns)
        return (
            batch
            for name, rows in zip(self.names, self.rows, strict=True)
            for batch in self._batches(name, rows, schema, batch_rows)
        )

    def take(
        self,
        column: str,
        rows: np.ndarray,  # int64 [n], increasing
    ) -> Iterator[tuple[int, pa.Array]]:
        """Single values of one column; tables without a wanted row are not opened.

        Yields:
            Where in `rows` a batch's first wanted row is, and the values of its wanted rows.
        """
        schema = self._schema_of([column])
        first = 0
        for name, count in zip(self.names, self.rows, strict=True):
            begin, end = np.searchsorted(rows, (first, first + count))
            if begin < end:
                at = first
                for batch in self._batches(name, count, schema, BATCH_ROWS):
                    stop = begin + np.searchsorted(rows[begin:end], at + batch.num_rows)
                    if begin < stop:
                        yield int(begin), batch.column(0).take(pa.array(rows[begin:stop] - at))
                    begin = stop
                    at += batch.num_rows
            first += count

    def dataset(self) -> Any:
        """A `pyarrow.dataset.Dataset` over the tables."""
        from pyarrow import dataset  # not needed by those who only select

        filesystem, folder = self._storage.filesystem()
        return dataset.FileSystemDataset.from_paths(
            [f"{folder}/{name}" for name in self.names],
            schema=self.schema,
            format=dataset.ParquetFileFormat(),
            filesystem=filesystem,
        )

    def _schema_of(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        for name in columns:
            if name not in self.schema.names:
                raise FastpieError(
                    f"Expected a column of the table {self.schema.names}, but got {name!r}."
                )
        return pa.schema([self.schema.field(name) for name in columns])

    def _footer(self, name: str) -> tuple[int, pa.Schema]:
        with self._open(name) as file:
            return file.metadata.num_rows, file.schema_arrow.remove_metadata()

    def _batches(
        self, name: str, rows: int, schema: pa.Schema, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        with self._open(name) as file:
            if file.metadata.num_rows != rows:
                raise FastpieError(
                    f"Expected {self._storage.location}/{name} to have {rows} rows as when the run was "
                    f"opened, but it has {file.metadata.num_rows} now. Open the run again."
                )
            here = set(file.schema_arrow.names)
            columns = [column for column in schema.names if column in here]
            for batch in file.iter_batches(
                batch_rows, columns=columns or ["sample_id"], use_threads=False
            ):
                yield _as_schema(batch, schema)

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        try:
            with self._storage.parquet(name) as file:
                yield file
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(
                f"Expected a Parquet table at {self._storage.location}/{name}, but: {error}. If it is "
                "damaged, remove it: the next call of mine() with this run folder scores the part "
                "again."
            ) from error


def _as_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        if place < 0:
            arrays.append(pa.nulls(batch.num_rows, field.type))
        else:
            arrays.append(batch.column(place).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
