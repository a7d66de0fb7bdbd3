"""`DualEngine`: a frozen dual forward.

This version has one backend, "reference": the two passes of DualModel over a snapshot of the
weights. The fast backends take its place behind the same interface.
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastpie.dual.inputs import as_arguments, batch_size, random_state
from fastpie.dual.output import DualOutput, Features
from fastpie.errors import FastpieError
from fastpie.pruning.masks import Masks

if TYPE_CHECKING:
    from fastpie.dual.model import DualModel

__all__ = ["DualEngine"]

BACKENDS = ("auto", "reference")
PRECISIONS = ("fp32", "bf16")

# Largest deviation from DualModel that is handed out, relative to the largest output. bf16 keeps
# eight bits of each product; 0.1 lets a deep network pass and a wrong weight not.
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}


class DualEngine:
    """Both models on inputs of one kind, eval mode, from a snapshot of weights and masks.

    Made by `DualModel.compile`. Outputs are fresh tensors without gradient. Any batch up to the
    compiled one is taken; later changes of the model do not show until `refresh`.

    Attributes:
        backend: "reference".
        precision: "fp32" or "bf16".
        batch: the largest batch size, that of the example.
    """

    def __init__(
        self, dual: DualModel, x: Any, *, precision: str = "fp32", backend: str = "auto"
    ) -> None:
        """See `DualModel.compile`."""
        if backend not in BACKENDS:
            raise FastpieError(
                f"Expected `backend` to be one of {BACKENDS} (the others come with the compiled "
                f"engines), but got {backend!r}."
            )
        if precision not in PRECISIONS:
            raise FastpieError(
                f"Expected `precision` to be one of {PRECISIONS}, but got {precision!r}."
            )
        self.backend = "reference"
        self.precision = precision
        self._source = dual
        self._example = as_arguments(x)
        self.batch = batch_size(self._example)
        self.refresh()

    def refresh(self, masks: Masks | None = None) -> None:
        """Take a new snapshot of the weights and statistics, with `masks` or else the model's.

        The DualModel is not changed; the old snapshot stays in force if this raises.

        Raises:
            FastpieError: if the masks are another model's or have other levels, or the new
                snapshot does not give what the model gives on the example.
        """
        dual = copy.deepcopy(self._source).eval().requires_grad_(False)
        if masks is not None:
            dual.masks = masks
        states = [dual.pruned_state(i) for i in range(len(dual.sparsities))]
        self._check(dual, states)
        self._dual, self._states = dual, states

    def __call__(self, *args: Any) -> DualOutput:
        """Both models on a batch of at most the compiled size.

        Args:
            *args: the model's positional inputs, like the example's.

        Returns:
            DualOutput, as the DualModel gives it in eval mode.

        Raises:
            FastpieError: for a larger batch, or another number of inputs.
        """
        if len(args) != len(self._example):
            raise FastpieError(
                f"Expected {len(self._example)} inputs, as the example had, but got {len(args)}."
            )
        if batch_size(args) > self.batch:
            raise FastpieError(
                f"Expected a batch of at most {self.batch}, the compiled size, but got "
                f"{batch_size(args)}."
            )
        return self._run(self._dual, self._states, args)[0]

    def report(self) -> list[dict[str, Any]]:
        """What runs and how long it takes, measured now on the example.

        Returns:
            One row for each pass: layer, kernel chosen, seconds, and what it was chosen over.
        """
        self._run(self._dual, self._states, self._example)  # warm up
        seconds = self._run(self._dual, self._states, self._example, timed=True)[1]
        names = ["dense"] + [f"pruned at {s:g}" for s in self._dual.sparsities]
        return [
            {"layer": f"{name}: whole model", "kernel": "torch", "seconds": t, "over": []}
            for name, t in zip(names, seconds, strict=True)
        ]

    def _run(
        self,
        dual: DualModel,
        states: list[dict[str, Tensor]],
        args: tuple[Any, ...],
        *,
        timed: bool = False,
    ) -> tuple[DualOutput, list[float]]:
        """The outputs, and with `timed` the seconds of each pass."""
        outputs: list[Any] = []
        seconds = []
        restore = random_state(args)
        with torch.no_grad(), self._autocast(args), dual.watch_features() as seen:
            for state in [None, *states]:
                restore()
                if timed:
                    _wait_for_device(args)
                start = time.perf_counter()
                if state is None:
                    outputs.append(dual.model(*args))
                else:
                    outputs.append(dual.run_pruned(state, args))
                if timed:
                    _wait_for_device(args)
                seconds.append(time.perf_counter() - start)
        features = None if seen is None else Features(seen[0], dual.stack_levels(seen[1:]))
        return DualOutput(outputs[0], dual.stack_levels(outputs[1:]), features), seconds

    def _autocast(self, args: Any) -> AbstractContextManager[Any]:
        """bf16 where the engine is; fp32 also inside an autocast of the caller."""
        device = next(t.device for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _check(self, dual: DualModel, states: list[dict[str, Tensor]]) -> None:
        """Hold the engine to DualModel on the example."""
        restore = random_state(self._example)
        device = next(t.device for t in pytree.tree_leaves(self._example) if isinstance(t, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            expected = dual(*self._example)
        restore()
        got = self._run(dual, states, self._example)[0]
        tolerance = _TOLERANCE[self.precision]
        for want, have in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
            if not isinstance(want, Tensor) or not want.is_floating_point() or not want.numel():
                continue
            want, have = want.double(), have.double()
            if not torch.equal(want.isfinite(), have.isfinite()):
                raise FastpieError(
                    "Expected the engine to give finite outputs where the model does, but it does "
                    "not on the example."
                )
            scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
            error = ((have - want).nan_to_num(0, 0, 0).abs().max() / scale).item()
            if error > tolerance:
                raise FastpieError(
                    f"Expected the engine to match the model to {tolerance:g} on the example, but "
                    f"it differs by {error:.3g}."
                )


def _wait_for_device(args: tuple[Any, ...]) -> None:
    for device in {t.device for t in pytree.tree_leaves(args) if isinstance(t, Tensor)}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
