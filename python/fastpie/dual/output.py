"""What a dual forward returns."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DualOutput", "Features"]


class Features(NamedTuple):
    """Output of the module named by `features=`, of both models.

    Attributes:
        dense: as the module returned it in the dense model.
        pruned: the same structure, with a leading level dimension on a ladder.
    """

    dense: Any
    pruned: Any


class DualOutput(NamedTuple):
    """Outputs of the dense and the pruned model for one input.

    Attributes:
        dense: what `model(x)` returns: a tensor `[N, ...]`, or dicts and tuples of them.
        pruned: the same structure of the pruned model, `[N, ...]`, or `[L, N, ...]` on a ladder.
        features: of both models, or None where no module was named.
    """

    dense: Any
    pruned: Any
    features: Features | None
