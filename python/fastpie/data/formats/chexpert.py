"""CheXpert: `train.csv` and `valid.csv`.

Irvin et al., "CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert
Comparison", AAAI 2019; `uncertain` takes the names of its approaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.files import FolderFiles
from fastpie.data.formats.columns import (
    age_of,
    all_classes,
    flags,
    label_column,
    mapped,
    sex_of,
    table_of,
    text,
    text_or_null,
)
from fastpie.data.formats.source import Request, Source, header_of, need_columns, read_csv
from fastpie.errors import FastpieError

__all__ = ["CLASSES", "find", "matches", "read"]

CLASSES = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
_UNCERTAIN = {"u_ones": 1.0, "u_zeros": 0.0, "u_ignore": np.nan}
_UNMENTIONED = {"unknown": np.nan, "negative": 0.0}
_FILES = ("train.csv", "valid.csv")


def matches(header: list[str]) -> bool:
    """Whether these are the columns of the files."""
    return {"Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"} <= set(header)


def find(folder: Path) -> bool:
    """Whether the folder is the data set's."""
    return any((folder / f).is_file() and matches(header_of(folder / f)) for f in _FILES)


def read(request: Request) -> Source:
    """Read one file, or both of a folder."""
    path: Path = request.source
    if request.uncertain not in _UNCERTAIN:
        raise FastpieError(
            "Expected `uncertain` to say what an uncertain observation (-1) of CheXpert counts as: "
            f"'u_ones', 'u_zeros' or 'u_ignore' (unknown), but got {request.uncertain!r}."
        )
    unmentioned = request.unmentioned or "unknown"
    if unmentioned not in _UNMENTIONED:
        raise FastpieError(
            f"Expected `unmentioned` to be 'unknown' or 'negative', but got {unmentioned!r}."
        )
    if request.task not in (None, "multilabel"):
        raise FastpieError(f"Expected task 'multilabel' for CheXpert, but got {request.task!r}.")
    if path.is_dir():
        present = [path / f for f in _FILES if (path / f).is_file()]
        if not present:
            raise FastpieError(f"Expected {' or '.join(_FILES)} in {path}, but there is neither.")
        folder = path
        table = pa.concat_tables([read_csv(p) for p in present], promote_options="default")
    else:
        folder, table = path.parent, read_csv(path)
    needed = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CLASSES]
    need_columns(table, needed, path, "columns")
    class_names = all_classes(request.class_names, CLASSES, path)
    values = flags(table, class_names)
    uncertain, unknown = values == -1, np.isnan(values)
    values[uncertain] = _UNCERTAIN[request.uncertain]
    values[unknown] = _UNMENTIONED[unmentioned]
    ids = text(table.column("Path"))
    files = request.folder(folder)
    # The patient and the split are parts of .../train/patient00001/study1/view1_frontal.jpg.
    parts = pc.extract_regex(ids, r"(?:^|/)(?P<split>[^/]+)/(?P<group>patient\d+)/")
    split, group = (pc.struct_field(parts, field) for field in ("split", "group"))
    views = [text_or_null(table.column(name)) for name in ("AP/PA", "Frontal/Lateral")]
    columns: dict[str, Any] = {
        "sample_id": ids,
        "path": _below_root(ids, files),
        "label": label_column(values),
        "group": group,
        "split": mapped(split, lambda s: "val" if s == "valid" else s, pa.large_string()),
        "sex": mapped(table.column("Sex"), sex_of, pa.large_string()),
        "age": mapped(table.column("Age"), age_of, pa.float32()),
        "view": pc.coalesce(*views),
    }
    return Source(table_of(columns, table), files, "multilabel", class_names)


def _below_root(paths: pa.ChunkedArray, files: FolderFiles) -> pa.ChunkedArray:
    """Paths without their first folder (CheXpert-v1.0-small) where the root is that folder."""
    first = paths[0].as_py().partition("/")[0] if len(paths) else ""
    if not first.startswith("CheXpert") or (files.root / first).is_dir():
        return paths
    return pc.replace_substring_regex(paths, r"^CheXpert[^/]*/", "")
