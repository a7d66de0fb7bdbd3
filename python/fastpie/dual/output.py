"""What a dual forward returns, and the logits in what a model returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastpie.errors import FastpieError

__all__ = ["DualOutput", "Features", "entry_of", "outline_of"]


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


def entry_of(output: Any, name: str | int | None) -> Tensor:
    """The logits in what a model returns.

    Args:
        output: a tensor, or a dict or tuple of them.
        name: key or index in a dict or tuple; None for a tensor.

    Returns:
        The tensor; of a subclass, such as MONAI's MetaTensor, as a plain one.

    Raises:
        FastpieError: if there are none of that name, or they are no tensor.
    """
    if name is not None:
        if isinstance(output, Tensor):  # which would give a row
            raise FastpieError(
                f"Expected a model that returns a dict or tuple with an entry {name!r}, but it returns "
                "a tensor."
            )
        try:
            output = output[name]
        except (KeyError, IndexError, TypeError) as error:
            raise FastpieError(
                f"Expected the model's output to have an entry {name!r}, but got {outline_of(output)}."
            ) from error
    if not isinstance(output, Tensor):
        raise FastpieError(
            f"Expected the model to return a tensor of logits, but got {outline_of(output)}; name the "
            "entry with `output`."
        )
    return output.as_subclass(Tensor)


def outline_of(output: Any) -> str:
    """What a model returns, for a message."""
    if isinstance(output, dict):
        return f"a dict with the keys {list(output)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)} entries"
    return type(output).__name__
