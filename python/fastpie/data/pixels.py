"""Pixels of any format into what `decode` gives: window, channels, size, round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fastpie.data.preprocessing import Preprocessing
from fastpie.errors import FastpieError

__all__ = [
    "Pixels",
    "check_pixels",
    "from_float_images",
    "from_image",
    "from_values",
    "from_volume",
    "windowed",
]

Pixels = npt.NDArray[np.uint8 | np.uint16]
_Value = TypeVar("_Value", bound=np.generic)
Dtype = type[np.uint8 | np.uint16]
Floats = npt.NDArray[np.float32]


def check_pixels(pixels: int, preprocessing: Preprocessing, name: str) -> None:
    """Refuse a decompression bomb.

    Args:
        pixels: that the header promises.
        preprocessing: whose `max_pixels` counts.
        name: of the file.

    Raises:
        FastpieError: if there are none or too many.
    """
    if pixels < 1:
        raise FastpieError(f"Expected an image, but {name} has no pixels by its header.")
    if pixels > preprocessing.max_pixels:
        raise FastpieError(
            f"Expected at most {preprocessing.max_pixels} pixels (max_pixels), but {name} has "
            f"{pixels} by its header. Raise `max_pixels` if you trust the file."
        )


def windowed(
    values: npt.NDArray[Any], low: float, high: float, maximum: float
) -> Floats:  # same shape, in [0, maximum]
    """Map [low, high] onto [0, maximum] and clip; NaN becomes 0. `low` may lie above `high`."""
    x = np.array(values, dtype=np.float32)
    np.nan_to_num(x, copy=False, nan=low, posinf=np.inf, neginf=-np.inf)
    x -= low
    x *= maximum / (high - low)
    return np.clip(x, 0, maximum, out=x)


def from_image(
    image: Image.Image,  # mode L or RGB, loaded
    preprocessing: Preprocessing,
) -> npt.NDArray[np.uint8]:  # [C, H, W]
    """An 8-bit image, resized by Pillow's integer arithmetic."""
    if preprocessing.channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    if preprocessing.window is not None:
        table = windowed(np.arange(256), *preprocessing.window, 255)
        image = image.point(np.rint(table).astype(int).tolist() * len(image.getbands()))
    size = _size(image, preprocessing)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    array: npt.NDArray[np.uint8] = np.asarray(image)
    # A grey image is resized once, whatever the channels asked for.
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return _channels(planes, preprocessing)


def from_values(
    values: npt.NDArray[Any],  # [H, W] or [H, W, 3], in [0, 255 or 65535]
    preprocessing: Preprocessing,
    dtype: Dtype,
) -> Pixels:  # [C, H, W]
    """Values after the window, resized as floats and rounded once."""
    if values.ndim == 3 and preprocessing.channels == 1:
        values = values @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # as Pillow's "L"
    planes = [values] if values.ndim == 2 else list(np.moveaxis(values, -1, 0))
    images = [Image.fromarray(np.ascontiguousarray(p, dtype=np.float32)) for p in planes]
    return from_float_images(images, preprocessing, dtype)


def from_float_images(
    images: Sequence[Image.Image],  # mode F, 1 or 3 planes, in [0, 255 or 65535]
    preprocessing: Preprocessing,
    dtype: Dtype,
) -> Pixels:  # [C, H, W]
    """`from_values` of what is in Pillow's memory already: its arrays are slow to go in and out."""
    size = _size(images[0], preprocessing)
    if images[0].size != size:
        images = [image.resize(size, Image.Resampling.BILINEAR) for image in images]
    planes = np.stack([np.rint(np.asarray(image)).astype(dtype) for image in images])
    return _channels(planes, preprocessing)


def from_volume(
    values: npt.NDArray[Any],  # [D, H, W], in [0, 255 or 65535]
    preprocessing: Preprocessing,
    dtype: Dtype,
) -> Pixels:  # [C, D, H, W]
    """A volume after the window, resampled (trilinear, no antialiasing) and rounded once."""
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if preprocessing.size is not None and tuple(x.shape) != tuple(preprocessing.size):
        x = torch.nn.functional.interpolate(
            x[None, None], preprocessing.size, mode="trilinear", align_corners=False
        )[0, 0]
    return _channels(np.rint(x.numpy()).astype(dtype)[None], preprocessing)


def _size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height, as Pillow has them."""
    if preprocessing.size is None:
        return image.size
    return preprocessing.size[-1], preprocessing.size[-2]


def _channels(planes: npt.NDArray[_Value], preprocessing: Preprocessing) -> npt.NDArray[_Value]:
    """As many planes as asked for, in memory of their own: torch takes no read-only array."""
    copies = preprocessing.channels if len(planes) == 1 else 1
    return np.repeat(planes, copies, axis=0)
