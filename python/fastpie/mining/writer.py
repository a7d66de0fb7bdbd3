"""Writing a part while the next one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import Self

__all__ = ["Writer"]


class Writer:
    """One thread that does what it is given, in order, at most one thing ahead.

    What a task raises is raised by the next call of `submit`, or at the end of the block; nothing
    after it is done.
    """

    def __init__(self) -> None:
        """Nothing is begun before the block is entered."""
        self._tasks: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="fastpie-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tasks.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def submit(self, task: Callable[[], Any]) -> None:
        """Have something done; waits while another thing is in hand and a second one is waiting."""
        self._check()
        self._tasks.put(task)

    def _check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while (task := self._tasks.get()) is not None:
            if failed:
                continue
            try:
                task()
            except BaseException as error:
                self._error, failed = error, True
