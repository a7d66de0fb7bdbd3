"""DICOM, by pydicom: stored values to what a viewer would show."""

from __future__ import annotations

from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastpie._extras import how_to_install, load_extra
from fastpie.data.pixels import (
    Pixels,
    check_pixels,
    from_image,
    from_values,
    from_volume,
    windowed,
)
from fastpie.data.preprocessing import Preprocessing
from fastpie.errors import FastpieError

__all__ = ["read_dicom"]

# What decides how stored values are shown. Enhanced objects have some of it frame by frame, in the
# sequences below (DICOM PS3.3 C.7.6.16.2).
_DISPLAY = (
    "PhotometricInterpretation",
    "BitsStored",
    "PixelRepresentation",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
)
_FRAME_DISPLAY = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_dicom(
    stream: IO[bytes], preprocessing: Preprocessing, frame: int | None, name: str
) -> Pixels:  # [C, H, W] or [C, D, H, W]
    """Read a DICOM image or volume.

    Modality LUT or rescale, then `preprocessing.window` or else the file's VOI LUT or (first)
    window, then MONOCHROME1 inverted (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2). A file without a window
    keeps the whole range of its stored bits: give a window for CT. Palettes and YBR become RGB.
    Up to 8 bits stored give uint8, more uint16. Frames of a volume are in the file's order.

    Raises:
        FastpieError: if it holds no pixels or more than allowed, a frame must be chosen, or no
            decoder for its compression is installed.
    """
    pydicom = load_extra("pydicom", "medical", "DICOM files")
    try:
        data = pydicom.dcmread(stream, force=True)
    except Exception as error:  # pydicom has its own kinds for damaged files
        raise FastpieError(
            f"Expected a DICOM file, but {name} cannot be read: {type(error).__name__}: {error}"
        ) from error
    frames = _frames(data, preprocessing, frame, name)
    _check_decoder(data, name)
    bits = int(data.get("BitsStored") or 16)
    dtype, maximum = (np.uint8, 255.0) if bits <= 8 else (np.uint16, 65535.0)
    photometric = str(data.PhotometricInterpretation)
    if preprocessing.volumes:
        if int(data.SamplesPerPixel) != 1 or photometric == "PALETTE COLOR":
            raise FastpieError(f"Expected a grey volume, but {name} holds colours ({photometric}).")
        shape = (len(frames), int(data.Rows), int(data.Columns))
        volume = np.empty(shape, dtype=np.float32)
        for i in frames:
            volume[i] = _grey(_stored(data, i, name), data, i, preprocessing, maximum, name)
        return from_volume(volume, preprocessing, dtype)
    stored = _stored(data, frames[0], name)
    if photometric == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        stored = apply_color_lut(stored, data)
        bits = 8 * stored.dtype.itemsize
    if stored.ndim == 2:
        values = _grey(stored, data, frames[0], preprocessing, maximum, name)
        return from_values(values, preprocessing, dtype)
    if stored.dtype == np.uint8:
        return from_image(Image.fromarray(stored), preprocessing)
    low, high = preprocessing.window or (0, 2**bits - 1)
    return from_values(windowed(stored, low, high, 65535), preprocessing, np.uint16)


def _frames(data: Any, preprocessing: Preprocessing, frame: int | None, name: str) -> range:
    """The frames to decode, by the header alone."""
    pixels = [k for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if k in data]
    if not pixels:
        raise FastpieError(
            f"Expected a DICOM image, but {name} holds no PixelData "
            f"({data.get('SOPClassUID', 'no SOP class')!s})."
        )
    count = int(data.get("NumberOfFrames") or 1)
    if preprocessing.volumes:
        if count == 1:
            raise FastpieError(
                f"Expected a multi-frame DICOM file for `size` {preprocessing.size}, but {name} "
                "holds one frame. Give (height, width)."
            )
        frames = range(count)
    elif frame is None and count > 1:
        raise FastpieError(
            f"Expected one frame, but {name} holds {count}. Name one in a column `frame` of the "
            "manifest, or give `size` as (depth, height, width) to read the volume."
        )
    else:
        frame = frame or 0
        if frame >= count:
            raise FastpieError(f"Expected one of {count} frames of {name}, but got frame {frame}.")
        frames = range(frame, frame + 1)
    plane = int(data.get("Rows") or 0) * int(data.get("Columns") or 0)
    check_pixels(plane * len(frames), preprocessing, name)
    return frames


def _check_decoder(data: Any, name: str) -> None:
    """Say which extra is missing; a file without a header of its own is uncompressed."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not data.file_meta.get("TransferSyntaxUID"):
        implicit = data.original_encoding[0]
        data.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        )
    syntax = data.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise FastpieError(
            f"Expected pixels that pydicom can decode, but {name} is stored as {syntax.name}."
        ) from None
    if not available:
        raise FastpieError(
            f"Expected a decoder for {syntax.name}, in which {name} is stored, but none is "
            f"installed. {how_to_install('medical')}"
        )


def _stored(data: Any, frame: int, name: str) -> npt.NDArray[Any]:  # [H, W] or [H, W, 3]
    """Decompressed values of a frame; YBR as RGB."""
    from pydicom.pixels import pixel_array

    try:
        array: npt.NDArray[Any] = pixel_array(data, index=frame)
    except Exception as error:
        syntax = data.file_meta.TransferSyntaxUID
        hint = (
            f" If the decoder is missing: {how_to_install('medical')}"
            if syntax.is_compressed
            else ""
        )
        raise FastpieError(
            f"Expected readable pixels ({syntax.name}), but in {name}: {error}{hint}"
        ) from error
    return array


def _grey(
    stored: npt.NDArray[Any],  # [H, W]
    data: Any,
    frame: int,
    preprocessing: Preprocessing,
    maximum: float,
    name: str,
) -> npt.NDArray[np.float32]:  # [H, W], in [0, maximum]
    """Stored values through modality LUT, window and polarity."""
    display = _display(data, frame)
    if stored.dtype.kind == "f" and preprocessing.window is None:
        raise FastpieError(
            f"Expected integers, but {name} holds floats, whose range no one knows. Give the range "
            "as `window`."
        )

    def shown(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        rescaled, low, high = _rescaled(values, display, preprocessing)
        result = windowed(rescaled, low, high, maximum)
        return maximum - result if display.PhotometricInterpretation == "MONOCHROME1" else result

    if stored.dtype.kind == "f" or stored.dtype.itemsize > 2:
        return shown(stored)
    # Value by value: a table of what occurs is much smaller than the image.
    low = int(stored.min())
    table = shown(np.arange(low, int(stored.max()) + 1))
    result: npt.NDArray[np.float32] = np.take(table, np.subtract(stored, low, dtype=np.int32))
    return result


def _display(data: Any, frame: int) -> Any:
    """A data set of what decides how the frame is shown."""
    from pydicom import Dataset

    display = Dataset()
    display.file_meta = data.file_meta
    groups = list(data.get("SharedFunctionalGroupsSequence") or ())
    groups += list(data.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
    items = [item for g in groups for k in _FRAME_DISPLAY for item in g.get(k) or ()]
    for source in (data, *items):
        for keyword in _DISPLAY:
            if source.get(keyword) not in (None, ""):
                display.add(source[keyword])
    return display


def _rescaled(
    values: npt.NDArray[Any], display: Any, preprocessing: Preprocessing
) -> tuple[npt.NDArray[Any], float, float]:
    """Values after modality LUT and VOI LUT or window, and which of them are black and white."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    modality = apply_modality_lut(values, display)
    if preprocessing.window is not None:
        return modality, *preprocessing.window
    if display.get("VOILUTSequence"):
        voi = apply_voi(np.rint(modality).astype(np.int64), display)  # a LUT is indexed by integers
        return voi, 0, 2 ** int(display.VOILUTSequence[0].LUTDescriptor[2]) - 1
    if "WindowCenter" in display and "WindowWidth" in display:
        low, high = apply_windowing(np.array([-np.inf, np.inf]), display)
        return apply_windowing(modality, display), low, high
    if display.get("ModalityLUTSequence"):
        return modality, 0, 2 ** int(display.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits = int(display.BitsStored)
    stored = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if display.PixelRepresentation
        else (0, 2**bits - 1)
    )
    low, high = sorted(apply_modality_lut(np.array(stored), display))
    return modality, low, high
