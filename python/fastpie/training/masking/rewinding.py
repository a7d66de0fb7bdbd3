"""`RewindPoint`: a training as it was after some step, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpie.nn import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear

__all__ = ["RewindPoint"]

_MASKED = (MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear)


class RewindPoint:
    """Copies of a model's tensors, of its optimizer and of what follows that, schedulers above all.

    Taken in two parts: the model and the optimizer's state when a step is done, the learning rate
    just before the next one, since a scheduler goes on in between.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        others: Sequence[Any],
        *,
        step: int,
        weights: bool,
    ) -> None:
        """Keep nothing as yet, but for the weights where `step` is 0.

        Args:
            model: whose parameters and buffers are kept.
            optimizer: of it.
            others: what has `state_dict` and `load_state_dict` and follows the optimizer.
            step: after which to keep them.
            weights: whether weights, buffers and the optimizer's state go back too.
        """
        self._model, self._optimizer, self._others = model, optimizer, others
        self._step, self._weights = step, weights
        self._kept: dict[str, Any] = {}
        self.after_step(0)

    @property
    def is_complete(self) -> bool:
        """Whether all is there to go back to."""
        return "groups" in self._kept and ("model" in self._kept or not self._weights)

    def after_step(self, step: int) -> None:
        """Copy parameters, buffers and the optimizer's state if this is the step."""
        if self._weights and step == self._step and "model" not in self._kept:
            self._kept["model"] = {k: v.detach().clone() for k, v in self._tensors().items()}
            self._kept["state"] = copy.deepcopy(self._optimizer.state_dict()["state"])

    def before_step(self, step: int) -> None:
        """Copy the optimizer's groups and the others' states if that was the step."""
        if step == self._step and "groups" not in self._kept:
            self._kept["groups"] = copy.deepcopy(self._optimizer.state_dict()["param_groups"])
            self._kept["others"] = [copy.deepcopy(other.state_dict()) for other in self._others]

    def go_back(self) -> None:
        """Be as kept; what is kept stays for later rounds."""
        groups = copy.deepcopy(self._kept["groups"])
        # load_state_dict takes tensors over where they fit, and steps write into them.
        state = (
            copy.deepcopy(self._kept["state"])
            if self._weights
            else self._optimizer.state_dict()["state"]
        )
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for other, kept in zip(self._others, self._kept["others"], strict=True):
            other.load_state_dict(copy.deepcopy(kept))
        if self._weights:
            tensors = self._tensors()
            with torch.no_grad():
                for name, kept in self._kept["model"].items():
                    tensors[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, itself."""
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was kept elsewhere."""
        self._kept = copy.deepcopy(state)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, but for masks, which are not those of the step."""
        masks = {
            f"{name}.mask".lstrip(".")
            for name, module in self._model.named_modules()
            if isinstance(module, _MASKED)
        }
        buffers = {k: v for k, v in self._model.named_buffers() if k not in masks}
        return {**dict(self._model.named_parameters()), **buffers}
