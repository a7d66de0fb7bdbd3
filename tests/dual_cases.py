"""What the tests of engines share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["relative_error"]


def relative_error(got: Any, want: Any) -> float:
    """Largest difference of a tensor, relative to its largest value; shapes and dtypes are equal."""
    worst = 0.0
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            error = (a - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-6)
            worst = max(worst, error.item())
    return worst
