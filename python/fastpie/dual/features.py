"""Which tensor of a model is its features: a module's output, or what goes into a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastpie.errors import FastpieError

__all__ = ["INPUT", "PENULTIMATE", "check_features", "features_of", "watched"]

PENULTIMATE = "penultimate"
"""Stands for what goes into the last linear layer."""

INPUT = ":input"
"""Behind a module's name: what goes into it, and not what comes out."""


def features_of(model: nn.Module, features: str) -> str:
    """The name of the features of a model, checked; "penultimate" is replaced by a module's.

    Args:
        model: any module.
        features: a submodule's name for its output, that name and ":input" for its (first) input,
            or "penultimate" for the input of the last `nn.Linear` in the order of `named_modules`: in
            most classifiers the embedding that the classes are told from.

    Returns:
        The name of a submodule, with or without ":input".

    Raises:
        FastpieError: if there is no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if features == PENULTIMATE and features not in modules:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise FastpieError(
                f"Expected a model with a linear layer for the features {PENULTIMATE!r}, but "
                f"{type(model).__name__} has none: name a module of it."
            )
        last: str = linear[-1]
        return last + INPUT
    check_features(model, features)
    return features


def check_features(model: nn.Module, features: str) -> None:
    """Refuse a name that is no module's, with or without ":input".

    Raises:
        FastpieError: for such a name.
    """
    name, _ = _parsed(model, features)
    if name not in dict(model.named_modules(remove_duplicate=False)):
        raise FastpieError(
            f"Expected `features` to name a module of {type(model).__name__}, but it has no module "
            f"{name!r}."
        )


@contextmanager
def watched(model: nn.Module, features: str) -> Iterator[list[Any]]:
    """Collect the features of each call of the model while the block runs."""
    seen: list[Any] = []
    name, of_input = _parsed(model, features)
    module = model.get_submodule(name)

    def keep(value: Any) -> None:
        # A copy: a later operation in place (ReLU) must not change what is handed out.
        seen.append(pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise FastpieError(
                f"Expected module {name!r} to be called with its input first, but it is called by "
                "keywords alone."
            )
        keep(args[0])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(output)

    if of_input:
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def _parsed(model: nn.Module, features: str) -> tuple[str, bool]:
    """A module's name, and whether its input is meant; a module may have a colon in its name."""
    if features.endswith(INPUT) and features not in dict(
        model.named_modules(remove_duplicate=False)
    ):
        return features[: -len(INPUT)], True
    return features, False
