"""What must be the same for a training to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpie._digest import digest_of
from fastpie.errors import FastpieError
from fastpie.mining.plan import digest_of_ids, fingerprint_of, ids_of, known_sample_ids

__all__ = ["check_configuration", "configuration_of", "digest_of_draws"]


def configuration_of(
    objective: nn.Module, dataset: Any, optimizer: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be the same for a training to go on: plain values by name.

    Args:
        objective: with what is trained.
        dataset: to train on.
        optimizer: before its first step.
        options: others, plain values.
    """
    state = objective.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}
    ids = known_sample_ids(dataset)
    groups = [
        {
            # A scheduler changes `lr` and keeps where it began.
            **{k: _plain(v) for k, v in group.items() if k not in ("params", "initial_lr")},
            "lr": _plain(group.get("initial_lr", group["lr"])),
            "params": [list(p.shape) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    criterion = getattr(objective, "criterion", None)
    return {
        **options,
        "objective": _name(objective),
        "criterion": None if criterion is None else _name(criterion),
        "parameters and buffers": shapes,
        "optimizer": _name(optimizer),
        "optimizer's options": groups,
        "samples": len(dataset),
        "sample ids": None if ids is None else digest_of_ids(ids_of(ids)),
        "labels and preprocessing": fingerprint_of(dataset),
    }


def digest_of_draws(weights: Any) -> str:
    """Hash of the weights that samples are drawn by."""
    values = torch.as_tensor(weights, dtype=torch.float64)
    return digest_of({"draw_weights": values})


def check_configuration(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Whether a training in a folder is the one that is to go on.

    Raises:
        FastpieError: with what differs.
    """
    different = [k for k in {**saved, **own} if saved.get(k) != own.get(k)]
    if different:
        what = "; ".join(
            f"{k}: {_short(saved.get(k))} there, {_short(own.get(k))} now" for k in different
        )
        raise FastpieError(
            f"Expected the training that was begun in {path}, but it differs in {what}. Choose "
            "another folder, or remove this one."
        )


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
