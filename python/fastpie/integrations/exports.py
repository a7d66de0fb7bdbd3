"""`export`: the hardest samples of a run as CSV, Parquet or a COCO-style list of images."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastpie._files import atomic_path
from fastpie.analysis.analysis import Analysis
from fastpie.errors import FastpieError
from fastpie.integrations.samples import paths_of
from fastpie.mining.result import MiningResult

__all__ = ["export"]

_ROWS = 4096  # that are Python objects at a time
_FORMATS = (".csv", ".parquet", ".json")
# A spreadsheet takes a cell that begins so for a formula, which can start programs and send data away
# (OWASP, "CSV Injection"). An apostrophe makes it a text there.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def export(
    result: MiningResult | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    fraction: float = 1.0,
    by: str = "hardness",
    per: str | None = None,
    columns: Sequence[str] | None = None,
    dataset: Any = None,
    analysis: Analysis | None = None,
) -> int:
    """Write the hardest samples, hardest first. The file is there whole or not at all.

    The table is read as a stream; memory is that of the samples chosen.

    - `.csv` (RFC 4180, UTF-8): null and NaN are empty cells, a list is a JSON array. A text that a
      spreadsheet would run as a formula begins with an apostrophe.
    - `.parquet`: the columns as they are, and `file_name`.
    - `.json`: `{"info": ..., "images": [{"id", "file_name", "sample_id", ...}, ...]}` as COCO has it
      (https://cocodataset.org/#format-data): `id` is the number of the row in the table of the run,
      from 1, so that it stays the same whatever is chosen. With `"categories": []` and
      `"annotations": []` for those that look for them; CVAT, Label Studio and FiftyOne match images by
      `file_name`.

    Args:
        result: the run, or its folder.
        path: of the file; its suffix says which format.
        fraction: of the samples; see `MiningResult.select`.
        by: see `MiningResult.select`.
        per: see `MiningResult.select`.
        columns: of the table of the run, and of `analysis.samples`; by default all of the table that
            are no lists, and all of the analysis.
        dataset: the data set of the run, for `file_name` where the run has no manifest.
        analysis: of the run, to add its columns of samples.

    Returns:
        How many samples were written.

    Raises:
        FastpieError: for an unknown suffix or column, or a file that cannot be written.
    """
    run = result if isinstance(result, MiningResult) else MiningResult(result)
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise FastpieError(
            f"Expected a `path` that ends in one of {_FORMATS}, but got {path.name!r}."
        )
    rows = run.select_rows(fraction, by, per)
    chosen = _chosen(run, rows, dataset, analysis, columns)
    write = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}
    facts = {
        "description": f"{len(rows)} of {len(run)} samples of the fastpie run {run.location}",
        "by": by,
        "fraction": fraction,
        "per": per,
        "hardness": run.record.get("hardness"),
    }
    try:
        with atomic_path(path) as temporary:
            write[path.suffix.lower()](temporary, chosen, rows, facts)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise FastpieError(f"Expected to write to {path}, but: {error}.") from error
    return len(rows)


def _chosen(
    run: MiningResult,
    rows: np.ndarray,  # int64 [n] of the table of the run
    dataset: Any,
    analysis: Analysis | None,
    columns: Sequence[str] | None,
) -> pa.Table:
    """Some rows with the columns wanted, in the order of `rows`; the others pass by as a stream."""
    schema = run.dataset.schema
    added = analysis.samples.schema if analysis is not None else pa.schema([])
    if columns is None:
        columns = [f.name for f in schema if not pa.types.is_nested(f.type)]
        columns += [name for name in added.names if name not in columns]
    known = {*schema.names, *added.names}
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise FastpieError(
            f"Expected `columns` of the table {sorted(known)}, but got {unknown[0]!r}."
        )
    columns = ["sample_id", *(name for name in columns if name != "sample_id")]
    of_run = [name for name in columns if name in schema.names]
    table = run.take(rows, of_run)
    paths = paths_of(run, table["sample_id"], dataset)
    table = table.add_column(1, pa.field("file_name", paths.type), paths)
    if analysis is not None:
        place = pc.index_in(table["sample_id"], value_set=analysis.samples["sample_id"])
        for name in columns:
            if name not in of_run:
                table = table.append_column(added.field(name), analysis.samples[name].take(place))
    return table


def _write_csv(path: Path, table: pa.Table, rows: np.ndarray, facts: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow([_cell(name) for name in table.column_names])
        for batch in table.to_batches(_ROWS):
            columns = [[_cell(v) for v in column.to_pylist()] for column in batch.columns]
            writer.writerows(zip(*columns, strict=True))


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, bool):
        return "true" if value else "false"
    value = _plain(value)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _write_parquet(path: Path, table: pa.Table, rows: np.ndarray, facts: dict[str, Any]) -> None:
    metadata = {"fastpie": json.dumps(facts)}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def _write_json(path: Path, table: pa.Table, rows: np.ndarray, facts: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        info = json.dumps(facts, allow_nan=False)
        file.write(f'{{"info": {info},\n"categories": [], "annotations": [],\n"images": [')
        at = 0
        for batch in table.to_batches(_ROWS):
            for record in batch.to_pylist():
                image = {"id": int(rows[at]) + 1, "file_name": record.pop("file_name")}
                image |= {name: _plain(value) for name, value in record.items()}
                file.write("," * (at > 0) + "\n" + json.dumps(image, allow_nan=False))
                at += 1
        file.write("\n]}\n")


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinities, which it has not, are null."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value
