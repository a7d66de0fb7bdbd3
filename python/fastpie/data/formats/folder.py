"""Images in a folder, and finding images below one by their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fastpie.data.files import FolderFiles
from fastpie.data.formats.columns import class_indices
from fastpie.data.formats.source import Request, Source
from fastpie.errors import FastpieError

__all__ = ["image_suffix", "locate", "read"]

_MEDICAL = (".nii.gz", ".nii", ".dcm", ".dicom")


def image_suffix(name: str) -> str:
    """The ending by which a file is an image (".png", ".nii.gz"), "" for one that is none."""
    lower = name.lower()
    for suffix in _MEDICAL:
        if lower.endswith(suffix):
            return suffix
    suffix = os.path.splitext(lower)[1]  # noqa: PTH122  # a Path a file takes ten times as long
    return suffix if suffix in _pillow_suffixes() else ""


def _pillow_suffixes() -> set[str]:
    if not _known:
        _known.update(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    return _known


_known: set[str] = set()


def read(request: Request) -> Source:
    """Images in sub-folders, one a class; without sub-folders, images without labels."""
    folder: Path = request.source
    files = FolderFiles(folder, request.allow_outside)
    paths = sorted(p for p in _walk(files) if image_suffix(p))
    nested = [p for p in paths if "/" in p]
    if not paths:
        raise FastpieError(
            f"Expected images in sub-folders (one a class) of {folder}, but there are none."
        )
    try:
        column = pa.chunked_array([pa.array(nested or paths, pa.large_string())])
    except UnicodeEncodeError as error:
        raise FastpieError(
            f"Expected names of files in UTF-8 in {folder}, but got {error.object!r}."
        ) from None
    columns = {"sample_id": column, "path": column}
    if not nested:
        return Source(pa.table(columns), files, None, request.class_names)
    classes = pc.replace_substring_regex(column, "(?s)/.*", "")
    names = request.class_names or sorted(pc.unique(classes).to_pylist())
    label, _ = class_indices(classes, names, folder)
    return Source(pa.table({**columns, "label": label}), files, "multiclass", names)


def locate(names: pa.ChunkedArray, files: FolderFiles, *, suffix: str = "") -> pa.ChunkedArray:
    """Paths of images whose folders a label file does not tell, from one walk below the root.

    Args:
        names: file names, or with `suffix` names without their ending.
        files: where they are.
        suffix: of those that are not found.

    Returns:
        large_string [N]; for a file that is not there its name, which fails when it is read.

    Raises:
        FastpieError: if two files have one of the names.
    """
    paths = [p for p in _walk(files) if image_suffix(p)]
    keys = [p.rpartition("/")[2] for p in paths]
    if suffix:
        keys = [k[: len(k) - len(image_suffix(k))] for k in keys]
    known = pa.array(keys, pa.large_string())
    used = pa.array(paths, pa.large_string()).filter(pc.is_in(known, value_set=names))
    found = known.filter(pc.is_in(known, value_set=names))
    if pc.count_distinct(found).as_py() < len(found):
        counts = pc.value_counts(found)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        example = used.filter(pc.equal(found, twice[0])).to_pylist()
        raise FastpieError(
            f"Expected one image of each name below {files.root}, but {len(twice)} are there more "
            f"than once, for example {example[:2]}. Give the folder that holds the right ones as "
            "`root`."
        )
    place = pc.index_in(names, value_set=found)
    missing = _joined(names, suffix) if suffix else names
    return pc.coalesce(used.take(place), missing)


def _joined(names: pa.ChunkedArray, suffix: str) -> pa.ChunkedArray:
    end, nothing = (pa.scalar(s, pa.large_string()) for s in (suffix, ""))
    return pc.binary_join_element_wise(names, end, nothing)


def _walk(files: FolderFiles) -> Iterator[str]:
    """Paths of all files below the root that are not hidden, with "/" between folders, unordered."""
    seen = set()
    root = str(files.root)
    for folder, subfolders, names in os.walk(root, followlinks=files.allow_outside):
        if files.allow_outside:  # links can lead in circles
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders.sort()  # the name under which a folder is seen first must not be chance
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        base = folder[len(root) :].replace(os.sep, "/").strip("/")
        for name in names:
            if name.startswith("."):  # also the ._name.png that macOS leaves
                continue
            yield f"{base}/{name}" if base else name
