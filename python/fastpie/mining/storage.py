"""Where the files of a run are: a folder of this machine, or a URL that fsspec knows (S3, ...)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from fastpie._files import atomic_path
from fastpie.errors import FastpieError

__all__ = ["LocalStorage", "Storage", "storage_at"]


class Storage(Protocol):
    """Files by name ("scores/part-000000.parquet"). A file is there whole or not at all.

    What goes wrong is an OSError, a file that is not there a FileNotFoundError.

    Attributes:
        location: of the folder, as the user gave it.
        parallel: how many files are best read side by side.
    """

    location: str
    parallel: int

    def file(self, name: str) -> Any:
        """A context with a local path to write to, which becomes the file at its end."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def parquet(self, name: str) -> Any:
        """A context with a `pq.ParquetFile`, opened without reading its rows."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a sub-folder, without it; none where there is no such folder."""

    def filesystem(self) -> tuple[Any, str]:
        """As a `pyarrow.fs.FileSystem`, with the path of the folder there."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    def remove(self, name: str) -> None:
        """Delete a file that is there."""


def storage_at(location: str | os.PathLike[str]) -> Storage:
    """The storage that a path or a URL names.

    Raises:
        FastpieError: for a URL whose protocol is not known, or its package not installed.
    """
    text = os.fspath(location)
    if "://" not in text:
        return LocalStorage(Path(text))
    scheme, _, path = text.partition("://")
    if scheme in ("file", "local"):
        return LocalStorage(Path(path))
    return RemoteStorage(text)


class LocalStorage:
    """A folder: files are written to a temporary name, synced and renamed."""

    parallel = 8

    def __init__(self, path: Path) -> None:
        """A folder, which need not exist yet."""
        self.path = path
        self.location = str(path)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """See `Storage`."""
        target = self.path / name
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            yield temporary

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        return (self.path / name).read_bytes()

    def parquet(self, name: str) -> pq.ParquetFile:
        """See `Storage`."""
        return pq.ParquetFile(self.path / name)

    def names(self, folder: str) -> list[str]:
        """See `Storage`."""
        try:
            return os.listdir(self.path / folder)  # noqa: PTH208 - no object for each of many files
        except FileNotFoundError:
            return []

    def filesystem(self) -> tuple[Any, str]:
        """See `Storage`."""
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(self.path)

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        return (self.path / name).exists()

    def remove(self, name: str) -> None:
        """See `Storage`."""
        (self.path / name).unlink()


class RemoteStorage:
    """A URL: an object store puts a file whole, so nothing is renamed.

    Other processes write there too, so what fsspec remembers of a folder is asked for again.
    """

    parallel = 32  # they wait for answers, not for each other

    def __init__(self, url: str) -> None:
        """A folder of an object store or another machine."""
        import fsspec

        self.location = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise FastpieError(
                f"Expected a folder or a URL that fsspec can open, but got {url!r}: {error}"
            ) from error

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """See `Storage`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            yield path
            with _as_oserror():
                target = self._path(name)
                try:
                    self._fs.put_file(str(path), target)
                except FileNotFoundError:
                    # To make the folders of a misspelt URL would make a bucket.
                    top = target[: target.find("/", 1)]
                    if not self._fs.exists(top):
                        raise
                    self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._fs.put_file(str(path), target)

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        with _as_oserror():
            return bytes(self._fs.cat_file(self._path(name)))

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """See `Storage`."""
        with (
            _as_oserror(),
            self._fs.open(self._path(name), "rb") as source,
            pq.ParquetFile(source) as file,
        ):
            yield file

    def names(self, folder: str) -> list[str]:
        """See `Storage`."""
        with _as_oserror():
            path = self._path(folder)
            self._fs.invalidate_cache(path)
            try:
                found = self._fs.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return [path.rpartition("/")[2] for path in found]

    def filesystem(self) -> tuple[Any, str]:
        """See `Storage`."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self._fs)), str(self._root).rstrip("/")

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        with _as_oserror():
            path = self._path(name)
            self._fs.invalidate_cache(path)
            return bool(self._fs.exists(path))

    def remove(self, name: str) -> None:
        """See `Storage`."""
        with _as_oserror():
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else str(self._root)


@contextmanager
def _as_oserror() -> Iterator[None]:
    """The errors of a store's own client library, which share no class, as OSErrors."""
    try:
        yield
    except (OSError, pa.ArrowException, FastpieError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
