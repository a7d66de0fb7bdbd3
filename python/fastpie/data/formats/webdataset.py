"""WebDataset: samples in tar files, the members of one sample side by side under one key.

The naming of members is that of the webdataset library: `key.jpg`, `key.cls`, `key.json`; the key
ends at the first dot of the file name. Only headers, .cls and .json are read.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastpie.data.files import FolderFiles, TarFiles
from fastpie.data.formats.columns import ATTRIBUTES, attributes, table_of
from fastpie.data.formats.folder import image_suffix
from fastpie.data.formats.source import Request, Source, shorten
from fastpie.data.formats.table import labels_of
from fastpie.errors import FastpieError

__all__ = ["find", "is_pattern", "read"]

_META_BYTES = 16 << 20  # a .cls or .json beyond that is none
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_pattern(source: str) -> bool:
    """Whether a string names shards: a .tar, with {000..012}, {a,b}, * or ?."""
    return source.endswith(".tar")


def find(folder: Path) -> bool:
    """Whether the folder holds shards."""
    return any(folder.glob("*.tar"))


def read(request: Request) -> Source:
    """Index the shards."""
    shards = _shards(request.source)
    default = Path(os.path.commonpath([p.parent for p in shards]))
    files = TarFiles(request.folder(default))
    # .cls is the usual label; of .json only what is asked for is kept.
    wanted = ["cls", *_named(request), *(a for a in ATTRIBUTES if getattr(request, a) is None)]
    columns: dict[str, list[Any]] = {n: [] for n in ("sample_id", "path", *wanted)}
    seen = {"sample_id", "path"}  # and the keys that some sample has
    for shard in shards:
        name = _name_below(shard, files.shards)
        for key, image, meta in _samples(shard, name):
            columns["sample_id"].append(key)
            columns["path"].append(image)
            seen.update(meta)
            for column in dict.fromkeys(wanted):
                columns[column].append(meta.get(column))
    table = pa.table({n: _typed(v) for n, v in columns.items() if n in seen})
    if request.labels is None and "cls" in table.column_names:
        request = replace(request, labels="cls")
    label, task, class_names = labels_of(table, request, request.source)
    found = attributes(table, request, request.source)
    if label is not None:
        found["label"] = label
    first = {n: table.column(n) for n in ("sample_id", "path")}
    return Source(table_of({**first, **found}, table), files, task, class_names)


def _named(request: Request) -> list[str]:
    """The keys of .json that the request names, which have to be there."""
    labels = [request.labels] if isinstance(request.labels, str) else list(request.labels or ())
    named = (getattr(request, attribute) for attribute in ATTRIBUTES)
    return labels + [name for name in named if name is not None]


def _typed(values: list[Any]) -> pa.Array:
    texts = (int(v) if isinstance(v, bool) else v for v in values)
    try:
        return pa.array([None if v is None else str(v) for v in texts], pa.large_string())
    except UnicodeEncodeError as error:
        raise FastpieError(
            f"Expected text in UTF-8 in the shards, but got {error.object!r}."
        ) from None


def _shards(source: Any) -> list[Path]:
    if isinstance(source, list | tuple):
        return [shard for item in source for shard in _shards(item)]
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.exists():
        found = [path]
    else:
        names = list(_expanded(str(source)))
        found = []
        for name in names:
            matching = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
            found += [Path(p) for p in matching]
        missing = [str(p) for p in found if not p.is_file()]
        if missing:
            raise FastpieError(
                f"Expected the {len(found)} shards of {source}, but {len(missing)} are not there, "
                f"for example {missing[:3]}."
            )
    if not found:
        raise FastpieError(f"Expected .tar files in {source}, but there are none.")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """data-{000..012}.tar and {train,val}.tar, as a shell does it."""
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices: list[list[str]] = []
    for i, piece in enumerate(pieces):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if i % 2 == 0:
            choices.append([piece])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            choices.append([str(n).zfill(len(numbers[1])) for n in range(first, last + 1)])
        else:
            choices.append(piece.split(","))
    return map("".join, itertools.product(*choices))


def _name_below(shard: Path, files: FolderFiles) -> str:
    files.open(str(shard.absolute()))  # a shard outside the root is refused before it is read
    name = os.path.relpath(shard.absolute(), files.root)
    if name.startswith(".."):  # below the root through a link, or allowed outside
        name = str(shard.absolute())
    if "::" in name:
        raise FastpieError(f"Expected the name of a shard without '::', but got {name!r}.")
    return name


def _samples(shard: Path, name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, path of the image, and what .cls and .json say, of each sample."""
    key: str | None = None
    image: str | None = None
    meta: dict[str, Any] = {}
    for member, content in _members(shard):
        folder, _, base = member.name.rpartition("/")
        if base.startswith(("__", ".")):
            continue
        stem, _, ending = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key:
            if key is not None:
                yield key, image or TarFiles.path(name, 0, 0, key), meta
            key, image, meta = this, None, {}
        if content is not None:
            _read_meta(ending.lower(), content, meta, f"{shard}::{member.name}")
        elif image_suffix(f"x.{ending}") == f".{ending.lower()}":
            if image is not None:
                raise FastpieError(
                    f"Expected one image a sample in {shard}, but {key!r} has {image.rpartition('::')[2]} "
                    f"and {member.name}."
                )
            image = TarFiles.path(name, member.offset_data, member.size, member.name)
    if key is not None:
        yield key, image or TarFiles.path(name, 0, 0, key), meta


def _read_meta(ending: str, content: bytes, meta: dict[str, Any], where: str) -> None:
    try:
        word = content.decode()
        if ending == "cls":
            meta["cls"] = word.strip()
            return
        values = json.loads(word)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FastpieError(f"Expected text in UTF-8 or JSON in {where}, but: {error}") from error
    if not isinstance(values, dict):
        raise FastpieError(f"Expected a JSON object in {where}, but got {shorten(word, 80)}.")
    meta.update({k: v for k, v in values.items() if v is None or isinstance(v, str | int | float)})


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Regular members in order, with the content of .cls and .json.

    Raises:
        FastpieError: if the file is no uncompressed tar, or is cut.
    """
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps millions of them
                if member.offset_data + member.size > size:
                    raise FastpieError(_cut(shard, f"{member.name} is not whole"))
                if not member.isreg() or member.issparse():
                    continue
                content = None
                if member.name.lower().endswith((".cls", ".json")) and member.size <= _META_BYTES:
                    stream = tar.extractfile(member)
                    content = b"" if stream is None else stream.read()
                yield member, content
            end = tar.offset
        # tarfile takes any garbage for the end; a whole archive ends in two blocks of zeros.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(1024) != bytes(1024):
                raise FastpieError(_cut(shard, f"no end of archive at byte {end}"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FastpieError(_cut(shard, str(error))) from error


def _cut(shard: Path, reason: str) -> str:
    return (
        f"Expected a whole, uncompressed tar at {shard}, but: {reason}. If it is truncated, copy it "
        "again; if it is compressed, unpack it with gunzip or zstd -d."
    )
