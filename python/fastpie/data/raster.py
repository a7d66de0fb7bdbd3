"""PNG, JPEG, TIFF and the like, by Pillow."""

from __future__ import annotations

from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fastpie.data.pixels import (
    Pixels,
    check_pixels,
    from_float_images,
    from_image,
    from_values,
    windowed,
)
from fastpie.data.preprocessing import Preprocessing
from fastpie.errors import FastpieError

__all__ = ["FORMATS", "read_raster"]

# The others are no photographs, or call programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF


def read_raster(
    stream: IO[bytes], preprocessing: Preprocessing, frame: int | None, name: str
) -> Pixels:  # [C, H, W]
    """Read an image of one of `FORMATS`.

    The orientation that EXIF gives is applied. Grey values of more than 8 bits stay uint16; colours
    of 16 bits a channel become 8, since Pillow reads no more of them.

    Raises:
        FastpieError: if the content is none of these formats, or its values have no known range.
        OSError: if it is truncated (Pillow's own message).
    """
    if preprocessing.volumes:
        raise FastpieError(
            f"Expected a volume (NIfTI or multi-frame DICOM) for `size` {preprocessing.size}, but "
            f"{name} is an image. Give (height, width)."
        )
    if Image.MAX_IMAGE_PIXELS and preprocessing.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = (
            preprocessing.max_pixels
        )  # Pillow would refuse what the user allows
    try:
        image: Image.Image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:  # its message holds a memory address
        raise FastpieError(
            f"Expected an image ({', '.join(FORMATS)}, DICOM or NIfTI), but the content of {name} is "
            "none."
        ) from None
    except Image.DecompressionBombError:
        raise FastpieError(
            f"Expected at most {preprocessing.max_pixels} pixels (max_pixels), but {name} has more by "
            "its header. Raise `max_pixels` if you trust the file."
        ) from None
    with image:
        if frame:
            count = getattr(image, "n_frames", 1)
            if frame >= count:
                raise FastpieError(
                    f"Expected one of {count} frames of {name}, but got frame {frame}."
                )
            image.seek(frame)
        check_pixels(image.width * image.height, preprocessing, name)
        tags = getattr(image, "tag_v2", {})  # of a TIFF; gone once it is loaded
        bits, photometric = tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC)
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            plain = image.mode.startswith("I;16") and bits == 16 and photometric != 0
            if plain and preprocessing.window is None:
                return from_float_images([image.convert("F")], preprocessing, np.uint16)
            values = _deep_values(image, bits, photometric == 0, preprocessing, name)
            return from_values(values, preprocessing, np.uint16)
        image.info.pop("transparency", None)  # left out, as alpha is; Pillow would warn of it
        grey = image.mode in ("1", "L", "LA", "La") or preprocessing.channels == 1
        return from_image(image.convert("L" if grey else "RGB"), preprocessing)


def _deep_values(
    image: Image.Image, bits: int, inverted: bool, preprocessing: Preprocessing, name: str
) -> npt.NDArray[Any]:  # [H, W], in [0, 65535]
    """Grey values of more than 8 bits."""
    values = np.asarray(image)
    if preprocessing.window is not None:
        values = windowed(values, *preprocessing.window, 65535)
    elif image.mode == "F":
        raise FastpieError(
            f"Expected an image of 8 or 16 bits, but {name} holds floats, whose range no one knows. "
            "Give the range as `window`."
        )
    elif image.mode == "I" and not 0 <= values.min() <= values.max() <= 65535:
        raise FastpieError(
            f"Expected grey values of 0 to 65535, but {name} holds {values.min()} to {values.max()}. "
            "Give the range as `window`."
        )
    elif bits < 16:  # 12-bit TIFF
        values = windowed(values, 0, 2**bits - 1, 65535)
    return 65535 - values.astype(np.float32) if inverted else values


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds; a block that cannot be read says nothing
        return 1
