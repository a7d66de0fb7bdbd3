"""One image file into one normalised tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastpie.errors import FastpieError

__all__ = ["Preprocessing", "decode"]


@dataclass(frozen=True)
class Preprocessing:
    """What happens between the file and the network.

    Attributes:
        size: (height, width) to resize to, bilinear with antialiasing; None keeps the file's.
        mean: subtracted from values in [0, 1], one number or one a channel.
        std: divided by after that, likewise.
        channels: 1 (grey) or 3 (RGB); files of another kind are converted.
    """

    size: tuple[int, int] | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    channels: int = 3

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise FastpieError(f"Expected 1 or 3 channels, but got {self.channels}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise FastpieError(
                    f"Expected `{name}` of 1 or {self.channels} numbers, but got {len(values)}."
                )
        if not all(s > 0 for s in self.std):
            raise FastpieError(f"Expected `std` above 0, but got {list(self.std)}.")
        if self.size is not None and not all(s > 0 for s in self.size):
            raise FastpieError(f"Expected a positive `size`, but got {self.size}.")


def decode(path: Path, preprocessing: Preprocessing) -> Tensor:  # [C, H, W] fp32
    """Read an image that Pillow knows (PNG, JPEG, TIFF, ...).

    8-bit values are divided by 255, 16-bit ones by 65535.

    Raises:
        FastpieError: if the file is empty, or holds floating-point values.
        OSError: if it is missing, truncated or no image (Pillow's own message).
    """
    if path.stat().st_size == 0:
        raise FastpieError(f"Expected an image, but {path.name} is empty (0 bytes).")
    with Image.open(path) as image:
        if image.mode == "F":
            raise FastpieError(
                f"Expected an image of 8 or 16 bits, but {path.name} holds floats, whose range no one "
                "knows."
            )
        if image.mode.startswith("I"):  # 16-bit grey (I;16) opens as 16 or 32-bit integers
            grey = np.asarray(image, dtype=np.float32) / 65535.0
            image = Image.fromarray(grey)  # fp32 becomes mode "F"
            planes = [_resized(image, preprocessing.size)] * preprocessing.channels
        else:
            image = image.convert("L" if preprocessing.channels == 1 else "RGB")
            values = _resized(image, preprocessing.size) / 255.0
            planes = [values] if values.ndim == 2 else list(np.moveaxis(values, -1, 0))
    x = torch.from_numpy(np.stack(planes).astype(np.float32))
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)
    return (x - mean) / std


def _resized(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)
