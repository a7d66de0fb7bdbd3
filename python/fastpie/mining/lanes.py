"""Copying one batch to a GPU while it computes another and a third is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Lanes"]

_Item = TypeVar("_Item")
_Scores = TypeVar("_Scores")


class Lanes:
    """A stream of a GPU for copies and one for scores, beside the current one; on a CPU neither.

    Attributes:
        device: where the models are.
        ahead: how many batches are computed before the scores of an earlier one are waited for.
    """

    def __init__(self, device: torch.device) -> None:
        """Streams of a device."""
        self.device = device
        self.ahead = 0
        self._copies = self._scores = None
        if device.type == "cuda":
            self.ahead = 1
            self._copies = torch.cuda.Stream(device)
            self._scores = torch.cuda.Stream(device)

    def to_device(self, tree: Any) -> Any:
        """Tensors in pinned memory on the device; the current stream waits for them, nobody else."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.as_subclass(Tensor).to(self.device, non_blocking=True)
            return leaf

        if self._copies is None:
            return pytree.tree_map(move, tree)
        with torch.cuda.stream(self._copies):
            moved = pytree.tree_map(move, tree)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for leaf in pytree.tree_leaves(moved):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                leaf.record_stream(current)
        return moved

    def overlapped(
        self,
        items: Iterable[_Item],
        compute: Callable[[_Item], Any],
        score: Callable[[_Item, Any], _Scores],
    ) -> Iterator[tuple[_Item, _Scores]]:
        """score(item, compute(item)) of each item; the next items are computed meanwhile.

        Args:
            items: batches.
            compute: issues work and does not wait for it.
            score: waits for the result.

        Yields:
            (item, scores), in order.
        """
        waiting: list[tuple[_Item, Any, Any]] = []
        for item in items:
            waiting.append((item, compute(item), self._mark()))
            if len(waiting) > self.ahead:
                yield self._finish(waiting.pop(0), score)
        while waiting:
            yield self._finish(waiting.pop(0), score)

    def _mark(self) -> Any:
        if self._scores is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def _finish(
        self, done: tuple[_Item, Any, Any], score: Callable[[_Item, Any], _Scores]
    ) -> tuple[_Item, _Scores]:
        item, result, mark = done
        context: Any = contextlib.nullcontext()
        if self._scores is not None:
            self._scores.wait_event(mark)  # of this batch, not of those issued since
            context = torch.cuda.stream(self._scores)
        with context:
            return item, score(item, result)
