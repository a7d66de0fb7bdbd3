"""How the path of a sample is opened: a file on disk, a member of a tar, a row of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastpie.errors import FastpieError

__all__ = ["Files", "FolderFiles", "HuggingFaceFiles", "TarFiles"]


@runtime_checkable
class Files(Protocol):
    """What a manifest needs to know of where its images are."""

    def open(self, path: str) -> Path | bytes:
        """The file, checked to lie inside the data root, or the content.

        Raises:
            FastpieError: if the path leads outside the root or is no path.
            OSError: if there is no such file.
        """

    def stamp(self, path: str) -> str:
        """Changes when the content does; tells without reading it. Raises as `open` does."""

    def name(self, path: str) -> str:
        """For errors and reports; raises nothing."""


@dataclass(frozen=True)
class FolderFiles:
    """Files on disk.

    Attributes:
        root: the folder that relative paths are relative to, and that no path may leave, neither
            by "..", nor as an absolute path, nor through a symbolic link.
        allow_outside: let them.
    """

    root: Path
    allow_outside: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).resolve())

    def open(self, path: str) -> Path:
        """See `Files.open`."""
        if not path:
            raise FastpieError("Expected the path of an image, but it is empty.")
        try:
            full = (self.root / path).resolve()
        except (ValueError, RuntimeError, OSError) as error:  # a NUL byte, a loop of links
            raise FastpieError(
                f"Expected the path of a file, but got {path[:200]!r}: {error}"
            ) from error
        if not self.allow_outside and not full.is_relative_to(self.root):
            raise FastpieError(
                f"Expected a path inside the data root {self.root}, but got {full}. Give the folder "
                "that holds all images as `root`, or pass allow_outside=True for a manifest you trust."
            )
        return full

    def stamp(self, path: str) -> str:
        """Size and modification time in ns."""
        status = self.open(path).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def name(self, path: str) -> str:
        """The full path."""
        return str(self.root / path)

    def origin(self) -> dict[str, Any]:
        """What `fastpie.data.origin.files_from` makes this again of."""
        return {"kind": "folder", "root": str(self.root)}


@dataclass(frozen=True)
class TarFiles:
    """Members of uncompressed tar files, read by seeking.

    A path is `shard::offset+size::member`: it says where the bytes are, so that no index of millions
    of members is kept.

    Attributes:
        shards: the tar files.
    """

    shards: FolderFiles

    @staticmethod
    def path(shard: str, offset: int, size: int, member: str) -> str:
        """The path of a member; offset and size in bytes. Size 0 stands for a member not there."""
        return f"{shard}::{offset}+{size}::{member}"

    def open(self, path: str) -> bytes:
        """See `Files.open`."""
        shard, offset, size, member = self._parsed(path)
        if size == 0:
            raise FastpieError(
                f"Expected an image in {self.name(path)}, but it has none (0 bytes)."
            )
        with self.shards.open(shard).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise FastpieError(
                f"Expected {size} bytes of {member} in {shard}, but the file ends after "
                f"{len(content)}: it has changed since it was indexed. Read the manifest again."
            )
        return content

    def stamp(self, path: str) -> str:
        """Size and modification time of the tar, and the place in it."""
        shard, offset, size, _ = self._parsed(path)
        return f"{self.shards.stamp(shard)}-{offset}+{size}"

    def name(self, path: str) -> str:
        """`tar::member`."""
        shard, _, rest = path.partition("::")
        return f"{self.shards.name(shard)}::{rest.partition('::')[2]}"

    def origin(self) -> dict[str, Any]:
        """What `fastpie.data.origin.files_from` makes this again of."""
        return {"kind": "tar", "root": str(self.shards.root)}

    def _parsed(self, path: str) -> tuple[str, int, int, str]:
        try:
            shard, place, member = path.split("::", 2)
            offset, size = place.split("+")
            return shard, int(offset), int(size), member
        except ValueError:
            raise FastpieError(
                f"Expected a path shard::offset+size::member, but got {path[:200]!r}."
            ) from None


@dataclass(frozen=True)
class HuggingFaceFiles:
    """Rows of Hugging Face data sets. A path is `row`, or `split::row` where there are splits.

    Attributes:
        parts: `datasets.Dataset` by split, "" for one without; only the image column, not decoded.
        column: its name.
        folder: where files lie that rows name instead of holding their bytes; None refuses them.
        saved: the folder that the data set was loaded from, None for one in memory.
    """

    parts: Mapping[str, Any]
    column: str
    folder: FolderFiles | None = None
    saved: Path | None = None
    _embedded: bool = field(init=False, repr=False, default=True)

    def __post_init__(self) -> None:
        # Whether bytes are there is in the validity bitmap: no image is read for it.
        embedded = all(
            chunk.field("bytes").null_count == 0
            for part in self.parts.values()
            for chunk in part.data.column(self.column).chunks
        )
        object.__setattr__(self, "_embedded", embedded)

    def open(self, path: str) -> Path | bytes:
        """See `Files.open`."""
        cell = self._cell(path)
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        return self._folder(path).open(cell["path"] or "")

    def stamp(self, path: str) -> str:
        """The data set's fingerprint and the row; of a file on disk its own stamp."""
        if not self._embedded:
            cell = self._cell(path)
            if cell["bytes"] is None:
                return self._folder(path).stamp(cell["path"] or "")
        split, _, row = path.rpartition("::")
        return f"{self.parts[split]._fingerprint}-{row}"

    def name(self, path: str) -> str:
        """The data set's folder, split and row."""
        return f"{self.saved or 'huggingface'}::{path}"

    def origin(self) -> dict[str, Any]:
        """What `fastpie.data.origin.files_from` makes this again of.

        Raises:
            FastpieError: for a data set in memory.
        """
        if self.saved is None:
            raise FastpieError(
                "Expected a manifest whose images are on disk, but got one of a data set in memory. "
                "Save the data set with save_to_disk and read the manifest from that folder."
            )
        root = None if self.folder is None else str(self.folder.root)
        return {
            "kind": "huggingface",
            "saved": str(self.saved),
            "column": self.column,
            "root": root,
        }

    def _cell(self, path: str) -> Any:
        split, _, row = path.rpartition("::")
        if split not in self.parts or not row.isdecimal():
            raise FastpieError(f"Expected a row of the data set, but got {path[:200]!r}.")
        if int(row) >= len(self.parts[split]):
            raise FastpieError(f"Expected one of {len(self.parts[split])} rows, but got {row}.")
        cell = self.parts[split][int(row)][self.column]
        if cell is None:
            raise FastpieError(f"Expected an image in {self.name(path)}, but the cell is empty.")
        return cell

    def _folder(self, path: str) -> FolderFiles:
        if self.folder is None:
            raise FastpieError(
                f"Expected the bytes of an image in {self.name(path)}, but it names a file. Give the "
                "folder of the files as `root`."
            )
        return self.folder
