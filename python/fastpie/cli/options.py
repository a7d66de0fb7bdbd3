"""What the command line's options mean: the network, numbers and names."""

from __future__ import annotations

import importlib
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastpie.errors import FastpieError

if TYPE_CHECKING:
    from torch import nn

messages = Console(stderr=True, highlight=False, soft_wrap=True)


class Method(str, Enum):
    """How weights are chosen."""

    l1 = "l1"
    random = "random"
    filter = "filter"
    two_of_four = "2:4"


class Scope(str, Enum):
    """Over what sparsity is counted."""

    everywhere = "global"
    layer = "layer"


class Precision(str, Enum):
    """Arithmetic of the engine."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Model = Annotated[
    str,
    typer.Option(help="What builds the network: package.module:factory, called without arguments."),
]
ModelArgs = Annotated[str, typer.Option(help="JSON object of keyword arguments of the factory.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="Checkpoint: .safetensors, or a file of torch.save with tensors only."),
]
Unpickle = Annotated[
    bool, typer.Option(help="Let torch.load run code in the checkpoint. Only for files you trust.")
]
LADDER = "0.1,0.3,0.5,0.7"
"""`fastpie.mining.DEFAULT_LADDER`, as an option."""
Sparsity = Annotated[
    str, typer.Option(help="A fraction removed, or several with commas for a nested ladder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def load_model(
    factory: str, arguments: str, weights: Path | None, unpickle: bool, *, quiet: bool = False
) -> nn.Module:
    """Build the network and load its weights; say if there are none, unless `quiet`."""
    from torch import nn

    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise typer.BadParameter(
            f"expected package.module:factory, but got {factory!r}", param_hint="--model"
        )
    try:
        keywords = dict(json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"expected a JSON object, but: {error}", param_hint="--model-args"
        ) from error
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        model = getattr(importlib.import_module(module_name), name)(**keywords)
    except Exception as error:
        raise FastpieError(
            f"Expected --model {factory} to build a network, but: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise FastpieError(
            f"Expected {factory} to return an nn.Module, but got {type(model).__name__}."
        )
    if weights is None and not quiet:
        messages.print("No --weights: the network is used as the factory builds it.")
    if weights is not None:
        load_weights(model, weights, unpickle, factory)
    return model.eval()


def load_weights(model: nn.Module, weights: Path, unpickle: bool, factory: str) -> None:
    """Load a checkpoint into a network."""
    state = _read_state(weights, unpickle)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FastpieError(
            f"Expected the weights of {factory} in {weights}, but: {error}"
        ) from error


def _read_state(path: Path, unpickle: bool) -> dict[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FastpieError(f"Expected a checkpoint at {path}, but there is no such file.")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise FastpieError(f"Expected safetensors in {path}, but: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=not unpickle)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        hint = "" if unpickle else " A file that you trust can be read with --unpickle."
        raise FastpieError(
            f"Expected a checkpoint of tensors in {path}, but: {error}{hint}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise FastpieError(f"Expected a state dict in {path}, but got {type(state).__name__}.")
    return state


def names(text: str) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(part) for part in names(text)]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected numbers with commas, but got {text!r}", param_hint=option
        ) from error


def size_of(text: str, most: int = 2) -> list[int]:
    """Sides of an image: none, one or several."""
    values = numbers("--size", text)
    if len(values) > most or not all(v.is_integer() and v > 0 for v in values):
        raise typer.BadParameter(
            f"expected at most {most} whole numbers above 0, but got {text!r}", param_hint="--size"
        )
    return [int(v) for v in values]


def sparsities_of(text: str) -> float | list[float]:
    """One level, or those of a ladder."""
    values = numbers("--sparsity", text)
    return values[0] if len(values) == 1 else values


def print_json(data: Any) -> None:
    """To stdout."""
    typer.echo(json.dumps(data, indent=2))
