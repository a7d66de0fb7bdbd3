"""A manifest as a data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpie.data.decode import Preprocessing, decode
from fastpie.data.manifest import Manifest, read_manifest
from fastpie.errors import FastpieError

__all__ = ["ManifestDataset"]


class ManifestDataset(Dataset[tuple[Any, ...]]):
    """The samples of a manifest.

    Items are `(image, label, sample_id)`, label None without labels. Images are fp32 [C, H, W].

    Attributes:
        manifest: the samples.
        sample_ids: of the manifest.
        paths: of the files, for reports.
        class_names: of the manifest.
        labels: int or fp32 [C] a sample, None without.
    """

    def __init__(
        self,
        source: Manifest | str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        labels: str | Sequence[str] | None = None,
        task: str | None = None,
        class_names: Sequence[str] | None = None,
        path_column: str = "path",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Read the manifest; images are read item by item.

        Args:
            source: a manifest, or what `read_manifest` reads one from. The next arguments are its.
            root: the folder of the images.
            labels: columns of labels.
            task: "multiclass" or "multilabel".
            class_names: order of the classes.
            path_column: the column of paths.
            preprocessing: size, normalisation and channels; by default RGB in [0, 1].

        Raises:
            FastpieError: if the manifest cannot be read.
        """
        if not isinstance(source, Manifest):
            source = read_manifest(
                source,
                root=root,
                labels=labels,
                task=task,
                class_names=class_names,
                path_column=path_column,
            )
        self.manifest = source
        self.preprocessing = preprocessing or Preprocessing()
        self.sample_ids = source.sample_ids
        self._relative = source.table.column("path").to_pylist()
        self.paths = [source.files.name(p) for p in self._relative]
        self.class_names = source.class_names
        self.labels = None if source.task is None else _labels(source)

    @property
    def fingerprint(self) -> str:
        """Hash of labels and preprocessing: what decides a score besides the files themselves.

        `fastpie.mine` refuses to go on with a run whose data set has another one.
        """
        labels = [v.tolist() if isinstance(v, Tensor) else v for v in self.labels or ()]
        text = json.dumps([labels, self.class_names, asdict(self.preprocessing)])
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        file = self.manifest.files.open(self._relative[index])
        if not isinstance(file, Path):
            raise FastpieError("Expected a file, but got the bytes of one.")
        image = decode(file, self.preprocessing)
        return image, None if self.labels is None else self.labels[index], self.sample_ids[index]


def _labels(manifest: Manifest) -> list[Any]:
    column = manifest.table.column("label")
    if manifest.task == "multiclass":
        return list(column.to_pylist())
    flat = np.array(column.combine_chunks().flatten(), copy=True)
    return list(torch.from_numpy(flat.reshape(len(manifest), -1)))
