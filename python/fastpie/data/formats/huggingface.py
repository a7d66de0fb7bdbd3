"""Hugging Face `datasets`: a data set in memory or a folder of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.data.files import FolderFiles, HuggingFaceFiles
from fastpie.data.formats.columns import (
    attributes,
    constant,
    flags,
    label_column,
    mapped,
    table_of,
    text,
)
from fastpie.data.formats.source import Request, Source, need_columns
from fastpie.data.formats.table import labels_of
from fastpie.errors import FastpieError

__all__ = ["find", "is_dataset", "open_saved", "read"]


def is_dataset(source: object) -> bool:
    """Whether it is a `datasets.Dataset` or `DatasetDict`, without importing the library."""
    return type(source).__module__.partition(".")[0] == "datasets"


def find(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    saved = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def read(request: Request) -> Source:
    """Read all columns but the images."""
    saved = request.source if isinstance(request.source, Path) else None
    dataset = request.source if saved is None else _load(saved)
    parts = _parts(dataset)
    features = next(iter(parts.values())).features
    images = [n for n, f in features.items() if type(f).__name__ == "Image"]
    column = request.path_column if request.path_column in images else (images or [""])[0]
    if not column or (len(images) > 1 and column != request.path_column):
        raise FastpieError(
            f"Expected one column of images in the data set, but got {images} of {list(features)}. "
            "Cast the column to datasets.Image(), or name it by `path_column`."
        )
    tables = []
    for split, part in parts.items():
        rows = pc.cast(pa.array(np.arange(len(part))), pa.large_string())
        if split:
            start, between = (pa.scalar(w, pa.large_string()) for w in (f"{split}::", ""))
            rows = pc.binary_join_element_wise(start, rows, between)
        table = _columns_but(part, {*images, "path"}).append_column("path", rows)
        if split and "split" not in features:
            table = table.append_column("split", constant(split, len(part)))
        tables.append(table)
    table = pa.concat_tables(tables, promote_options="default")
    # A folder of the data set's own has its files below it; one in memory names none.
    root = request.root or saved
    folder = None
    if root is not None or request.allow_outside:
        folder = FolderFiles(root or Path("/"), request.allow_outside)
    files = _files(parts, column, folder, saved)
    paths = text(table.column("path"))
    ids = text(table.column("sample_id")) if "sample_id" in table.column_names else paths
    columns: dict[str, Any] = {"sample_id": ids, "path": paths}
    label, task, class_names = _labels(table, request, features)
    if label is not None:
        columns["label"] = label
    columns.update(attributes(table, request, "the data set"))
    return Source(table_of(columns, table), files, task, class_names)


def open_saved(saved: Path, column: str, folder: FolderFiles | None) -> HuggingFaceFiles:
    """The files of a manifest that was read from a folder of `save_to_disk`."""
    return _files(_parts(_load(saved)), column, folder, saved)


def _files(
    parts: Mapping[str, Any], column: str, folder: FolderFiles | None, saved: Path | None
) -> HuggingFaceFiles:
    image = _library().Image(decode=False)
    raw = {
        split: part.with_format(None).select_columns([column]).cast_column(column, image)
        for split, part in parts.items()
    }
    return HuggingFaceFiles(raw, column, folder, saved)


def _library() -> Any:
    return load_extra("datasets", "huggingface", "data sets of Hugging Face")


def _load(saved: Path) -> Any:
    library = _library()
    try:
        return library.load_from_disk(str(saved))
    except Exception as error:  # the library raises what its parts raise
        raise FastpieError(
            f"Expected a data set that save_to_disk wrote in {saved}, but: {error}"
        ) from error


def _parts(dataset: Any) -> dict[str, Any]:
    parts = {str(k): v for k, v in dataset.items()} if isinstance(dataset, dict) else {"": dataset}
    if not parts or not all(
        hasattr(p, "select_columns") and hasattr(p, "data") for p in parts.values()
    ):
        raise FastpieError(
            f"Expected a map-style datasets.Dataset, but got {type(dataset).__name__}. Load it "
            "without streaming."
        )
    return parts


def _columns_but(part: Any, left_out: set[str]) -> pa.Table:
    names = [n for n in part.column_names if n not in left_out]
    if not names:
        return pa.table({"path": pa.nulls(len(part))}).drop_columns(["path"])
    table = part.with_format("arrow").select_columns(names)[:]
    return table.replace_schema_metadata(None)


def _labels(table: pa.Table, request: Request, features: Mapping[str, Any]) -> Any:
    """The labels asked for, else the only ClassLabel column; as `table.labels_of` returns them."""
    labels = request.labels
    if labels is None:
        named = [n for n in table.column_names if _names(features.get(n)) is not None]
        if len(named) != 1:
            return None, None, request.class_names
        labels = named[0]
    if not isinstance(labels, str):
        if request.task == "multilabel":
            need_columns(table, labels, "the data set", "label columns")
            return label_column(flags(table, labels)), "multilabel", list(labels)
        return labels_of(table, request, "the data set")
    need_columns(table, [labels], "the data set", "label columns")
    names = _names(features.get(labels))
    if names is None:
        return labels_of(table, replace(request, labels=labels), "the data set")
    order = request.class_names or names
    if sorted(order) != sorted(names):
        raise FastpieError(
            f"Expected `class_names` to be those of the data set in any order, {names[:20]}, but got "
            f"{order[:20]}."
        )
    place = [order.index(name) for name in names]
    column = table.column(labels)
    if pa.types.is_integer(column.type):
        index = mapped(column, lambda v: -1 if v is None or v < 0 else place[v], pa.int64())
        return index, "multiclass", order
    lists = column.combine_chunks()
    values = np.zeros((len(lists), len(names)), np.float32)
    values[lists.is_null().to_numpy(zero_copy_only=False)] = np.nan
    rows = pc.list_parent_indices(lists).to_numpy()
    values[rows, np.asarray(place)[pc.list_flatten(lists).to_numpy()]] = 1
    return label_column(values), "multilabel", order


def _names(feature: Any) -> list[str] | None:
    """Names of a ClassLabel, or of the ClassLabel that a list holds."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if type(inner).__name__ == "ClassLabel" and names is not None else None
