"""The checkpoint of a training: whole or not there, of tensors and plain values, of one configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastpie._files import atomic_path
from fastpie.errors import FastpieError

__all__ = ["read_checkpoint", "write_checkpoint", "write_weights"]

_FORMAT = "fastpie-training-1"


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that a crash at any instant leaves whole, this one or the one before.

    Args:
        path: of the file.
        state: tensors, numbers, text, lists and dicts.

    Raises:
        FastpieError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            torch.save({"format": _FORMAT, **state}, temporary)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise FastpieError(f"Expected to write the checkpoint {path}, but: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, on the CPU; None where there is none. Nothing is unpickled but plain values.

    Raises:
        FastpieError: for a file of anything else.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of other files torch's reader raises whatever it comes to
        raise FastpieError(f"Expected a checkpoint in {path}, but: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise FastpieError(f"Expected a checkpoint of a Trainer in {path}, but got another file.")
    return state


def write_weights(path: Path, model: nn.Module) -> None:
    """Write parameters and buffers as safetensors, those that share memory each as its own."""
    state = model.state_dict()
    named = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in named.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
    except OSError as error:
        raise FastpieError(f"Expected to write the weights {path}, but: {error}") from error
