"""Small pictures of samples, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, features
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fastpie.data.texts import Texts
from fastpie.errors import FastpieError
from fastpie.mining.plan import ids_of, known_sample_ids, text_id
from fastpie.mining.reading import Reader, parse_item
from fastpie.mining.result import MiningResult

__all__ = ["Pictures", "Sizes", "picture_of"]

# Up to here a PNG where it fits: the few pixels that there are stay as they are.
_LOSSLESS_SIDE = 64
_KIND = "webp" if features.check("webp") else "jpeg"
# Longer side in pixels and quality, from the best to what can still be told apart.
_STEPS = (
    (448, 80), (352, 80), (256, 80), (208, 80), (160, 80), (128, 78), (112, 76), (96, 74), (80, 70),
    (64, 64), (48, 56), (36, 45),
)  # fmt: skip
_SIDE = 160


class Pictures:
    """The samples of a run in a data set, found by id.

    Attributes:
        note: why there are none, or not of all; empty if there is nothing to say.
    """

    def __init__(
        self,
        dataset: Any,
        result: MiningResult,
        wanted: Collection[str],
        reason: Callable[[BaseException], str] = str,
    ) -> None:
        """Find the wanted samples in the data set, without reading one.

        Args:
            dataset: map-style, or a DataLoader that lends it, or None.
            result: the run, whose ids the data set must have.
            wanted: sample ids.
            reason: what to say of an error of the data set.
        """
        self.note = ""
        self._dataset: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
        self._index: dict[str, int] = {}
        self._raw = False
        if dataset is None:
            self.note = "There are no pictures: the report was written without the data set."
            return
        try:
            self._raw = Reader(self._dataset).raw and hasattr(self._dataset, "raw")
            self._index = self._places(result, sorted(set(wanted)))
        except _OtherDataError as error:
            self.note = f"There are no pictures: {error}"
            return
        except Exception as error:  # a data set is anybody's code
            self.note = f"There are no pictures: {reason(error)}"
            return
        if len(self._index) < len(wanted):
            self.note = (
                f"The data set given holds {len(self._index)} of the {len(wanted)} samples shown."
            )

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._index

    def __len__(self) -> int:
        return len(self._index)

    def read(self, sample_id: str) -> Any:
        """What the model sees of a sample.

        Raises:
            Exception: any, of the data set; FastpieError if it has another sample in this place.
        """
        return self._checked(self._dataset[self._index[sample_id]], sample_id)

    def look(self, sample_id: str) -> Any:
        """What to show of a sample: as it was decoded, where the data set tells that from `read`.

        Raises:
            Exception: see `read`.
        """
        if not self._raw:
            return self.read(sample_id)
        return self._checked(self._dataset.raw(self._index[sample_id]), sample_id)

    def _checked(self, item: Any, sample_id: str) -> Any:
        sample = parse_item(item)
        if sample.sample_id is not None and text_id(sample.sample_id) != sample_id:
            raise FastpieError("the data set has another sample in this place")
        return sample.image

    def _places(self, result: MiningResult, wanted: list[str]) -> dict[str, int]:
        """Where the data set has the samples that it has."""
        count = len(self._dataset)
        known = known_sample_ids(self._dataset)
        ids = None if known is None else ids_of(known)
        stored = result.samples()
        if ids is None:
            if stored and stored.source != "data set" and len(stored.order) == count:
                return _found(wanted, stored.sample_ids, stored.order)
            raise _OtherDataError(
                f"the data set given ({count} samples) names no sample ids, and its indices are not "
                "the ids of the run."
            )
        return _found(wanted, ids, np.arange(count))


class Sizes:
    """Data URIs of pictures, as large as a budget lets them be.

    Every picture gets an equal share of what is left of the budget, so that it is never exceeded.
    """

    def __init__(self, budget: int, count: int, largest: int = _SIDE) -> None:
        """A budget for pictures to come.

        Args:
            budget: characters of all together.
            count: how many will come.
            largest: pixels of the longer side.
        """
        self._left = budget
        self._count = count
        self._steps = [s for s in _STEPS if s[0] <= largest]
        self._step = 0

    def uri(self, picture: Image.Image) -> str | None:
        """The next picture; None if it does not fit even at the smallest size."""
        share = max(self._left, 0) // max(self._count, 1)
        self._count -= 1
        uri = self._encoded(picture, share)
        self._left -= len(uri or "")
        return uri

    def skip(self) -> None:
        """The next picture does not come; the others get its share."""
        self._count -= 1

    def _encoded(self, picture: Image.Image, share: int) -> str | None:
        if max(picture.size) <= _LOSSLESS_SIDE:
            uri = _uri(picture, "png", optimize=True)
            if len(uri) <= share:
                return uri
        # Pictures of one data set are alike: begin with the size that the last one had, or the next
        # larger one, which easy pictures leave room for.
        for step in range(max(self._step - 1, 0), len(self._steps)):
            side, quality = self._steps[step]
            small = picture
            if max(picture.size) > side:
                small = picture.copy()
                small.thumbnail((side, side), Image.Resampling.LANCZOS)
            uri = _uri(small, _KIND, quality=quality)
            if len(uri) <= share:
                self._step = step
                return uri
        return None


class _OtherDataError(FastpieError):
    """A data set that is not the run's; the message names no file."""


def _found(wanted: list[str], ids: Texts, index: np.ndarray) -> dict[str, int]:
    rows = pc.index_in(pa.array(wanted, pa.large_string()), ids.array).to_pylist()
    return {i: int(index[row]) for i, row in zip(wanted, rows, strict=True) if row is not None}


def picture_of(image: Any, side: int = _SIDE) -> Image.Image:
    """A picture of what a model sees.

    Args:
        image: a tensor or array [C, H, W], [H, W] or [C, D, H, W] (the middle slice is taken), or a
            structure of which the first is taken, or a Pillow image. Three channels are red, green
            and blue; of any other number the first is shown. Bytes, 16-bit integers and numbers in
            [0, 1] are shown as they are, others from the lowest to the highest finite value.
        side: pixels of the longer side at most.

    Raises:
        FastpieError: for any other image.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    leaves = [x for x in pytree.tree_leaves(image) if isinstance(x, Tensor | np.ndarray)]
    if not leaves:
        raise FastpieError(f"not a tensor or array but {type(image).__name__}")
    first = leaves[0]
    full = {"torch.uint8": 255, "uint8": 255, "torch.uint16": 65535, "uint16": 65535}
    array = first.detach().float().cpu().numpy() if isinstance(first, Tensor) else first
    array = np.asarray(array, dtype=np.float64) / full.get(str(first.dtype), 1)
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise FastpieError(f"not an image, but of shape {list(first.shape)}")
    if array.shape[0] != 3:
        array = array[:1]
    picture = Image.fromarray(_to_bytes(array))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _to_bytes(array: np.ndarray) -> np.ndarray:  # [1 or 3, H, W] -> uint8 [H, W] or [H, W, 3]
    finite = np.isfinite(array)
    low, high = (array[finite].min(), array[finite].max()) if finite.any() else (0.0, 0.0)
    if finite.any() and low >= 0 and high <= 1:
        scaled = np.where(finite, array, 0.0)
    elif high > low:
        scaled = (np.where(finite, array, low) - low) / (high - low)
    else:
        scaled = np.full(array.shape, 0.5)
    values = np.asarray(scaled * 255 + 0.5, dtype=np.uint8)
    return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
