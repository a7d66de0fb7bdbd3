"""Which tensors of a model are its features: what comes out of a module, or goes into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastpie.dual.inputs import as_arguments
from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError

__all__ = ["PENULTIMATE", "feature_widths", "features_of", "stage_features", "watched"]

PENULTIMATE = "penultimate"
"""Stands for what goes into the last linear layer."""

_INPUT = ":input"
_POOLED = ":pooled"
_AND = "+"
_BLOCKS = 4  # of a transformer that are looked at


def features_of(model: nn.Module, features: str) -> str:
    """The name of the features of a model, checked; "penultimate" is replaced by a module's.

    A submodule's name means what comes out of it. Behind the name, ":input" means what goes into it,
    and ":pooled" the mean and the standard deviation of each channel over the positions of an image:
    [N, C, ...] gives [N, 2 C], tokens [N, T, C] likewise, [N, C] stays. Several with a + between them
    are pooled and put side by side: "layer1+layer2" gives [N, 2 C1 + 2 C2].

    Args:
        model: any module.
        features: such a name, or "penultimate" for the input of the last `nn.Linear` in the order of
            `named_modules`: in most classifiers the embedding that the classes are told from.

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
        return last + _INPUT
    for point in _points(model, features):
        if point.module not in modules:
            raise FastpieError(
                f"Expected `features` to name a module of {type(model).__name__}, but it has no "
                f"module {point.module!r}."
            )
    return features


def stage_features(model: nn.Module, x: Any, *, last: bool = False) -> str:
    """The features of the early stages of a network, by name: for `DualModel(features=...)`.

    A stage is all that has one resolution; its features are what the last module at that resolution
    gives, pooled. Of a transformer, whose tokens have one resolution throughout, every quarter of its
    blocks. Early stages tell wrong labels and odd images from others where the last one has learnt
    them by heart (benchmarks/quality), so it is left out.

    Args:
        model: any module; it is run once, in eval mode, and left as it was.
        x: an example input; a tuple is spread over the model's positional arguments.
        last: whether the last stage is among them. A network with one stage gives that one.

    Returns:
        Names of modules with ":pooled", joined by +.

    Raises:
        FastpieError: if no module gives images or tokens.
    """
    shapes = _shapes(model, x)
    blocks = _blocks({name for name, shape in shapes.items() if len(shape) == 3})
    stages: dict[int, str] = {}
    for whole in (False, True):  # a block rather than the last layer in it
        for name, shape in shapes.items():  # in the order in which they end
            positions = math.prod(shape[2:])
            if len(shape) > 3 and positions > 1 and whole == _is_block(model, name):
                # Padding and odd sizes make a stage no other one.
                stages[round(math.log2(positions) / (len(shape) - 2))] = name
    chosen = blocks or [stages[side] for side in sorted(stages, reverse=True)]
    if not chosen:
        raise FastpieError(
            f"Expected modules of {type(model).__name__} that give images [N, C, H, W] or tokens "
            "[N, T, C], but none does: name a module by `features`."
        )
    if not last and len(chosen) > 1:
        chosen.pop()
    return _AND.join(name + _POOLED for name in chosen)


def feature_widths(model: nn.Module, features: str, args: tuple[Any, ...]) -> list[int]:
    """How many columns each part of joined features has, in their order.

    Args:
        model: any module; it is run once, in eval mode, and left as it was.
        features: from `features_of`.
        args: the model's positional arguments.
    """
    points = _points(model, features)
    widths = [0] * len(points)

    def keep(place: int, value: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        widths[place] = sum(leaf.shape[1:].numel() for leaf in leaves)

    with _hooks(model, points, keep), evaluating(model), torch.no_grad():
        model(*args)
    return widths


def _shapes(model: nn.Module, x: Any) -> dict[str, tuple[int, ...]]:
    """What the modules with parameters give that are called once, in the order in which they end."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.setdefault(name, []).append(tuple(output.shape))

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if name and _AND not in name and next(module.parameters(), None) is not None:
                hook = module.register_forward_hook(
                    lambda module, args, output, name=name: note(name, output)
                )
                stack.callback(hook.remove)
        model(*as_arguments(x))
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}


def _is_block(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).children(), None) is not None


def _blocks(names: Collection[str]) -> list[str]:
    """Every quarter of the longest list of modules among those that give tokens."""
    lists: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        if own.isdigit():
            lists.setdefault(parent, []).append(name)
    members = max(lists.values(), key=len, default=[])
    if len(members) < 2:
        return []
    members.sort(key=lambda name: int(name.rpartition(".")[2]))
    places = {round(quarter * len(members) / _BLOCKS) for quarter in range(1, _BLOCKS + 1)}
    return [members[place - 1] for place in sorted(places) if place]


@dataclass(frozen=True)
class _Point:
    module: str
    of_input: bool
    pooled: bool

    def value(self, args: tuple[Any, ...], output: Any) -> Any:
        if self.of_input and not args:
            raise FastpieError(
                f"Expected module {self.module!r} to be called with its input first, but it is called "
                "by keywords alone."
            )
        value = args[0] if self.of_input else output
        if self.pooled:
            if not isinstance(value, Tensor) or value.ndim < 2:
                raise FastpieError(
                    f"Expected module {self.module!r} to give a tensor [N, C, ...] to be pooled, but "
                    f"got {type(value).__name__}."
                )
            return _pooled(value)
        # A copy: a later operation in place (ReLU) must not change what is handed out.
        return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)


@contextmanager
def watched(model: nn.Module, features: str) -> Iterator[list[Any]]:
    """Collect the features of each call of the model while the block runs."""
    seen: list[Any] = []
    points = _points(model, features)
    values: list[list[Any]] = [[] for _ in points]

    def keep(place: int, value: Any) -> None:
        if len(points) == 1:
            seen.append(value)
            return
        values[place].append(value)
        if all(values):
            seen.append(torch.cat([of_point.pop(0) for of_point in values], 1))

    with _hooks(model, points, keep):
        yield seen


@contextmanager
def _hooks(
    model: nn.Module, points: list[_Point], keep: Callable[[int, Any], None]
) -> Iterator[None]:
    """Call keep(place, value) for each point as the model runs."""
    with ExitStack() as stack:
        for place, point in enumerate(points):
            module = model.get_submodule(point.module)
            if point.of_input:
                handle = module.register_forward_pre_hook(
                    lambda module, args, place=place, point=point: keep(
                        place, point.value(args, None)
                    )
                )
            else:
                handle = module.register_forward_hook(
                    lambda module, args, output, place=place, point=point: keep(
                        place, point.value(args, output)
                    )
                )
            stack.callback(handle.remove)
        yield


def _pooled(x: Tensor) -> Tensor:  # [N, C, ...], [N, T, C] or [N, C] -> [N, 2 C] or [N, C]
    if x.ndim == 2:
        return x
    x = x.transpose(1, 2) if x.ndim == 3 else x.flatten(2)
    mean = x.mean(2)
    # From its definition: torch.export and every backend know these operators.
    spread = (x - mean.unsqueeze(2)).square().mean(2).sqrt()
    return torch.cat([mean, spread], 1)


def _points(model: nn.Module, features: str) -> list[_Point]:
    """The parts of a name; a module may have any of its signs in its own name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if features in modules:
        return [_Point(features, False, False)]
    parts = features.split(_AND)
    points = []
    for part in parts:
        name, of_input, pooled = part, False, len(parts) > 1
        if name not in modules and name.endswith(_POOLED):
            name, pooled = name[: -len(_POOLED)], True
        if name not in modules and name.endswith(_INPUT):
            name, of_input = name[: -len(_INPUT)], True
        points.append(_Point(name, of_input, pooled))
    return points
