"""The images of a manifest as a data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpie.data.cache import DecodedImages, ImageCache
from fastpie.data.decode import VERSION, decode
from fastpie.data.files import Files
from fastpie.data.manifest import Manifest, read_manifest
from fastpie.data.pixels import Pixels
from fastpie.data.preprocessing import Preprocessing
from fastpie.data.texts import Texts
from fastpie.errors import FastpieError

__all__ = ["ManifestDataset"]

_NO_FRAME = np.iinfo(np.int64).min


class ManifestDataset(Dataset[tuple[Any, ...]]):
    """Images named by a manifest.

    Items are `(image, label, sample_id)`: fp32 [C, H, W] (volumes: [C, D, H, W]), int or fp32 [C] or
    None without labels, str. `raw` gives the image as decoded, uint8 or uint16: a quarter or half of
    the bytes between processes, which `normalize` turns into the same fp32, a batch at a time and
    on its device.

    Attributes:
        manifest: the table, and how its files are opened.
        preprocessing: from file to network.
        sample_ids: of the samples.
        paths: of the files, for errors and reports.
        class_names: in index order; None where classes have no names.
        labels: of every sample: a list of int (-1: unknown) or an fp32 tensor [N, C] (NaN: unknown),
            None without labels.
        cache: of the decoded images, or None.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Manifest,
        *,
        preprocessing: Preprocessing | None = None,
        cache: str | os.PathLike[str] | ImageCache | None = None,
        **options: Any,
    ) -> None:
        """Read the manifest, or take one; images are read item by item.

        Args:
            source: what `read_manifest` reads, or a manifest.
            preprocessing: size, channels, window and normalisation; by default RGB in [0, 1].
            cache: folder of decoded images, or an `ImageCache`. What is decoded is kept there for
                later epochs, other processes and other runs. Needs a `size`.
            options: of `read_manifest`, such as `root`, `labels`, `task`, `class_names`.

        Raises:
            FastpieError: if the manifest cannot be read, or a cache is given without a size.
        """
        if isinstance(source, Manifest):
            if options:
                raise FastpieError(
                    f"Expected the options {sorted(options)} where the manifest is read "
                    "(read_manifest), but got them with one that has been."
                )
            self.manifest = source
        else:
            self.manifest = read_manifest(source, **options)
        self.preprocessing = preprocessing or Preprocessing()
        table = self.manifest.table
        self._paths = Texts(table.column("path"))
        self.sample_ids = Texts(table.column("sample_id"))
        self.class_names = self.manifest.class_names
        self.paths: Sequence[str] = _Names(self.manifest.files, self._paths)
        self._frames = _frames(table)
        # Without a task a column of that name is one of the source, text of any kind.
        self._labels = None if self.manifest.task is None else _label_array(table.column("label"))
        self._images: DecodedImages | None = None
        if cache is not None:
            size = self.preprocessing.size
            if size is None:
                raise FastpieError(
                    "Expected a `size` in the preprocessing of a cached data set: the slots of the "
                    "cache are of one size. Give (height, width), or leave the cache out."
                )
            if not isinstance(cache, ImageCache):
                cache = ImageCache(cache)
            shape = (self.preprocessing.channels, *size)
            self._images = cache.images(self._cache_key(), len(self), shape)

    @property
    def cache(self) -> ImageCache | None:
        """Where decoded images are kept."""
        return None if self._images is None else self._images.cache

    @property
    def labels(self) -> list[int] | Tensor | None:
        """See the class. A new list at each access."""
        if self._labels is None:
            return None
        return self._labels.tolist() if self._labels.ndim == 1 else torch.tensor(self._labels)

    @property
    def fingerprint(self) -> str:
        """Hash of labels and preprocessing: what decides a score besides the files themselves.

        `fastpie.mine` refuses to go on with a run whose data set has another one.
        """
        text = json.dumps([self.class_names, asdict(self.preprocessing)])
        digest = hashlib.sha256(text.encode())
        if self._labels is not None:
            digest.update(f"{self._labels.dtype} {self._labels.shape}".encode())
            digest.update(np.ascontiguousarray(self._labels).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        image, label, sample_id = self.raw(index)
        return self.normalize(image), label, sample_id

    def raw(self, index: int) -> tuple[Tensor, Any, str]:
        """An item with its image as decoded.

        Returns:
            `(image, label, sample_id)`, the image uint8 or uint16 [C, H, W] or [C, D, H, W].

        Raises:
            FastpieError, OSError: if the image cannot be read, see `decode`.
        """
        index = range(len(self))[index]
        label = None if self._labels is None else self._labels[index]
        if label is not None:
            label = torch.tensor(label) if label.ndim else int(label)
        image = torch.from_numpy(self._pixels(index))
        # A grey image in three channels is one plane in the cache; the batch copies it into three.
        image = image.expand(self.preprocessing.channels, *image.shape[1:])
        return image, label, self.sample_ids[index]

    def normalize(self, images: Tensor) -> Tensor:
        """Raw images, one or a batch, as the network takes them; see `Preprocessing.normalize`."""
        return self.preprocessing.normalize(images)

    def _pixels(self, index: int) -> Pixels:
        files, path = self.manifest.files, self._paths[index]
        frame = None if self._frames is None else int(self._frames[index])
        if frame == _NO_FRAME:
            frame = None
        if self._images is None:
            return decode(files.open(path), self.preprocessing, frame)
        stamp = files.stamp(path)  # before the file is read: a change meanwhile is seen next time
        pixels = self._images.get(index, stamp)
        if pixels is None:
            pixels = decode(files.open(path), self.preprocessing, frame)
            self._images.put(index, stamp, pixels)
        return pixels

    def _cache_key(self) -> str:
        """Hash of the list of samples and of what decides their pixels."""
        p = self.preprocessing
        decoders = {n: _version(n) for n in ("pydicom", "nibabel")}
        facts = [
            VERSION,
            PIL.__version__,
            decoders,
            p.size,
            p.channels,
            p.window,
            len(self),
        ]
        if len(self):
            facts.append(self.paths[0])  # says which data root the paths are relative to
        digest = hashlib.sha256(json.dumps(facts).encode())
        for buffer in self._paths.buffers():
            digest.update(buffer.data)
        if self._frames is not None:
            digest.update(self._frames.data)
        return digest.hexdigest()[:32]


class _Names(Sequence[str]):
    """Full names of files, made when they are asked for."""

    def __init__(self, files: Files, paths: Texts) -> None:
        self._files = files
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> _Names: ...
    def __getitem__(self, index: int | slice) -> str | _Names:
        if isinstance(index, slice):
            return _Names(self._files, self._paths[index])
        return self._files.name(self._paths[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._files.name, self._paths)


def _frames(table: pa.Table) -> npt.NDArray[np.int64] | None:
    """Of every sample, `_NO_FRAME` where the manifest names none; None without the column."""
    if "frame" not in table.column_names or not len(table):
        return None
    frames = table.column("frame").fill_null(_NO_FRAME).combine_chunks()
    return np.ascontiguousarray(frames.to_numpy(zero_copy_only=False), dtype=np.int64)


def _label_array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Int64 [N] or fp32 [N, C]."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        flat: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(array), array.type.list_size)
    labels: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return labels


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
