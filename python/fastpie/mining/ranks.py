"""The processes that share a run, where `torch.distributed` is initialised; else this one alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastpie.errors import FastpieError

__all__ = ["Ranks"]

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # until the slowest process has done its share


class Ranks:
    """This process among those of the run.

    They exchange a few small objects over gloo, whatever the backend of the group; scores go to the
    run folder alone.

    Attributes:
        rank: of this process.
        count: of processes.
    """

    def __init__(self) -> None:
        """Join the processes of the default group."""
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.count = dist.get_world_size() if joined else 1
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def first(self, action: Callable[[], _T]) -> _T:
        """Do something on rank 0 and give its result, or the error it raised, to all.

        Raises:
            FastpieError: what rank 0 raised.
        """
        if self.count == 1:
            return action()
        message: list[Any] = [None, None]
        raised: BaseException | None = None
        if self.rank == 0:
            try:
                message[0] = action()
            except BaseException as error:
                raised = error
                message = [None, str(error) or type(error).__name__]
        dist.broadcast_object_list(message, src=0, group=self._group)
        if raised is not None:
            raise raised
        if message[1] is not None:
            raise FastpieError(f"Rank 0 could not go on: {message[1]}")
        result: _T = message[0]
        return result

    def all(self, value: _T) -> list[_T]:
        """What every process gives, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def gather(self, value: _T) -> list[_T]:
        """What every process gives, by rank, on rank 0; nothing on the others."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self._group)
        return found or []

    def sum(self, values: list[int]) -> list[int]:
        """Sums over the processes, element by element: the cheapest of the exchanges."""
        if self.count == 1:
            return values
        sums = torch.tensor(values)
        dist.all_reduce(sums, group=self._group)
        found: list[int] = sums.tolist()
        return found

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Leave the group of this run."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
