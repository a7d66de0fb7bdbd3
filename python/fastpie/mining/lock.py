"""One writer for each stretch of a run."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastpie.errors import FastpieError

__all__ = ["RunLock"]

_LENGTH = 2**40  # bytes of the lock file that stand for the whole run; the file itself stays empty
_SETUP = _LENGTH  # the byte behind them: held while a run is begun or taken up
_GATE = _LENGTH + 1  # held for an instant, to take a share or to look for others
_END = _LENGTH + 2  # held while what is said of the whole run is written
_POLL_SECONDS = 0.1
_INSTANT = 0.001


class _Held:
    """What this process holds of one lock file.

    A lock of the process, not of the open file (flock): reading processes that outlive a killed run
    would hold on to the latter. It does not keep out other threads, hence `ranges`, and closing any
    handle of the file drops it, hence one handle for all.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.ranges: list[tuple[int, int]] = []  # start, stop
        self.users = 0


_held: dict[str, _Held] = {}
_guard = threading.Lock()


class RunLock:
    """A share `(i, n)` of a run, kept from other runs; the whole of it is (0, 1).

    Shares are ranges of bytes of the file `.lock`, so that those of different n exclude each other
    exactly where they overlap. Locks of a process that ends in any way are gone.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        """Nothing is locked yet."""
        self.folder = folder
        index, count = share
        self._range = index * _LENGTH // count, (index + 1) * _LENGTH // count
        self._key = str(folder.resolve())
        self._held: _Held | None = None

    def acquire(self) -> None:
        """Take the share.

        Raises:
            FastpieError: if another run holds some of it.
        """
        held = self._open()
        try:
            with self._waiting_for(held, _GATE):
                free = self._take(held, self._range)
            if not free:
                raise FastpieError(
                    f"Expected {self.folder} for this run alone, but another run is writing to it. "
                    "Wait for its end or stop it, or choose another folder; runs that share a folder "
                    "need shards that do not overlap."
                )
        except BaseException:
            self._close(held)
            raise
        self._held = held

    @contextmanager
    def set_up(self) -> Iterator[bool]:
        """Hold off the set-up of other shares, after those before; gives whether there are others."""
        held = self._held
        assert held is not None
        with self._waiting_for(held, _SETUP):
            # Looking takes what is free for an instant, which must not refuse a run that begins.
            with self._waiting_for(held, _GATE):
                others = self._others(held)
            yield others

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Hold off the end of other shares, after those before."""
        assert self._held is not None
        with self._waiting_for(self._held, _END):
            yield

    @contextmanager
    def _waiting_for(self, held: _Held, byte: int) -> Iterator[None]:
        while not self._take(held, (byte, byte + 1)):
            time.sleep(_INSTANT if byte == _GATE else _POLL_SECONDS)
        try:
            yield
        finally:
            self._give_back(held, (byte, byte + 1))

    def _others(self, held: _Held) -> bool:
        others = False
        for rest in ((0, self._range[0]), (self._range[1], _LENGTH)):
            if rest[0] < rest[1]:
                free = self._take(held, rest)
                others |= not free
                if free:
                    self._give_back(held, rest)
        return others

    def release(self) -> None:
        """Let other runs in."""
        if self._held is not None:
            self._give_back(self._held, self._range)
            self._close(self._held)
            self._held = None

    def _open(self) -> _Held:
        with _guard:
            if self._key not in _held:
                try:
                    _held[self._key] = _Held((self.folder / ".lock").open("w"))
                except OSError as error:
                    raise FastpieError(
                        f"Expected a folder that can be locked, but {self.folder}: {error}"
                    ) from error
            held = _held[self._key]
            held.users += 1
            return held

    def _close(self, held: _Held) -> None:
        with _guard:
            held.users -= 1
            if not held.users:
                del _held[self._key]
                held.file.close()

    def _take(self, held: _Held, wanted: tuple[int, int]) -> bool:
        start, stop = wanted
        with _guard:
            if any(start < b and a < stop for a, b in held.ranges):
                return False
            try:
                fcntl.lockf(held.file, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - start, start)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise FastpieError(
                    f"Expected a file system with locks, but {self.folder / '.lock'}: {error}"
                ) from error
            held.ranges.append(wanted)
            return True

    def _give_back(self, held: _Held, taken: tuple[int, int]) -> None:
        with _guard:
            held.ranges.remove(taken)
            fcntl.lockf(held.file, fcntl.LOCK_UN, taken[1] - taken[0], taken[0])
