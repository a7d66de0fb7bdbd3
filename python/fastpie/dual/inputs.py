"""From what a caller or a DataLoader gives to the positional arguments of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastpie.errors import FastpieError

__all__ = ["as_arguments", "batch_size", "of_batch", "random_state"]


def as_arguments(x: Any) -> tuple[Any, ...]:
    """A tuple is spread over the positional arguments; anything else is the only one."""
    return x if isinstance(x, tuple) else (x,)


def of_batch(batch: Any) -> tuple[Any, ...]:
    """The model's arguments in a batch of a DataLoader.

    The value of "image" of a dict, the first element of a list or tuple, or the batch itself.
    """
    if isinstance(batch, dict):
        if "image" not in batch:
            raise FastpieError(f"Expected a batch with the key 'image', but got {list(batch)}.")
        batch = batch["image"]
    elif isinstance(batch, list | tuple):
        if not batch:
            raise FastpieError("Expected a batch with an input, but got an empty one.")
        batch = batch[0]
        if isinstance(batch, list):  # a DataLoader collates a tuple of inputs to a list
            batch = tuple(batch)
    return as_arguments(batch)


def batch_size(args: tuple[Any, ...]) -> int:
    """Length of the first dimension of the first tensor among the arguments."""
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise FastpieError("Expected an input with a tensor of at least one dimension.")


def random_state(inputs: Any) -> Any:
    """A function that puts the random generators back to where they are now.

    The CPU's, and those of the devices that the inputs live on.
    """
    cpu = torch.get_rng_state()
    devices = {t.device for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)}
    modules = {d: torch.get_device_module(d) for d in devices if d.type not in ("cpu", "meta")}
    states = {d: module.get_rng_state(d) for d, module in modules.items()}

    def restore() -> None:
        torch.set_rng_state(cpu)
        for device, state in states.items():
            modules[device].set_rng_state(state, device)

    return restore
