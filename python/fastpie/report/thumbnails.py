"""Small pictures of samples, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fastpie.data.texts import Texts
from fastpie.errors import FastpieError
from fastpie.mining.plan import ids_of, known_sample_ids
from fastpie.mining.reading import parse_item
from fastpie.mining.result import MiningResult

__all__ = ["Thumbnails", "picture_of"]

_SIDE = 160  # pixels of the longer side
_LOSSLESS_SIDE = 64  # up to here a PNG: JPEG smears the few pixels that there are
# Characters of all thumbnails together: the file stays under 20 MB whatever the texts beside them.
_BUDGET = 9_000_000


class Thumbnails:
    """Thumbnails of the samples of a run.

    Attributes:
        note: why there are none, or not of all; empty if there is nothing to say.
    """

    def __init__(self, dataset: Any, result: MiningResult, wanted: Collection[str]) -> None:
        """Find the wanted samples in the data set, without reading one.

        Args:
            dataset: map-style, or a DataLoader that lends it, or None.
            result: the run, whose ids the data set must have.
            wanted: sample ids.
        """
        self.note = ""
        self._dataset: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
        self._index: dict[str, int] = {}
        self._left = _BUDGET
        if dataset is None:
            self.note = "There are no pictures: the report was written without the data set."
            return
        try:
            self._index = self._places(result, sorted(set(wanted)))
        except Exception as error:  # a data set is anybody's code
            self.note = f"There are no pictures: {error}"
            return
        if len(self._index) < len(wanted):
            self.note = (
                f"The data set given holds {len(self._index)} of the {len(wanted)} samples shown."
            )

    @property
    def found(self) -> bool:
        """Whether the data set has any of the samples."""
        return bool(self._index)

    def uri(self, sample_id: str) -> tuple[str | None, str]:
        """The data URI of a sample, or None and the reason why there is none."""
        if sample_id not in self._index:
            return None, "no picture"
        if self._left <= 0:
            self.note = "Not every sample has its picture: the file would grow beyond 20 MB."
            return None, "left out for size"
        try:
            item = parse_item(self._dataset[self._index[sample_id]])
            if item.sample_id is not None and str(item.sample_id) != sample_id:
                raise FastpieError("the data set has another sample in this place")
            uri = _encode(picture_of(item.image))
        except Exception as error:  # a data set is anybody's code, and a bad file no reason to stop
            return None, f"cannot be shown: {str(error) or type(error).__name__}"
        self._left -= len(uri)
        return uri, ""

    def _places(self, result: MiningResult, wanted: list[str]) -> dict[str, int]:
        """Where the data set has the samples that it has."""
        count = len(self._dataset)
        known = known_sample_ids(self._dataset)
        ids = None if known is None else ids_of(known)
        stored = result.samples()
        if ids is None:
            if stored and stored.source != "data set" and len(stored.order) == count:
                return _found(wanted, stored.sample_ids, stored.order)
            raise FastpieError(
                f"the data set given ({count} samples) names no sample ids, and its indices are not "
                "the ids of the run."
            )
        return _found(wanted, ids, np.arange(count))


def _found(wanted: list[str], ids: Texts, index: np.ndarray) -> dict[str, int]:
    rows = pc.index_in(pa.array(wanted, pa.large_string()), ids.array).to_pylist()
    return {i: int(index[row]) for i, row in zip(wanted, rows, strict=True) if row is not None}


def picture_of(image: Any) -> Image.Image:
    """A picture of what a model sees.

    Args:
        image: a tensor or array [C, H, W], [H, W] or [C, D, H, W] (the middle slice is taken), or a
            structure of which the first is taken, or a Pillow image. Three channels are red, green
            and blue; of any other number the first is shown. Scaled from its lowest to its highest
            finite value.

    Returns:
        The picture, at most 160 pixels wide and high.

    Raises:
        FastpieError: for any other image.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    leaves = [x for x in pytree.tree_leaves(image) if isinstance(x, Tensor | np.ndarray)]
    if not leaves:
        raise FastpieError(f"not a tensor or array but {type(image).__name__}")
    first = leaves[0]
    array = first.detach().float().cpu().numpy() if isinstance(first, Tensor) else first
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise FastpieError(f"not an image, but of shape {list(first.shape)}")
    if array.shape[0] != 3:
        array = array[:1]
    picture = Image.fromarray(_to_bytes(np.asarray(array, dtype=np.float64)))
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return picture


def _to_bytes(array: np.ndarray) -> np.ndarray:  # [1 or 3, H, W] -> uint8 [H, W] or [H, W, 3]
    finite = np.isfinite(array)
    low, high = (array[finite].min(), array[finite].max()) if finite.any() else (0.0, 0.0)
    if high > low:
        scaled = (np.where(finite, array, low) - low) / (high - low)
    else:
        scaled = np.full(array.shape, 0.5)
    values = np.asarray(scaled * 255 + 0.5, dtype=np.uint8)
    return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))


def _encode(picture: Image.Image) -> str:
    kind = "png" if max(picture.size) <= _LOSSLESS_SIDE else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
