"""`prune`: choose the weights to remove."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastpie._digest import digest_of
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.magnitude_levels import DTYPES, magnitude_levels
from fastpie.pruning.masks import Masks
from fastpie.pruning.prunable import CONVOLUTIONS_AND_LINEAR, prunable_weights
from fastpie.pruning.structured import filter_means, keep_of_pattern, pattern_of

__all__ = ["METHODS", "prune"]

METHODS = ("l1", "random", "filter")
"""Beside these there are patterns "N:M"."""
_SCOPES = ("global", "layer")


def prune(
    model: nn.Module,
    sparsity: float | Sequence[float] | None = None,
    *,
    method: str = "l1",
    scope: str = "global",
    modules: tuple[type[nn.Module], ...] = CONVOLUTIONS_AND_LINEAR,
    exclude: Iterable[str] = (),
    seed: int | None = None,
    norm: int = 1,
    within: Masks | None = None,
) -> Masks:
    """Choose which weights to remove, one-shot; the model is not changed.

    With `scope="global"` exactly `round(sparsity * N)` of all N prunable weights are removed, with
    "layer" exactly `round(sparsity * n)` of each weight tensor's n. "l1" removes the smallest
    magnitudes (PruneCXR, arXiv 2308.09180), "random" any (the control). Equal magnitudes are
    ordered by `named_modules`, then in C order; the lower index goes first. The choice is the same
    bits for every device and thread count. "l1" without `within` and patterns are chosen on the GPU
    where the weights lie there, everything else on the CPU.

    "filter" removes whole output channels (Li et al., arXiv 1608.08710): counts, scope and ties are
    those above with filters in place of weights, and so is `sparsity`, the fraction of *filters*;
    `Masks.removed` counts weights. The smallest norm goes first, over several layers the smallest
    norm per weight. Biases and BatchNorm stay: a removed channel is constant, not zero. The filters
    of a classifier are its classes, so `exclude` it.

    A pattern "N:M", such as "2:4", keeps the N largest magnitudes of every M neighbours in a
    filter, which sparse tensor cores can use (Mishra et al., arXiv 2104.08378). Neighbours are
    consecutive input channels at one tap of the kernel: the weight [K, C, *kernel] is read as
    [K, *kernel, C], as `fastpie.ops.sparse24` packs it, and groups run on from one tap to the next where
    C is not a multiple of M. A shorter group at the end of a filter keeps up to N. Nothing of
    `scope` applies, and `sparsity` is 1 - N / M, what full groups lose; it may be left out.

    Args:
        model: any module; a weight that several modules share counts once.
        sparsity: fraction removed, in [0, 1); or a strictly increasing list of them, a nested
            ladder in which each level removes all that the one before does.
        method: "l1", "random", "filter" or a pattern "N:M".
        scope: "global" (one list over the model) or "layer".
        modules: classes whose `weight` is prunable, subclasses included.
        exclude: names of modules (with all below them) or of parameters that are left alone.
        seed: of "random"; by default drawn from torch's global generator.
        norm: of "filter": 1 or 2, the L1 or L2 norm.
        within: masks of this model; what they remove at their highest level goes before all else,
            so that a network is pruned further. No sparsity may then remove less. Not with a pattern.

    Returns:
        Masks of one level for a number, a ladder for a list (`[0.5]` is a ladder of one level).

    Raises:
        FastpieError: for a sparsity outside [0, 1) or one that is not the pattern's, a ladder that
            does not increase, no prunable weight, an unknown name in `exclude`, weights that are NaN
            or infinite, or `within` that removes more, other weights or parts of filters.
    """
    pattern = pattern_of(method) if isinstance(method, str) else None
    if pattern is None and method not in METHODS:
        raise FastpieError(
            f"Expected `method` to be one of {METHODS} or a pattern as '2:4', but got {method!r}."
        )
    if scope not in _SCOPES:
        raise FastpieError(f"Expected `scope` to be one of {_SCOPES}, but got {scope!r}.")
    if norm not in (1, 2):
        raise FastpieError(f"Expected `norm` to be 1 or 2, but got {norm!r}.")
    if seed is not None:
        seed = operator.index(seed)
        if seed < 0:
            raise FastpieError(f"Expected `seed` of at least 0, but got {seed}.")
    if not isinstance(model, nn.Module):
        raise FastpieError(f"Expected `model` to be an nn.Module, but got {type(model).__name__}.")
    is_ladder = np.ndim(sparsity) > 0  # type: ignore[arg-type]
    sparsities = _checked_sparsities(sparsity, pattern)
    weights = prunable_weights(model, modules=modules, exclude=exclude)
    info: dict[str, object] = {"method": method, "scope": scope, "seed": seed}

    if pattern is not None:
        if within is not None:
            raise FastpieError(f"Expected no `within` for the pattern {method!r}, but got masks.")
        codes = _codes_of_pattern(weights, *pattern)
        digest = digest_of(weights)
    elif method == "l1" and within is None and _all_on_one_gpu(weights):
        codes = _codes_by_operator(weights, sparsities, scope)
        digest = digest_of(weights)
    else:
        values = {name: _magnitude(name, weight) for name, weight in weights.items()}
        digest = digest_of(weights)
        if method == "random":
            seed = int(torch.randint(2**63 - 1, ()).item()) if seed is None else seed
            info["seed"] = seed
            generator = np.random.default_rng(seed)
            values = {name: generator.random(m.size) for name, m in values.items()}
        elif method == "filter":
            info["norm"] = norm
            owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in values}
            values = {name: filter_means(name, owners[name], m, norm) for name, m in values.items()}
        if within is not None:
            _put_first(values, weights, within, model)
        codes = _codes_of(values, sparsities, scope)
        if within is not None:
            _check_within(codes, weights, within)
    return Masks(
        {name: _shaped(code, weights[name]) for name, code in codes.items()},
        sparsities,
        is_ladder=is_ladder,
        fingerprint=Masks.fingerprint_of(model),
        info={**info, "weights": digest},
    )


def _checked_sparsities(
    sparsity: float | Sequence[float] | None, pattern: tuple[int, int] | None
) -> list[float]:
    implied = None if pattern is None else 1 - pattern[0] / pattern[1]
    if implied is not None and sparsity is None:
        return [implied]
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
    if implied is not None and (len(sparsities) > 1 or abs(sparsities[0] - implied) > 1e-9):
        raise FastpieError(
            f"Expected no other `sparsity` than the {implied:g} of the pattern, but got {sparsity!r}."
        )
    return sparsities


def _check_real(name: str, weight: nn.Parameter) -> None:
    if weight.is_meta:
        raise FastpieError(f"Expected `{name}` to hold values, but it is on the meta device.")
    if not weight.is_floating_point():
        raise FastpieError(f"Expected `{name}` to be real floating point, but got {weight.dtype}.")


def _magnitude(name: str, weight: nn.Parameter) -> np.ndarray:
    _check_real(name, weight)
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


def _codes_of_pattern(
    weights: Mapping[str, nn.Parameter], kept: int, size: int
) -> dict[str, Tensor]:
    """Level codes by name, chosen where each weight lies."""
    codes = {}
    for name, weight in weights.items():
        _check_real(name, weight)
        _check_finite(name, int((~weight.detach().isfinite()).sum()), weight.numel())
        codes[name] = keep_of_pattern(weight, kept, size).to(torch.uint8).cpu()
    return codes


def _shaped(code: Tensor, weight: Tensor) -> Tensor:
    """Codes of the weights, or of their filters, in the weight's shape."""
    if code.numel() != weight.numel():
        code = code.view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
    return code.reshape(weight.shape).contiguous()


def _gone_of(
    within: Masks, name: str, weight: Tensor, units: int
) -> np.ndarray:  # bool [weights or filters]
    """What `within` has removed, by the units that are chosen from."""
    if name not in within:
        return np.zeros(units, bool)
    gone = (~within[name]).reshape(units, -1)
    if not torch.equal(gone.all(1), gone.any(1)):
        raise FastpieError(f"Expected `within` to remove whole filters, but not in `{name}`.")
    removed: np.ndarray = gone.all(1).numpy()
    return removed


def _put_first(
    values: dict[str, np.ndarray],
    weights: Mapping[str, nn.Parameter],
    within: Masks,
    model: nn.Module,
) -> None:
    """Give the smallest value to what is already removed."""
    within.check_model(model)
    others = [name for name in within if name not in weights]
    if others:
        raise FastpieError(f"Expected `within` to cover weights to choose from, but got {others}.")
    for name, value in values.items():
        value = value.copy()  # it may be the weight's own memory
        value[_gone_of(within, name, weights[name], value.size)] = -1
        values[name] = value


def _check_within(
    codes: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], within: Masks
) -> None:
    for name, code in codes.items():
        back = torch.from_numpy(_gone_of(within, name, weights[name], code.numel())) & (code > 0)
        if back.any():
            raise FastpieError(
                f"Expected a sparsity that keeps all that `within` removes out, but {int(back.sum())} "
                f"of `{name}` would come back."
            )


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
