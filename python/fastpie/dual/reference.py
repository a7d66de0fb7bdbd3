"""The reference backend: the two passes of DualModel over a snapshot of the weights."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastpie.dual.inputs import random_state

if TYPE_CHECKING:
    from fastpie.dual.model import DualModel

__all__ = ["Reference", "device_of"]


class Reference:
    """DualModel in eval mode, frozen."""

    def __init__(self, dual: DualModel, precision: str) -> None:
        """Take a snapshot of `dual`."""
        self._dual = copy.deepcopy(dual).eval().requires_grad_(False)
        self._precision = precision
        self._states = [self._dual.pruned_state(i) for i in range(len(dual.sparsities))]

    def refreshed(self, dual: DualModel) -> Reference:
        """The same with the present weights and masks of `dual`."""
        return Reference(dual, self._precision)

    def run(
        self, args: tuple[Any, ...], seconds: list[float] | None = None
    ) -> list[tuple[Any, Any]]:
        """Output and feature of each model; `seconds` gains the time of each pass."""
        results: list[tuple[Any, Any]] = []
        restore = random_state(args)
        dtype = torch.float16 if self._precision == "fp16" else torch.bfloat16
        autocast = torch.autocast(device_of(args).type, dtype, enabled=self._precision != "fp32")
        with torch.no_grad(), autocast, self._dual.watch_features() as seen:
            for state in [None, *self._states]:
                restore()
                _wait_for_device(args)
                start = time.perf_counter()
                if state is None:
                    output = self._dual.model(*args)
                else:
                    output = self._dual.run_pruned(state, args)
                _wait_for_device(args)
                if seconds is not None:
                    seconds.append(time.perf_counter() - start)
                results.append((output, None if seen is None else seen[-1]))
        return [pytree.tree_map(_full_precision, result) for result in results]

    def report(self, args: tuple[Any, ...], names: list[str]) -> list[dict[str, Any]]:
        """One row for each pass; see DualEngine.report."""
        self.run(args)  # warm up
        seconds: list[float] = []
        self.run(args, seconds)
        return [
            {
                "model": name,
                "layer": f"{name}: whole model",
                "kernel": "torch",
                "seconds": t,
                "over": [],
            }
            for name, t in zip(names, seconds, strict=True)
        ]


def device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of the first tensor among the arguments."""
    return next(t.device for t in pytree.tree_leaves(args) if isinstance(t, Tensor))


def _full_precision(leaf: Any) -> Any:
    """Scores are taken in fp32: what autocast left in bf16 or fp16 becomes fp32."""
    if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16):
        return leaf.float()
    return leaf


def _wait_for_device(args: tuple[Any, ...]) -> None:
    for device in {t.device for t in pytree.tree_leaves(args) if isinstance(t, Tensor)}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
