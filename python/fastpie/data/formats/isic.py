"""ISIC 2018 task 3 and HAM10000: skin lesions, several images of some.

Tschandl et al., "The HAM10000 dataset, a large collection of multi-source dermatoscopic images of
common pigmented skin lesions", Scientific Data 2018. Images of one lesion are one group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.formats.columns import (
    age_of,
    all_classes,
    class_indices,
    constant,
    flags,
    mapped,
    one_hot_classes,
    sex_of,
    table_of,
    text,
    text_or_null,
)
from fastpie.data.formats.folder import locate
from fastpie.data.formats.source import Request, Source, header_of, need_columns, read_csv
from fastpie.errors import FastpieError

__all__ = ["CLASSES", "find", "matches", "read"]

CLASSES = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
_SPLITS = {"training": "train", "validation": "val", "test": "test"}
_HAM = ("HAM10000_metadata", "HAM10000_metadata.csv", "HAM10000_metadata.tab")


def matches(header: list[str]) -> bool:
    """Whether these are the columns of a ground truth or of HAM10000's metadata."""
    return {"image", *CLASSES} <= set(header) or {"lesion_id", "image_id", "dx"} <= set(header)


def find(folder: Path) -> bool:
    """Whether the folder is one of the data sets."""
    return bool(_sources(folder))


def _sources(folder: Path) -> list[Path]:
    # The archives unpack to a folder of the file's name.
    name = "ISIC2018_Task3_*_GroundTruth.csv"
    found = [
        p for p in (*folder.glob(name), *folder.glob(f"ISIC2018_Task3_*/{name}")) if p.is_file()
    ]
    metadata = [folder / name for name in _HAM if (folder / name).is_file()]
    return sorted(found) or metadata[:1]


def read(request: Request) -> Source:
    """Read one file, or all ground truths of a folder."""
    path: Path = request.source
    paths = _sources(path) if path.is_dir() else [path]
    if not paths:
        raise FastpieError(
            f"Expected ISIC2018_Task3_*_GroundTruth.csv or {_HAM[1]} in {path}, but there is neither."
        )
    if request.task not in (None, "multiclass"):
        raise FastpieError(f"Expected task 'multiclass' for ISIC 2018, but got {request.task!r}.")
    root = path if path.is_dir() else path.parent
    if "image_id" in header_of(paths[0]):
        return _ham10000(request, paths[0], root)
    return _challenge(request, paths, root)


def _ham10000(request: Request, path: Path, root: Path) -> Source:
    table = read_csv(path)
    needed = ["lesion_id", "image_id", "dx", "age", "sex", "localization"]
    need_columns(table, needed, path, "columns")
    ids = text(table.column("image_id"))
    files = request.folder(root)
    diagnosis = pc.utf8_upper(text(table.column("dx")))
    class_names = all_classes(request.class_names, CLASSES, path)
    label, _ = class_indices(diagnosis, class_names, path)
    columns: dict[str, Any] = {
        "sample_id": ids,
        "path": locate(ids, files, suffix=".jpg"),
        "label": label,
        "group": text_or_null(table.column("lesion_id")),
        "sex": mapped(table.column("sex"), sex_of, pa.large_string()),
        "age": mapped(table.column("age"), age_of, pa.float32()),
        "site": mapped(table.column("localization"), _site, pa.large_string()),
    }
    return Source(table_of(columns, table), files, "multiclass", class_names)


def _challenge(request: Request, paths: list[Path], root: Path) -> Source:
    class_names = all_classes(request.class_names, CLASSES, paths[0])
    tables = []
    for path in paths:
        table = read_csv(path)
        need_columns(table, ["image", *class_names], path, "columns")
        word = next((s for s in _SPLITS if s in path.name.lower()), None)
        if word is not None:
            table = table.append_column("split", constant(_SPLITS[word], len(table)))
        tables.append(table)
    table = pa.concat_tables(tables, promote_options="default")
    ids = text(table.column("image"))
    files = request.folder(root)
    columns: dict[str, Any] = {
        "sample_id": ids,
        "path": locate(ids, files, suffix=".jpg"),
        "label": one_hot_classes(flags(table, class_names), paths[0]),
    }
    lesions = _lesions(request, paths, ids)
    if lesions is not None:
        columns["group"] = lesions
    if "split" in table.column_names:
        columns["split"] = table.column("split")
    return Source(table_of(columns, table), files, "multiclass", class_names)


def _lesions(request: Request, paths: list[Path], ids: pa.ChunkedArray) -> Any:
    """The lesion of each image by the grouping file; null for an image not in it."""
    near = [path.parent for path in paths]
    near += [folder.parent for folder in near if folder.name.startswith("ISIC2018")]
    found = [p for folder in near for p in sorted(folder.glob("*LesionGroupings*.csv"))]
    groups = request.groups or (found[0] if found else None)
    if groups is None:
        if all("validation" in p.name.lower() or "test" in p.name.lower() for p in paths):
            return None  # only the training images came with groupings
        raise FastpieError(
            f"Expected ISIC2018_Task3_Training_LesionGroupings.csv beside {paths[0]}, but it is not "
            "there: without it, images of one lesion could come into two splits. Put it there, or "
            "give its path as `groups`."
        )
    table = read_csv(groups)
    need_columns(table, ["image", "lesion_id"], groups, "columns")
    place = pc.index_in(ids, value_set=text(table.column("image")))
    return text_or_null(table.column("lesion_id")).take(place)


def _site(value: Any) -> str | None:
    word = "" if value is None else str(value).strip()
    return None if word.lower() in ("", "unknown", "na") else word
