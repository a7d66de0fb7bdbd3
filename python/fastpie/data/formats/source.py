"""What a format is asked for and gives, and how tables are read from disk."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fastpie.data.files import Files, FolderFiles
from fastpie.errors import FastpieError

__all__ = ["Request", "Source", "header_of", "need_columns", "read_csv", "read_parquet", "shorten"]


@dataclass(frozen=True)
class Request:
    """The arguments of `fastpie.data.read_manifest`, which explains them."""

    source: Any  # Path, except for shard patterns and data sets in memory
    root: Path | None = None
    labels: str | Sequence[str] | None = None
    task: str | None = None
    class_names: list[str] | None = None
    path_column: str = "path"
    group: str | None = None
    split: str | None = None
    sex: str | None = None
    age: str | None = None
    view: str | None = None
    site: str | None = None
    frame: str | None = None
    uncertain: str | None = None
    unmentioned: str | None = None
    groups: Path | None = None
    allow_outside: bool = False

    def folder(self, default: Path) -> FolderFiles:
        """Files below `root`."""
        return FolderFiles(self.root or default, self.allow_outside)


class Source(NamedTuple):
    """What a format found; the columns are those of `Manifest.table`."""

    table: pa.Table
    files: Files
    task: str | None = None
    class_names: list[str] | None = None


_FIRST_BLOCK = 4 << 20  # bytes; a row must fit
_LAST_BLOCK = 1 << 30


def read_csv(path: Path) -> pa.Table:
    """Read a CSV file (or .tsv, .tab, ...; also gzipped) with every column as text.

    As text: ids keep their leading zeros, and each column is converted by who knows what it means.
    Columns without a name are left out.

    Raises:
        FastpieError: if the file cannot be read, is not UTF-8, or a row has too many or few fields.
    """
    header, delimiter = _header(path)
    named = [name for name in header if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise FastpieError(
            f"Expected distinct names of columns in {path}, but {twice} occur twice."
        )
    block = _FIRST_BLOCK
    while True:
        try:
            table = _parsed(path, header, delimiter, block)
        except pa.ArrowException as error:
            if "straddling" in str(error) and block < _LAST_BLOCK:
                block = min(8 * block, _LAST_BLOCK)
                continue
            raise FastpieError(_csv_problem(path, header, delimiter, block, error)) from error
        except OSError as error:
            raise FastpieError(f"Expected a CSV manifest at {path}, but: {error}") from error
        _refuse_open_quote(table, path)
        return pa.table({name: table.column(i) for i, name in enumerate(header) if name})


def _parsed(
    path: Path, header: list[str], delimiter: str, block: int, threads: bool = True
) -> pa.Table:
    return pa.csv.read_csv(
        str(path),  # by its name, so that .gz is seen
        read_options=pa.csv.ReadOptions(block_size=block, use_threads=threads),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.large_string() for name in header}, strings_can_be_null=False
        ),
    )


def _refuse_open_quote(table: pa.Table, path: Path) -> None:
    """Arrow takes all that follows a quotation mark that is not closed for the last cell."""
    cell = table.column(table.num_columns - 1)[-1].as_py() if table.num_rows else ""
    if "\n" not in cell:
        return
    tail = b""
    with _open(path) as file:
        while block := file.read(1 << 24):
            tail = (tail + block)[-100:]
    if not tail.rstrip(b"\r\n").endswith(b'"'):
        raise FastpieError(
            f"Expected every quotation mark in {path} to be closed, but that of the last row (row "
            f"{table.num_rows}) takes all the rest of the file for one cell, from "
            f"{shorten(cell, 80)!r} on."
        )


def _csv_problem(
    path: Path, header: list[str], delimiter: str, block: int, error: pa.ArrowException
) -> str:
    if "UTF8" in str(error):
        return _utf8_problem(path)
    if "straddling" in str(error):
        return (
            f"Expected rows of less than {_LAST_BLOCK >> 20} MiB in {path}, but one has more. Is a "
            "quotation mark not closed?"
        )
    try:  # one thread tells the row, several do not
        _parsed(path, header, delimiter, block, threads=False)
    except pa.ArrowException as again:
        error = again
    return f"Expected a CSV manifest at {path}, but: {shorten(str(error))}"


def _utf8_problem(path: Path) -> str:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                near = shorten(
                    line[max(error.start - 30, 0) : error.end + 30].decode("latin-1"), 80
                )
                return (
                    f"Expected {path} in UTF-8, but line {number} is in another encoding (near "
                    f"{near!r}). Convert the file, for example with iconv -f latin1 -t utf-8."
                )
    return f"Expected {path} in UTF-8, but it is in another encoding."


def read_parquet(path: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        FastpieError: if it cannot be read.
    """
    try:
        table = pa.parquet.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise FastpieError(f"Expected a Parquet manifest at {path}, but: {error}") from error
    twice = sorted({n for n in table.column_names if table.column_names.count(n) > 1})
    if twice:
        raise FastpieError(
            f"Expected distinct names of columns in {path}, but {twice} occur twice."
        )
    return table


def header_of(path: Path) -> list[str]:
    """The names of the columns of a CSV or Parquet file.

    Raises:
        FastpieError: if it cannot be read.
    """
    if path.suffix == ".parquet":
        try:
            return list(pa.parquet.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(f"Expected a Parquet manifest at {path}, but: {error}") from error
    return _header(path)[0]


def need_columns(table: pa.Table, names: Sequence[str], source: object, what: str) -> None:
    """Refuse a table that lacks a column."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise FastpieError(
            f"Expected the {what} {missing} in {source}, but it has {table.column_names[:40]}."
        )


def shorten(text: str, most: int = 300) -> str:
    """The text for a message; a cell can have 10 MB."""
    return text if len(text) <= most else f"{text[:most]}..."


def _header(path: Path) -> tuple[list[str], str]:
    """Names and delimiter, from the first line."""
    try:
        with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            delimiter = max(",\t;", key=first.count)
            names = next((row for row in csv.reader(text, delimiter=delimiter) if row), None)
    except UnicodeDecodeError:
        raise FastpieError(_utf8_problem(path)) from None
    except (OSError, EOFError, csv.Error) as error:
        raise FastpieError(f"Expected a CSV or Parquet manifest at {path}, but: {error}") from error
    if names is None:
        raise FastpieError(f"Expected a CSV manifest at {path}, but the file is empty.")
    return names, delimiter


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
