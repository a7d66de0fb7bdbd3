"""One image file into one array of integers."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import IO

from fastpie.data.pixels import Pixels
from fastpie.data.preprocessing import Preprocessing
from fastpie.data.raster import read_raster
from fastpie.errors import FastpieError

__all__ = ["VERSION", "Preprocessing", "decode"]

VERSION = 1  # of the pixels that a file gives: caches made by another one are not read

_HEAD = 1024


def decode(
    file: Path | bytes, preprocessing: Preprocessing, frame: int | None = None
) -> Pixels:  # [C, H, W], of volumes [C, D, H, W]
    """Read an image: decode, window, resize, round.

    PNG, JPEG, TIFF, BMP, GIF, PPM, WebP, JPEG 2000 (Pillow), DICOM (pydicom) and NIfTI (nibabel),
    told apart by their content; what bits the file has is kept:

    - 8-bit files give uint8;
    - deeper ones give uint16, scaled to the full range.

    `preprocessing.normalize(torch.from_numpy(...))` is what the network takes.

    Args:
        file: its path, or its content.
        preprocessing: size, channels and window; `max_pixels` is checked before a pixel is decoded.
        frame: of a multi-frame DICOM file, a TIFF or a GIF; of a NIfTI volume the index along the
            last axis (from feet to head). Volumes read for a `size` of three numbers take none.

    Returns:
        A contiguous array of its own.

    Raises:
        FastpieError: if the file is empty, of no known format, too large, damaged, or of a kind that
            needs a choice (a frame, a window); the message says which. Also if the library that
            reads it is not installed.
        OSError: if it is missing or truncated.
    """
    name = file.name if isinstance(file, Path) else "the file"
    with _open(file, name) as stream:
        head = stream.read(_HEAD)
        if not head:
            raise FastpieError(f"Expected an image, but {name} is empty (0 bytes).")
        stream.seek(0)
        try:
            return _read(stream, head, preprocessing, frame, name)
        except (FastpieError, OSError, MemoryError):
            raise
        except Exception as error:  # each library has its own kinds of errors for damaged files
            raise FastpieError(
                f"Expected a readable image, but {name} is damaged: {type(error).__name__}: {error}"
            ) from error


def _open(file: Path | bytes, name: str) -> IO[bytes]:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    if not stat.S_ISREG(file.stat().st_mode):  # to open a named pipe would wait for its writer
        raise FastpieError(f"Expected an image file, but {name} is a folder or a device.")
    return file.open("rb")


def _read(
    stream: IO[bytes], head: bytes, preprocessing: Preprocessing, frame: int | None, name: str
) -> Pixels:
    if frame is not None and frame < 0:
        raise FastpieError(f"Expected a frame of 0 or more, but got {frame} for {name}.")
    if frame is not None and preprocessing.volumes:
        raise FastpieError(
            f"Expected no frame for a `size` of (depth, height, width), but got frame {frame} of "
            f"{name}. Give (height, width) to read single frames."
        )
    if is_dicom(head, name):
        from fastpie.data.dicom import read_dicom

        return read_dicom(stream, preprocessing, frame, name)
    if is_nifti(head):
        from fastpie.data.nifti import read_nifti

        return read_nifti(stream, preprocessing, frame, name)
    return read_raster(stream, preprocessing, frame, name)


def is_dicom(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` is DICOM; old ones have no preamble."""
    if head[128:132] == b"DICM" or Path(name).suffix.lower() in (".dcm", ".dicom"):
        return True
    return head[:2] in (b"\x02\x00", b"\x08\x00")  # the first group; no other format begins so


def is_nifti(head: bytes) -> bool:
    """Whether it is NIfTI-1 or 2, in one file or two, or gzip, which only NIfTI is stored in."""
    pair = (b"n+1\0", b"ni1\0")
    return head[:2] == b"\x1f\x8b" or head[344:348] in pair or head[4:7] in (b"n+2", b"ni2")
