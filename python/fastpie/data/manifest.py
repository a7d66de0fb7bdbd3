"""A table of image files as a data set."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastpie.data.decode import Preprocessing, decode
from fastpie.errors import FastpieError

__all__ = ["ManifestDataset"]


class ManifestDataset(Dataset[tuple[Any, ...]]):
    """Images named by a CSV or Parquet file, or by the sub-folders of an image folder.

    Items are `(image, label, sample_id)`, label None without `labels`. Images are fp32 [C, H, W].

    Attributes:
        sample_ids: the column `sample_id`, else the path as the manifest has it.
        paths: of the files.
        class_names: multiclass with names for labels: in index order; multilabel: the columns.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        labels: str | Sequence[str] | None = None,
        task: str = "multiclass",
        class_names: Sequence[str] | None = None,
        path_column: str = "path",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Read the manifest; images are read item by item.

        Args:
            source: a .csv or .parquet file with a column of paths, or a folder whose sub-folders
                are the classes.
            root: what relative paths are relative to, by default the folder of the manifest. Paths
                outside it are refused.
            labels: the column of class indices or names; for multilabel the columns of 1, 0 or
                empty (unknown). A folder needs none.
            task: "multiclass" or "multilabel".
            class_names: order of the classes that the model was trained with; by default names are
                sorted.
            path_column: the column of paths.
            preprocessing: size, normalisation and channels; by default RGB in [0, 1].

        Raises:
            FastpieError: if the manifest cannot be read, or a column is missing or not usable.
        """
        self.preprocessing = preprocessing or Preprocessing()
        source = Path(source)
        if source.is_dir():
            self.root, table = source.resolve(), _folder_table(source)
            path_column, labels = "path", "label"
        else:
            table = _read_table(source)
            self.root = Path(root or source.parent).resolve()
        if path_column not in table.column_names:
            raise FastpieError(
                f"Expected a column {path_column!r} of paths in {source}, but it has "
                f"{table.column_names}."
            )
        self._relative = [str(p) for p in table.column(path_column).to_pylist()]
        self.paths = [str(self.root / p) for p in self._relative]
        ids = table.column("sample_id") if "sample_id" in table.column_names else None
        self.sample_ids = self._relative if ids is None else [str(i) for i in ids.to_pylist()]
        self.class_names: list[str] | None = None if class_names is None else list(class_names)
        self.labels: list[Any] | None = None
        if labels is not None:
            columns = [labels] if isinstance(labels, str) else list(labels)
            missing = [c for c in columns if c not in table.column_names]
            if missing:
                raise FastpieError(
                    f"Expected the label columns {missing} in {source}, but it has "
                    f"{table.column_names}."
                )
            if task == "multilabel":
                self.labels = self._multilabel(table, columns)
            elif len(columns) == 1:
                self.labels = self._multiclass(table.column(columns[0]).to_pylist(), source)
            else:
                raise FastpieError(
                    f"Expected one label column for task {task!r}, but got {columns}; for several "
                    "labels an image use task='multilabel'."
                )

    @property
    def fingerprint(self) -> str:
        """Hash of labels and preprocessing: what decides a score besides the files themselves.

        `fastpie.mine` refuses to go on with a run whose data set has another one.
        """
        labels = [v.tolist() if isinstance(v, Tensor) else v for v in self.labels or ()]
        text = json.dumps([labels, self.class_names, asdict(self.preprocessing)])
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        path = Path(self.paths[index]).resolve()
        if not path.is_relative_to(self.root):
            raise FastpieError(f"Expected a path inside the data root {self.root}, but got {path}.")
        image = decode(path, self.preprocessing)
        return image, None if self.labels is None else self.labels[index], self.sample_ids[index]

    def _multiclass(self, values: list[Any], source: Path) -> list[int]:
        texts = ["" if v is None else str(v).strip() for v in values]
        numbers = [_index(t) for t in texts]
        if self.class_names is None and None not in numbers:
            return [-1 if n is None else n for n in numbers]
        if self.class_names is None:
            if any(n is not None and n >= 0 for n in numbers):
                odd = next(t for t, n in zip(texts, numbers, strict=True) if n is None)
                raise FastpieError(
                    f"Expected class indices or class names, but {source} mixes them (for example "
                    f"{odd!r}); give the order of the classes by `class_names`."
                )
            self.class_names = sorted({t for t in texts if t})
        index = {name: i for i, name in enumerate(self.class_names)}
        unknown = sorted({t for t in texts if t and t not in index})
        if unknown:
            raise FastpieError(
                f"Expected labels among the classes {self.class_names[:10]}, but {source} holds "
                f"{unknown[:3]}."
            )
        return [index.get(t, -1) for t in texts]  # an empty label goes to the errors table

    def _multilabel(self, table: pa.Table, columns: list[str]) -> list[Tensor]:
        self.class_names = columns
        rows = zip(*(table.column(c).to_pylist() for c in columns), strict=True)
        return [torch.tensor([_flag(v) for v in row], dtype=torch.float32) for row in rows]


def _read_table(source: Path) -> pa.Table:
    try:
        if source.suffix == ".parquet":
            return pa.parquet.read_table(source)
        # Everything as text: ids keep their leading zeros, and each column is converted on its own.
        with source.open("rb") as file:
            names = pa.csv.open_csv(file).schema.names
        types = {name: pa.string() for name in names}
        options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        parse = pa.csv.ParseOptions(newlines_in_values=True)
        return pa.csv.read_csv(source, parse_options=parse, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        raise FastpieError(
            f"Expected a CSV or Parquet manifest at {source}, but: {error}"
        ) from error


def _folder_table(folder: Path) -> pa.Table:
    known = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(p for p in folder.glob("*/**/*") if p.suffix.lower() in known and p.is_file())
    if not files:
        raise FastpieError(
            f"Expected images in sub-folders (one a class) of {folder}, but there are none."
        )
    relative = [p.relative_to(folder) for p in files]
    return pa.table(
        {"path": [p.as_posix() for p in relative], "label": [p.parts[0] for p in relative]}
    )


def _index(text: str) -> int | None:
    """A class index in text ("3", "3.0"); -1 for an empty cell or NaN, None for a name."""
    if not text:
        return -1
    try:
        value = float(text)
    except ValueError:
        return None
    if math.isnan(value):
        return -1
    return int(value) if value.is_integer() else None


def _flag(value: Any) -> float:
    """A multilabel cell; empty is unknown. What is no number becomes 2, which mining refuses."""
    text = "" if value is None else str(value).strip()
    try:
        return float(text) if text else math.nan
    except ValueError:
        return 2.0
