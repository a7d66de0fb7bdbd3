"""NIH ChestX-ray14: `Data_Entry_2017.csv` (also `_v2020`) and the two lists beside it.

Wang et al., "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks", CVPR 2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.formats.columns import (
    age_of,
    all_classes,
    constant,
    label_column,
    mapped,
    sex_of,
    table_of,
    tags,
    text,
    text_or_null,
)
from fastpie.data.formats.folder import locate
from fastpie.data.formats.source import Request, Source, need_columns, read_csv
from fastpie.errors import FastpieError

__all__ = ["CLASSES", "find", "matches", "read"]

CLASSES = [  # in the order of the README of the data set
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
]  # fmt: skip
_SPLITS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}


def matches(header: list[str]) -> bool:
    """Whether these are the columns of the file."""
    return {"Image Index", "Finding Labels", "Patient ID"} <= set(header)


def find(folder: Path) -> bool:
    """Whether the folder is the data set's."""
    return any(folder.glob("Data_Entry_2017*.csv"))


def read(request: Request) -> Source:
    """Read the file; a folder is that of the file."""
    path: Path = request.source
    if path.is_dir():
        entries = sorted(path.glob("Data_Entry_2017*.csv"))
        if len(entries) != 1:
            raise FastpieError(
                f"Expected one Data_Entry_2017*.csv in {path}, but got {[e.name for e in entries]}."
            )
        path = entries[0]
    if request.task not in (None, "multilabel"):
        raise FastpieError(
            f"Expected task 'multilabel' for ChestX-ray14, but got {request.task!r}."
        )
    table = read_csv(path)
    names = table.column_names
    sex = "Patient Sex" if "Patient Sex" in names else "Patient Gender"
    needed = ["Image Index", "Finding Labels", "Patient ID", "Patient Age", sex, "View Position"]
    need_columns(table, needed, path, "columns")
    files = request.folder(path.parent)
    images = text(table.column("Image Index"))
    class_names = all_classes(request.class_names, CLASSES, path)
    values = tags(table.column("Finding Labels"), "|", class_names, "No Finding", path)
    columns: dict[str, Any] = {
        "sample_id": images,
        "path": locate(images, files),
        "label": label_column(values),
        "group": text_or_null(table.column("Patient ID")),
        "sex": mapped(table.column(sex), sex_of, pa.large_string()),
        "age": mapped(table.column("Patient Age"), age_of, pa.float32()),
        "view": text_or_null(table.column("View Position")),
    }
    split = _split(images, path.parent)
    if split is not None:
        columns["split"] = split
    return Source(table_of(columns, table), files, "multilabel", class_names)


def _split(images: pa.ChunkedArray, folder: Path) -> Any:
    """Split by the lists beside the file, null for an image in neither; None without lists."""
    split = None
    for name, file in _SPLITS.items():
        if not (folder / file).is_file():
            continue
        lines = (folder / file).read_text(encoding="utf-8-sig").split()
        inside = pc.is_in(images, value_set=pa.array(lines, pa.large_string()))
        if split is None:
            split = pa.nulls(len(images), pa.large_string())
        elif pc.any(pc.and_(inside, pc.is_valid(split))).as_py():
            both = images.filter(pc.and_(inside, pc.is_valid(split)))
            raise FastpieError(
                f"Expected every image in one of {list(_SPLITS.values())} in {folder}, but "
                f"{len(both)} are in both, for example {both.slice(0, 3).to_pylist()}."
            )
        split = pc.if_else(inside, constant(name, len(images)), split)
    return split
