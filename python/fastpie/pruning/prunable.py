"""Which weights of a model can be pruned."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from fastpie.errors import FastpieError

__all__ = ["CONVOLUTIONS_AND_LINEAR", "prunable_weights"]

CONVOLUTIONS_AND_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules whose weight is pruned unless others are named."""


def prunable_weights(
    model: nn.Module,
    *,
    modules: tuple[type[nn.Module], ...] = CONVOLUTIONS_AND_LINEAR,
    exclude: Iterable[str] = (),
) -> dict[str, nn.Parameter]:
    """The weights that `prune` would choose from, by parameter name, each tensor once.

    Raises:
        FastpieError: if there are none, or one is computed by a parametrization.
    """
    excluded = _checked_exclude(model, exclude)
    found: dict[str, nn.Parameter] = {}
    # A tensor shared with an excluded module is left alone under every name it has.
    seen: set[int] = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if any(name == e or name.startswith(f"{e}.") for e in excluded)
    }
    for prefix, module in model.named_modules():
        if not isinstance(module, modules):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        if any(name == e or name.startswith(f"{e}.") for e in excluded):
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise FastpieError(
                f"Expected `{name}` to be a parameter, but a parametrization computes it "
                "(torch.nn.utils.parametrize); remove it with remove_parametrizations, or "
                f"exclude {prefix!r}."
            )
        weight = module._parameters.get("weight")
        if weight is None:
            raise FastpieError(
                f"Expected {type(module).__name__} {prefix!r} to have a parameter `weight`, but it "
                "has none (torch.nn.utils.prune and weight_norm replace it by a computed one)."
            )
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise FastpieError(
                f"Expected `{name}` to be initialised; run the lazy module on one batch first."
            )
        if id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    if not found:
        kinds = ", ".join(m.__name__ for m in modules)
        raise FastpieError(
            f"Expected a model with prunable weights ({kinds}), but {type(model).__name__} has none"
            + (f" outside {sorted(excluded)}." if excluded else ".")
        )
    return found


def _checked_exclude(model: nn.Module, exclude: Iterable[str]) -> set[str]:
    excluded = {exclude} if isinstance(exclude, str) else set(exclude)
    known = {name for name, _ in model.named_modules()}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = sorted(str(e) for e in excluded if e not in known or e == "")
    if unknown:
        raise FastpieError(
            f"Expected `exclude` to name modules or parameters of {type(model).__name__}, but it "
            f"has no {unknown}."
        )
    return excluded
