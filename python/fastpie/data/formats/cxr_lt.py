"""NIH-CXR-LT and MIMIC-CXR-LT: long-tailed labels, of one class an image or of several.

Holste et al., "Long-Tailed Classification of Thorax Diseases on Chest X-Ray: A New Benchmark
Study", MICCAI DALI 2022 (`nih-cxr-lt_single-label_train.csv`, ...), and "How Does Pruning Impact
Long-Tailed Multi-Label Medical Image Classifiers?", MICCAI 2023
(`miccai2023_nih-cxr-lt_labels_train.csv`, ...).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.formats.columns import (
    all_classes,
    constant,
    flags,
    label_column,
    one_hot_classes,
    table_of,
    text,
    text_or_null,
)
from fastpie.data.formats.folder import locate
from fastpie.data.formats.source import Request, Source, need_columns, read_csv
from fastpie.errors import FastpieError

__all__ = ["find", "matches", "read"]

_RARE = {"Pneumoperitoneum", "Pneumomediastinum", "Subcutaneous Emphysema", "Tortuous Aorta"}
_PATIENT = ("subj_id", "subject_id")  # the files of 2022 and of MIMIC, and those of 2023
_NO_CLASS = {"id", "subj_id", "subject_id", "study_id", "dicom_id", "path", "balanced", "split"}
_SPLITS = ("train", "val", "test")


def matches(header: list[str]) -> bool:
    """Whether these are the columns of a label file."""
    names = set(header)
    image = "id" in names or {"dicom_id", "path"} <= names
    return image and names >= _RARE and any(p in names for p in _PATIENT)


def find(folder: Path) -> bool:
    """Whether the folder holds label files."""
    return bool(_sources(folder))


def _sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*cxr-lt*.csv") if _split_of(p) is not None)


def _split_of(path: Path) -> str | None:
    return next((s for s in _SPLITS if path.stem.endswith(s)), None)


def read(request: Request) -> Source:
    """Read one file, or those of a folder.

    The balanced test set of 2022 is a part of its test set: of a folder with both, the rows of the
    test set have a column `balanced`.
    """
    source: Path = request.source
    paths = _sources(source) if source.is_dir() else [source]
    families = sorted({p.stem.removesuffix(_split_of(p) or "").rstrip("_-") for p in paths})
    families = sorted({f.removesuffix("balanced").rstrip("_-") for f in families})
    if len(families) != 1:
        raise FastpieError(
            f"Expected the label files of one data set in {source}, but got {families}. Give one "
            "file, or a folder with its files alone."
        )
    tables, balanced_test = {}, None
    for path in paths:
        if (
            "balanced-test" in path.stem
            and len(paths) > 1
            and any(_is_whole_test(p) for p in paths)
        ):
            balanced_test = read_csv(path)
        else:
            tables[path] = read_csv(path)
    first = next(iter(tables.values()))
    needed = ["dicom_id", "path"] if "dicom_id" in first.column_names else ["id"]
    for path, table in tables.items():
        need_columns(table, needed, path, "columns")
        split = _split_of(path)
        if split is not None:
            tables[path] = table.append_column("split", constant(split, len(table)))
    table = pa.concat_tables(tables.values(), promote_options="default")
    ids = text(table.column(needed[0]))
    if balanced_test is not None:
        inside = pc.is_in(ids, value_set=text(balanced_test.column(needed[0])))
        table = table.append_column("balanced", inside)
    return _manifest(request, table, ids, paths)


def _is_whole_test(path: Path) -> bool:
    return path.stem.endswith("test") and "balanced" not in path.stem


def _manifest(request: Request, table: pa.Table, ids: pa.ChunkedArray, paths: list[Path]) -> Source:
    source = paths[0]
    patient = next((p for p in _PATIENT if p in table.column_names), None)
    if patient is None:
        raise FastpieError(f"Expected a column of {_PATIENT} in {source}, but there is none.")
    in_file = [n for n in table.column_names if n not in _NO_CLASS]
    class_names = all_classes(request.class_names, in_file, source)
    values = flags(table, class_names)
    task = request.task or ("multiclass" if "single-label" in source.name else "multilabel")
    files = request.folder(source.parent)
    columns: dict[str, Any] = {
        "sample_id": ids,
        "path": text(table.column("path")) if "path" in table.column_names else locate(ids, files),
        "label": one_hot_classes(values, source) if task == "multiclass" else label_column(values),
        "group": text_or_null(table.column(patient)),
    }
    if "split" in table.column_names:
        columns["split"] = table.column("split")
    return Source(table_of(columns, table), files, task, class_names)
