"""One file a format: each recognises its data sets and reads them into the columns of a manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastpie.data.formats import (
    chexpert,
    cxr_lt,
    folder,
    huggingface,
    isic,
    nih,
    table,
    webdataset,
)
from fastpie.data.formats.columns import ATTRIBUTES
from fastpie.data.formats.source import Request, Source, header_of
from fastpie.errors import FastpieError

__all__ = ["FORMATS", "Format", "check_options", "recognise"]


class Format(NamedTuple):
    """A reader and the arguments of `read_manifest` that mean something to it."""

    read: Callable[[Request], Source]
    takes: frozenset[str]


_OWN = frozenset({"labels", "path_column", *ATTRIBUTES})
FORMATS = {
    "nih": Format(nih.read, frozenset()),
    "cxr-lt": Format(cxr_lt.read, frozenset()),
    "chexpert": Format(chexpert.read, frozenset({"uncertain", "unmentioned"})),
    "isic": Format(isic.read, frozenset({"groups"})),
    "table": Format(table.read, _OWN),
    "folder": Format(folder.read, frozenset()),
    "webdataset": Format(webdataset.read, _OWN - {"path_column"}),
    "huggingface": Format(huggingface.read, _OWN),
}
_BY_HEADER = {"nih": nih, "cxr-lt": cxr_lt, "chexpert": chexpert, "isic": isic}
_BY_FOLDER = {"huggingface": huggingface, "webdataset": webdataset, **_BY_HEADER}


def recognise(request: Request) -> str:
    """The format of a source, by its columns or files.

    Raises:
        FastpieError: if there is nothing, or a file with columns of no known format.
    """
    source = request.source
    if huggingface.is_dataset(source):
        return "huggingface"
    if isinstance(source, list | tuple):
        return "webdataset"
    if not isinstance(source, Path):
        raise FastpieError(
            f"Expected the path of a manifest, or a datasets.Dataset, but got {type(source).__name__}."
        )
    if source.is_dir():
        return next((n for n, f in _BY_FOLDER.items() if f.find(source)), "folder")
    if webdataset.is_pattern(os.fspath(source)):
        return "webdataset"
    header = header_of(source)
    if request.labels is None:  # who names labels reads the file as a table
        known = next((n for n, f in _BY_HEADER.items() if f.matches(header)), None)
        if known is not None:
            return known
    if request.path_column not in header:
        raise FastpieError(
            f"Expected a column {request.path_column!r} of paths in {source}, or the columns of one "
            f"of {list(_BY_HEADER)}, but it has {header[:40]}. Name the column of paths by "
            "`path_column`, or the kind of file by `format`."
        )
    return "table"


def check_options(name: str, given: dict[str, Any]) -> None:
    """Refuse arguments that the format would ignore."""
    odd = sorted(given.keys() - FORMATS[name].takes)
    if odd:
        raise FastpieError(
            f"Expected only {sorted(FORMATS[name].takes)} of the options of formats for {name!r}, "
            f"but got {odd}. To read the file as a table of your own pass format='table'."
        )
