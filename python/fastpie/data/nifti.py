"""NIfTI, by nibabel."""

from __future__ import annotations

import gzip
import math
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastpie._extras import load_extra
from fastpie.data.pixels import Pixels, check_pixels, from_values, from_volume, windowed
from fastpie.data.preprocessing import Preprocessing
from fastpie.errors import FastpieError

__all__ = ["read_nifti"]

_HEADER = 540  # bytes of the longer header, of NIfTI-2


def read_nifti(
    stream: IO[bytes], preprocessing: Preprocessing, frame: int | None, name: str
) -> Pixels:  # [C, H, W] or [C, D, H, W]
    """Read a NIfTI volume (.nii, .nii.gz), or a slice of it.

    In canonical orientation, laid out as DICOM shows axial slices: depth from feet to head, the
    first row anterior, the first column at the patient's right. Slope and intercept are applied;
    the window is `preprocessing.window`, else cal_min and cal_max of the header, else the least and
    largest finite value of the volume (for which all of it is read). NaN becomes 0. Files of 8-bit
    values give uint8, others uint16.

    Raises:
        FastpieError: if it is no NIfTI file, has more than three dimensions or more voxels than
            `max_pixels`, or a slice must be chosen.
        OSError: if it is truncated.
    """
    nibabel = load_extra("nibabel", "medical", "NIfTI files")
    zipped = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    content: Any = gzip.GzipFile(fileobj=stream) if zipped else stream
    head = content.read(_HEADER)
    content.seek(0)
    if head[344:348] == b"n+1\0":
        image = nibabel.Nifti1Image.from_stream(content)
    elif head[4:7] == b"n+2":
        image = nibabel.Nifti2Image.from_stream(content)
    else:
        raise FastpieError(
            f"Expected a NIfTI file in one piece (.nii, .nii.gz), but the content of {name} is none."
        )
    shape = _shape(image, name)
    check_pixels(math.prod(shape), preprocessing, name)
    kind = image.get_data_dtype()
    if kind.fields is not None or kind.kind not in "iuf":
        raise FastpieError(f"Expected numbers in {name}, but got voxels of {kind}.")

    # Which axis of the file is x, y and z of the canonical image, and whether it runs the same way.
    axes = nibabel.io_orientation(image.affine)
    if np.isnan(axes).any():  # an affine that lets an axis vanish
        raise FastpieError(f"Expected an affine in {name} that can be inverted, but it cannot.")
    flat = shape[2] == 1 and not preprocessing.volumes  # one slice, whichever way it lies
    depth = 1 if flat else shape[int(np.argmax(axes[:, 0] == 2))]
    part = slice(None) if preprocessing.volumes else _slice(frame, depth, name)
    if flat:
        part = slice(None)
    window = _window(image, preprocessing)
    if window is None:
        volume = _read(image, shape, axes, slice(None))
        finite = volume[np.isfinite(volume)]
        if not finite.size:
            raise FastpieError(f"Expected finite values in {name}, but there are none.")
        window = (float(finite.min()), float(finite.max()))
        values = volume[part]
    else:
        values = _read(image, shape, axes, part)
    dtype, maximum = (np.uint8, 255.0) if kind.itemsize == 1 else (np.uint16, 65535.0)
    low, high = window
    if low == high:  # a constant volume is black
        high = low + 1
    values = windowed(values, low, high, maximum)
    if preprocessing.volumes:
        return from_volume(values, preprocessing, dtype)
    across = 2 - int(axes[2, 0]) if flat else 0
    return from_values(np.take(values, 0, across), preprocessing, dtype)


def _shape(image: Any, name: str) -> tuple[int, int, int]:
    """Of three dimensions; those after them may have length 1."""
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise FastpieError(
            f"Expected a volume of three dimensions, but {name} has {list(shape)}. Split it into one "
            "file for each time or channel."
        )
    if len(shape) < 2:
        raise FastpieError(
            f"Expected an image or a volume, but {name} has the shape {list(shape)}."
        )
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _slice(frame: int | None, depth: int, name: str) -> slice:
    if frame is None and depth > 1:
        raise FastpieError(
            f"Expected one slice, but {name} holds {depth}. Name one in a column `frame` of the "
            "manifest, or give `size` as (depth, height, width) to read the volume."
        )
    frame = frame or 0
    if frame >= depth:
        raise FastpieError(f"Expected one of {depth} slices of {name}, but got frame {frame}.")
    return slice(frame, frame + 1)


def _window(image: Any, preprocessing: Preprocessing) -> tuple[float, float] | None:
    if preprocessing.window is not None:
        return preprocessing.window
    low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None


def _read(
    image: Any,
    shape: tuple[int, int, int],
    axes: npt.NDArray[Any],  # [3, 2], as nibabel's io_orientation gives them
    part: slice,
) -> npt.NDArray[np.float32]:  # [D, H, W]
    """Some slices, scaled, in the layout of `read_nifti`; only they are read."""
    from nibabel.orientations import apply_orientation

    axis = int(np.argmax(axes[:, 0] == 2))
    start, stop, _ = part.indices(shape[axis])
    if axes[axis, 1] < 0:  # the file's slices run from head to feet
        start, stop = shape[axis] - stop, shape[axis] - start
    where = [slice(None)] * len(image.shape)
    if axis < len(where):
        where[axis] = slice(start, stop)
    values = np.asarray(image.dataobj[tuple(where)], dtype=np.float32)
    size = [n if i != axis else stop - start for i, n in enumerate(shape)]
    canonical = apply_orientation(values.reshape(size), axes)  # [x, y, z]
    return np.ascontiguousarray(canonical.transpose(2, 1, 0)[:, ::-1, ::-1])
