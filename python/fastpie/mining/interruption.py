"""SIGTERM and Ctrl-C as a request: finish the batch, keep what is scored, then end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

__all__ = ["Interruption"]

_SAME_REQUEST_SECONDS = 1.0


class Interruption:
    """While entered, the first SIGTERM or SIGINT only sets `requested`; a later one ends at once.

    One within a second is the same request: a batch system that signals every process reaches the
    ranks of torchrun twice, by itself and by torchrun.

    At the end the caller's handlers are back, and the signal that came is raised again, also when
    finishing the batch failed: a process ends as it would have, later by a batch. Outside the main
    thread Python handles no signals, and this does nothing.

    Attributes:
        requested: whether to stop.
    """

    def __init__(self) -> None:
        """Nothing is caught yet."""
        self.requested = False
        self._signal: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        if self._signal is None or not (error is None or isinstance(error, Exception)):
            return  # no signal, or a second one
        if error is not None and signal.getsignal(self._signal) == signal.SIG_DFL:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        signal.raise_signal(self._signal)
        raise SystemExit(128 + self._signal)  # the caller's handler returned

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self.requested = True
            self._signal, self._since = number, now
        elif now - self._since > _SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
