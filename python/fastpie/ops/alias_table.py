"""The operator `alias_table`: what is needed to draw entries in proportion to their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["alias_table"]

_native.library.define("alias_table(Tensor weights) -> (Tensor, Tensor)")


def alias_table(
    weights: Tensor,  # fp64 [n]
) -> tuple[Tensor, Tensor]:  # fp64 [n], int64 [n]
    """Two numbers for each entry, by which one is drawn in constant time however many there are.

    Draw an index i uniformly and u uniformly from [0, 1); the entry drawn is i where
    u < probability[i], else alias[i]. (Walker, ACM TOMS 3, 1977; Vose, IEEE TSE 17, 1991.)

    Equivalent to (other aliases, the same distribution)::

        fastpie.ops.reference.alias_table(weights)

    The distribution is that of the weights to a few roundings, relatively, whatever n:
    `torch.multinomial` stops at 2^24 entries. Entries of weight 0 are never drawn.

    Args:
        weights: finite, at least 0, not all 0; in any unit: subnormal and huge ones serve as well.

    Returns:
        probability, in [0, 1], and alias, on the device of `weights`. On the CPU in O(n) by one thread.

    Raises:
        FastpieError: for another dtype or shape, no entry, or weights that are negative, not finite,
            or all 0.
    """
    if weights.dtype is not torch.float64 or weights.ndim != 1:
        raise FastpieError(
            "Expected `weights` to be float64 of shape [n], but got "
            f"{weights.dtype} of shape {list(weights.shape)}."
        )
    if weights.shape[0] == 0:
        raise FastpieError("Expected at least one weight, but got none.")
    return torch.ops.fastpie.alias_table(weights)  # type: ignore[no-any-return]


@torch.library.impl(_native.library, "alias_table", "CPU")
def _alias_table_cpu(weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights.contiguous()
    probability = torch.empty_like(weights)
    alias = torch.empty_like(weights, dtype=torch.int64)
    _native.call(
        _C.alias_table_cpu,
        weights.data_ptr(),
        probability.data_ptr(),
        alias.data_ptr(),
        weights.numel(),
    )
    return probability, alias


def _alias_table_twin(weights: Tensor) -> tuple[Tensor, Tensor]:
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise FastpieError("Expected weights that are finite and at least 0")
    if not bool((weights > 0).any()):
        raise FastpieError("Expected at least one weight above 0")
    return reference.alias_table(weights)


_native.library.impl("alias_table", _alias_table_twin, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::alias_table", lib=_native.library)
def _alias_table_fake(weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(weights, dtype=torch.int64)
