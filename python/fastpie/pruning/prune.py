"""`prune`: choose the weights to remove."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastpie._digest import digest_of
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.magnitude_levels import DTYPES, magnitude_levels
from fastpie.pruning.masks import Masks

__all__ = ["prunable_weights", "prune"]

_METHODS = ("l1", "random")
_SCOPES = ("global", "layer")
_CONVOLUTIONS_AND_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def prune(
    model: nn.Module,
    sparsity: float | Sequence[float],
    *,
    method: str = "l1",
    scope: str = "global",
    modules: tuple[type[nn.Module], ...] = _CONVOLUTIONS_AND_LINEAR,
    exclude: Iterable[str] = (),
    seed: int | None = None,
) -> Masks:
    """Choose which weights to remove, one-shot and unstructured; the model is not changed.

    With `scope="global"` exactly `round(sparsity * N)` of all N prunable weights are removed, with
    "layer" exactly `round(sparsity * n)` of each weight tensor's n. "l1" removes the smallest
    magnitudes (PruneCXR, arXiv 2308.09180), "random" any (the control). Equal magnitudes are
    ordered by `named_modules`, then in C order; the lower index goes first. The choice is the same
    bits for every device and thread count: "l1" is made on the GPU where all weights lie there,
    everything else on the CPU.

    Args:
        model: any module; a weight that several modules share counts once.
        sparsity: fraction removed, in [0, 1); or a strictly increasing list of them, a nested
            ladder in which each level removes all that the one before does.
        method: "l1" or "random".
        scope: "global" (one list over the model) or "layer".
        modules: classes whose `weight` is prunable, subclasses included.
        exclude: names of modules (with all below them) or of parameters that are left alone.
        seed: of "random"; by default drawn from torch's global generator.

    Returns:
        Masks of one level for a number, a ladder for a list (`[0.5]` is a ladder of one level).

    Raises:
        FastpieError: for a sparsity outside [0, 1), a ladder that does not increase, no prunable
            weight, an unknown name in `exclude`, or weights that are NaN or infinite.
    """
    if method not in _METHODS:
        raise FastpieError(f"Expected `method` to be one of {_METHODS}, but got {method!r}.")
    if scope not in _SCOPES:
        raise FastpieError(f"Expected `scope` to be one of {_SCOPES}, but got {scope!r}.")
    if seed is not None:
        seed = operator.index(seed)
        if seed < 0:
            raise FastpieError(f"Expected `seed` of at least 0, but got {seed}.")
    if not isinstance(model, nn.Module):
        raise FastpieError(f"Expected `model` to be an nn.Module, but got {type(model).__name__}.")
    is_ladder = np.ndim(sparsity) > 0
    sparsities = _checked_sparsities(sparsity)
    weights = prunable_weights(model, modules=modules, exclude=exclude)

    if method == "l1" and _all_on_one_gpu(weights):
        codes = _codes_by_operator(weights, sparsities, scope)
        digest = digest_of(weights)
    else:
        magnitudes = {name: _magnitude(name, weight) for name, weight in weights.items()}
        digest = digest_of(weights)
        if method == "random":
            seed = int(torch.randint(2**63 - 1, ()).item()) if seed is None else seed
            generator = np.random.default_rng(seed)
            magnitudes = {name: generator.random(m.size) for name, m in magnitudes.items()}
        codes = _codes_of(magnitudes, sparsities, scope)
    return Masks(
        {name: code.reshape(weights[name].shape) for name, code in codes.items()},
        sparsities,
        is_ladder=is_ladder,
        fingerprint=Masks.fingerprint_of(model),
        info={"method": method, "scope": scope, "seed": seed, "weights": digest},
    )


def prunable_weights(
    model: nn.Module,
    *,
    modules: tuple[type[nn.Module], ...] = _CONVOLUTIONS_AND_LINEAR,
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


def _checked_sparsities(sparsity: float | Sequence[float]) -> list[float]:
    try:
        if np.asarray(sparsity).dtype.kind not in "iuf":  # numbers in strings, booleans, None
            raise TypeError
        sparsities = [float(s) for s in np.atleast_1d(np.asarray(sparsity, dtype=np.float64))]
    except (TypeError, ValueError) as error:
        raise FastpieError(
            f"Expected `sparsity` to be a number or a list of numbers in [0, 1), but got "
            f"{sparsity!r}."
        ) from error
    if not sparsities or not all(0 <= s < 1 for s in sparsities):  # NaN fails too
        raise FastpieError(f"Expected every sparsity to lie in [0, 1), but got {sparsity!r}.")
    if len(sparsities) > 255:
        raise FastpieError(f"Expected 1 to 255 levels, but got {len(sparsities)}.")
    if any(b <= a for a, b in itertools.pairwise(sparsities)):
        raise FastpieError(f"Expected the levels to increase strictly, but got {sparsities}.")
    return sparsities


def _magnitude(name: str, weight: nn.Parameter) -> np.ndarray:
    if weight.is_meta:
        raise FastpieError(f"Expected `{name}` to hold values, but it is on the meta device.")
    if not weight.is_floating_point():
        raise FastpieError(f"Expected `{name}` to be real floating point, but got {weight.dtype}.")
    values = weight.detach().cpu()
    # Half precisions are exact in fp32; fp64 stays, so that the order is that of the weights.
    values = values if values.dtype is torch.float64 else values.float()
    magnitude: np.ndarray = values.abs().reshape(-1).numpy()
    _check_finite(name, int(magnitude.size - np.isfinite(magnitude).sum()), magnitude.size)
    return magnitude


def _check_finite(name: str, bad: int, size: int) -> None:
    if bad:
        raise FastpieError(
            f"Expected finite weights, but `{name}` holds {bad} NaN or infinite of {size}."
        )


def _all_on_one_gpu(weights: Mapping[str, nn.Parameter]) -> bool:
    """Whether CUDA kernels of ours can select from these weights where they lie."""
    devices = {weight.device for weight in weights.values()}
    return (
        len(devices) == 1
        and devices.pop().type == "cuda"
        and all(weight.dtype in DTYPES for weight in weights.values())
        and _native.cuda_unusable_reason() is None
    )


def _codes_by_operator(
    weights: Mapping[str, nn.Parameter], sparsities: Sequence[float], scope: str
) -> dict[str, Tensor]:
    """Level codes by name, selected where the weights lie, with one wait for them at the end."""
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    chosen = []
    for names in groups:
        tensors = [weights[name].detach() for name in names]
        total = sum(tensor.numel() for tensor in tensors)
        chosen.append(magnitude_levels(tensors, [round(s * total) for s in sparsities]))
    nonfinite = torch.cat([bad for _, bad in chosen]).tolist()
    sizes = [weight.numel() for weight in weights.values()]
    for name, bad, size in zip(weights, nonfinite, sizes, strict=True):
        _check_finite(name, bad, size)
    codes = torch.cat([code for code, _ in chosen]).cpu()
    return dict(zip(weights, codes.split(sizes), strict=True))


def _codes_of(
    magnitudes: Mapping[str, np.ndarray], sparsities: Sequence[float], scope: str
) -> dict[str, Tensor]:
    """Level codes by name, flat."""
    if scope == "layer":
        codes = {name: _levels_of(m, sparsities) for name, m in magnitudes.items()}
    else:
        flat = _levels_of(np.concatenate(list(magnitudes.values())), sparsities)
        ends = np.cumsum([m.size for m in magnitudes.values()])
        codes = dict(zip(magnitudes, np.split(flat, ends[:-1]), strict=True))
    return {name: torch.from_numpy(np.ascontiguousarray(c)) for name, c in codes.items()}


def _levels_of(magnitude: np.ndarray, sparsities: Sequence[float]) -> np.ndarray:
    """For each weight the index of the level that removes it, len(sparsities) where none does."""
    counts = [round(s * magnitude.size) for s in sparsities]
    codes = np.full(magnitude.size, len(sparsities), dtype=np.uint8)
    wanted = sorted({count - 1 for count in counts if count > 0})
    if not wanted:
        return codes
    ordered = np.partition(magnitude, wanted)
    for index in reversed(range(len(counts))):  # the lowest level that removes a weight wins
        if counts[index] == 0:
            continue
        threshold = ordered[counts[index] - 1]
        below = magnitude < threshold
        codes[below] = index
        ties = np.flatnonzero(magnitude == threshold)
        codes[ties[: counts[index] - int(below.sum())]] = index
    return codes
