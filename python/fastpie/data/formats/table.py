"""A CSV or Parquet file of the user's own, with a column of paths."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fastpie.data.formats.columns import (
    attributes,
    class_indices,
    flags,
    label_column,
    table_of,
    text,
)
from fastpie.data.formats.source import Request, Source, need_columns, read_csv, read_parquet
from fastpie.errors import FastpieError

__all__ = ["labels_of", "read"]


def read(request: Request) -> Source:
    """Read the file; see `fastpie.data.read_manifest`."""
    path = request.source
    table = read_parquet(path) if path.suffix == ".parquet" else read_csv(path)
    if request.path_column not in table.column_names:
        raise FastpieError(
            f"Expected a column {request.path_column!r} of paths in {path}, but it has "
            f"{table.column_names[:40]}. Name the column by `path_column`, or the kind of file by "
            "`format`."
        )
    paths = text(table.column(request.path_column))
    columns: dict[str, Any] = {
        "sample_id": text(table.column("sample_id"))
        if "sample_id" in table.column_names
        else paths,
        "path": paths,
    }
    label, task, class_names = labels_of(table, request, path)
    if label is not None:
        columns["label"] = label
    columns.update(attributes(table, request, path))
    files = request.folder(path.parent)
    return Source(table_of(columns, table), files, task, class_names)


def labels_of(
    table: pa.Table, request: Request, source: object
) -> tuple[pa.Array | None, str | None, list[str] | None]:
    """The labels that the request names: column, task and class names; all None without."""
    if request.labels is None:
        return None, None, request.class_names
    names = [request.labels] if isinstance(request.labels, str) else list(request.labels)
    if not names:
        raise FastpieError("Expected `labels` to name a column, but got none.")
    need_columns(table, names, source, "label columns")
    if request.task == "multilabel":
        return label_column(flags(table, names)), "multilabel", names
    if len(names) != 1:
        raise FastpieError(
            f"Expected one label column for task 'multiclass', but got {names}; for several labels "
            "an image use task='multilabel'."
        )
    label, class_names = class_indices(table.column(names[0]), request.class_names, source)
    return label, "multiclass", class_names
