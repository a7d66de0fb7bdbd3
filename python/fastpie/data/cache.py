"""Decoded images on disk, so that each is decoded once."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastpie.data.pixels import Pixels
from fastpie.errors import FastpieError

__all__ = ["DecodedImages", "ImageCache"]

_PAGE = 4096
_SHARD = 64 << 30  # bytes of a file, holes included: few files to open, none too long for ext4
_ENTRY = struct.Struct("<BBxxxxxxQQ8x")  # bytes a value, planes, stamp, checksum; 0 bytes: empty
_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.uint16}
_ABANDONED = ".evicted-"


class ImageCache:
    """A folder of decoded images: one sub-folder for each list of samples and way to decode them.

    Any number of processes may read and fill it at once, on one machine.

    Attributes:
        folder: made where it is missing.
        limit: bytes on disk that the folder may take. When it is full, sub-folders that no process
            has open go, the one opened longest ago first; then nothing is added: who reads a data
            set from end to end gains nothing from images that push each other out.
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: int | None = None) -> None:
        """Name a cache; nothing is written until an image is.

        Raises:
            FastpieError: for a limit that is not above 0.
        """
        if limit is not None and limit <= 0:
            raise FastpieError(f"Expected `limit` above 0 bytes, but got {limit}.")
        self.folder = Path(folder).absolute()
        self.limit = limit

    def images(self, key: str, count: int, shape: tuple[int, ...]) -> DecodedImages:
        """The slots of a data set.

        Args:
            key: hash of the samples, in order, and of everything that decides their pixels. A name
                of a folder.
            count: of the samples.
            shape: of each, channels first.
        """
        return DecodedImages(self, key, count, shape)

    def used(self) -> int:
        """Bytes on disk of all that lies in the folder."""
        total = 0
        for path in self._files():
            try:
                total += path.stat().st_blocks * 512  # what a file with holes really takes
            except FileNotFoundError:  # evicted meanwhile
                continue
        return total

    def evict(self, wanted: int) -> int:
        """Remove sub-folders that no process has open, the one opened longest ago first.

        Args:
            wanted: bytes to free.

        Returns:
            Bytes freed.
        """
        freed = 0
        for abandoned in self.folder.glob(f"{_ABANDONED}*"):  # by a process that was killed here
            freed += _remove(abandoned)
        opened = []
        for lock in self.folder.glob("[!.]*/lock"):
            with suppress(FileNotFoundError):  # evicted by another process meanwhile
                opened.append((lock.stat().st_mtime_ns, lock))
        for _, lock in sorted(opened):
            if freed >= wanted:
                break
            # flock, not a record lock: a process does not evict what it has open itself.
            with suppress(FileNotFoundError, BlockingIOError), lock.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = self.folder / f"{_ABANDONED}{lock.parent.name}-{os.getpid()}"
                lock.parent.rename(gone)
                freed += _remove(gone)
        return freed

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder):
            yield from (Path(folder, name) for name in names)


class DecodedImages:
    """Slots for the images of one data set.

    `index` holds an entry of 32 bytes for each sample: dtype, planes, hash of the source's stamp and
    checksum of pixels and entry. `pixels-<n>` hold the slots, at a stride of whole pages that has
    room for 16 bits; what an 8-bit or grey image leaves is a hole that takes no space on disk. Files
    have their full length from the start and can be mapped.

    Pixels are written before the entry, without locks: a crash at any instant, two processes that
    write the same slot and a disk that lies leave a slot whose checksum does not fit, which is an
    empty one. Slots are read with `pread` and not through a mapping: that takes 15 µs for 150 kB
    instead of 10 to 19, and a bad sector or a file that somebody cut is an error instead of a SIGBUS
    that kills the process.

    Can be pickled and forked: every process opens the files itself, when it first reads.
    """

    def __init__(self, cache: ImageCache, key: str, count: int, shape: tuple[int, ...]) -> None:
        """See `ImageCache.images`."""
        self.cache = cache
        self.folder = cache.folder / key
        self.count = count
        self.shape = tuple(shape)
        self._plane = math.prod(shape[1:])
        self._stride = -(-2 * math.prod(shape) // _PAGE) * _PAGE
        self._per_shard = max(1, _SHARD // self._stride)
        self._process: int | None = None  # that opened the files
        self._handles: dict[tuple[str, bool], int] | None = None
        self._lock: int | None = None
        self._full = False
        self._allowance = 0  # bytes that may be written before the folder is measured again

    def get(self, index: int, stamp: str) -> Pixels | None:
        """The pixels of a sample, None where they are not there, not whole, or of an older source.

        Where all planes are the same it is one: [1, ...] instead of [C, ...].
        """
        self._ready()
        if self._handles is None:
            return None
        try:
            entry = os.pread(self._handle("index", write=False), _ENTRY.size, index * _ENTRY.size)
            if len(entry) < _ENTRY.size:
                return None
            width, planes, source, checksum = _ENTRY.unpack(entry)
            if width not in _DTYPES or planes not in (1, self.shape[0]) or source != _hash(stamp):
                return None
            pixels: Pixels = np.empty((planes, *self.shape[1:]), dtype=_DTYPES[width])
            shard, offset = self._place(index)
            read = os.preadv(self._handle(shard, write=False), [pixels.data.cast("B")], offset)
        except OSError:  # not there yet, evicted by hand, or unreadable
            return None
        if read < pixels.nbytes or _checksum(pixels, index, width, source) != checksum:
            return None
        return pixels

    def put(self, index: int, stamp: str, pixels: Pixels) -> bool:
        """Keep the pixels of a sample.

        Args:
            index: of the sample.
            stamp: of its source, taken before it was read.
            pixels: as decoded.

        Returns:
            Whether they were kept: not so when the cache or the disk is full, or the folder cannot be
            written to. The latter two warn, once in a process.

        Raises:
            FastpieError: for pixels of another shape.
        """
        if pixels.shape != self.shape or pixels.dtype not in (np.uint8, np.uint16):
            raise FastpieError(
                f"Expected uint8 or uint16 of the shape {list(self.shape)} for the cache, but got "
                f"{pixels.dtype} {list(pixels.shape)}."
            )
        self._ready()
        if self._handles is None or self._full:
            return False
        # A grey image in three channels is one plane.
        same = all(np.array_equal(pixels[0], plane) for plane in pixels[1:])
        pixels = np.ascontiguousarray(pixels[:1] if same else pixels)
        width, source = pixels.itemsize, _hash(stamp)
        checksum = _checksum(pixels, index, width, source)
        entry = _ENTRY.pack(width, len(pixels), source, checksum)
        shard, offset = self._place(index)
        for attempt in (1, 2):
            try:
                if not self._room(pixels.nbytes + _PAGE):
                    self._full = True
                    return False
                _write(self._handle(shard, write=True), pixels.data.cast("B"), offset)
                _write(self._handle("index", write=True), entry, index * _ENTRY.size)
                return True
            except OSError as error:
                unopenable = isinstance(error, IsADirectoryError | PermissionError)
                if attempt == 2 or not unopenable or not self._removed_unreadable(shard):
                    self._give_up(error)
                    return False
        return False

    def __getstate__(self) -> tuple[Any, ...]:
        return self.cache, self.folder.name, self.count, self.shape

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _forget(self) -> None:
        self._process = None
        self._handles = None
        self._lock = None
        self._full = False
        self._allowance = 0

    def _ready(self) -> None:
        """Open the cache in this process: its lock says that it is in use."""
        if self._process == os.getpid():
            return
        self.close()
        self._process = os.getpid()
        try:
            self._lock = self._locked()
        except OSError as error:
            self._give_up(error)
        else:
            self._handles = {}

    def _locked(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "lock"
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # evicted since mkdir
                continue
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a cache that somebody else fills
            # Not by waiting for the lock: while it is held the file may go, and another take its place.
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.fstat(lock).st_ino == path.stat().st_ino:
                    os.utime(lock)  # the order in which caches are evicted
                    return lock
            os.close(lock)
            time.sleep(0.01)

    def close(self) -> None:
        """Close the files and give up the lock; the next read opens them again."""
        handles = [*(self._handles or {}).values(), *([] if self._lock is None else [self._lock])]
        self._forget()
        for handle in handles:
            os.close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        shard, slot = divmod(index, self._per_shard)
        return f"pixels-{shard:05d}", slot * self._stride

    def _handle(self, name: str, *, write: bool) -> int:
        """The file, of its full length once it was opened to write."""
        assert self._handles is not None
        handle = self._handles.get((name, True)) or self._handles.get((name, write))
        if handle is None:
            flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
            handle = os.open(self.folder / name, flags | os.O_CLOEXEC, 0o666)
            self._handles[name, write] = handle
            if write and os.fstat(handle).st_size < self._length(name):
                os.ftruncate(handle, self._length(name))
        return handle

    def _length(self, name: str) -> int:
        if name == "index":
            return self.count * _ENTRY.size
        first = int(name.partition("-")[2]) * self._per_shard
        return min(self._per_shard, self.count - first) * self._stride

    def _room(self, wanted: int) -> bool:
        """Whether the limit allows for as many bytes more."""
        limit = self.cache.limit
        if limit is None:
            return True
        if wanted > self._allowance:
            free = limit - self.cache.used()
            if free < wanted and self.cache.evict(wanted - free):
                free = limit - self.cache.used()
            if free < wanted:
                return False
            # Others write as well: each takes a small part of what is left before it looks again.
            self._allowance = max(wanted, free // 64)
        self._allowance -= wanted
        return True

    def _removed_unreadable(self, shard: str) -> bool:
        """Make way for new files where something lies that cannot be read as one."""
        removed = False
        for path in (self.folder / shard, self.folder / "index"):
            if path.is_dir() or (path.exists() and not os.access(path, os.R_OK)):
                with suppress(OSError):
                    _remove(path)
                    removed = True
        return removed

    def _give_up(self, error: OSError) -> None:
        self._full = True
        warnings.warn(
            f"Nothing is added to the cache {self.folder} any more: {error}. The run goes on and "
            "decodes what is not in it.",
            stacklevel=4,
        )


def _hash(stamp: str) -> int:
    return _xxh3(stamp.encode())


def _checksum(pixels: Pixels, index: int, width: int, source: int) -> int:
    """Of the pixels and of what the entry says of them: one that belongs elsewhere does not fit."""
    seed = _xxh3(struct.pack("<QBBQ", index, width, len(pixels), source))
    return _xxh3(pixels.data.cast("B"), seed)


def _write(handle: int, data: Any, offset: int) -> None:
    """All of it, or an error: a disk that fills up takes a part."""
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _remove(path: Path) -> int:
    """Bytes freed by removing a file or folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    freed = sum(p.stat().st_blocks * 512 for p in files)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return freed


def _xxh3(data: Any, seed: int = 0) -> int:
    """XXH3 of 64 bits. Imported here: who keeps no images can do without the package."""
    import xxhash

    return int(xxhash.xxh3_64_intdigest(data, seed))
