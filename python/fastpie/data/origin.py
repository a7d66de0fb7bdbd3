"""The files of a saved manifest, opened again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpie.data.files import Files, FolderFiles, TarFiles
from fastpie.data.formats.huggingface import open_saved
from fastpie.errors import FastpieError

__all__ = ["files_from"]


def files_from(
    origin: Mapping[str, Any], root: str | os.PathLike[str] | None, allow_outside: bool
) -> Files:
    """The files that a saved manifest names.

    Args:
        origin: what `origin()` of the files gave.
        root: where they are now, by default where they were.
        allow_outside: as of `FolderFiles`; never taken from the manifest, which may come from
            somebody else.

    Raises:
        FastpieError: if the origin is not known, or the data set is not there.
    """
    kind = origin.get("kind")
    if kind == "huggingface":
        root = root or origin["root"]
        folder = None if root is None else FolderFiles(Path(root), allow_outside)
        return open_saved(Path(origin["saved"]), origin["column"], folder)
    folder = FolderFiles(Path(root or origin["root"]), allow_outside)
    if kind == "folder":
        return folder
    if kind == "tar":
        return TarFiles(folder)
    raise FastpieError(
        f"Expected a manifest of files in a folder, a tar or a data set, but got one of {kind!r}: a "
        "newer fastpie wrote it. Pass `files`."
    )
