"""What a lowered program hands out: fresh tensors in the structures that the model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.program import Program, TensorName, Value

__all__ = ["constants_of", "fresh_results"]


def constants_of(program: Program, tensors: Mapping[str, Tensor]) -> dict[TensorName, Tensor]:
    """Copies of the parameters and constants that the model returns as they are."""
    return {
        name: tensors[name].clone()
        for structure in (program.output, program.feature)
        if structure is not None
        for name in structure.tensors()
    }


def fresh_results(
    program: Program,
    value_of: Callable[[Value], Any],
    constants: Mapping[TensorName, Tensor],
    *,
    images: int,
    computed: int,
    broken: Tensor | None,
) -> tuple[Any, Any]:
    """Output and feature of one model, none sharing memory with anything else.

    Args:
        program: the captured model.
        value_of: what a pass has computed.
        constants: of `constants_of`.
        images: to hand out.
        computed: as many or more; then the first dimension of what is handed out is cut.
        broken: bool [images], those whose outputs become NaN; None: none of them.
    """

    def fresh(value: Value) -> Any:
        x = value_of(value)
        if not isinstance(x, Tensor):
            return x
        meta = program.meta.get(value)
        if meta is None:
            return x.clone()
        per_image = None in meta.shape[:1]
        if per_image and computed != images:
            x = x[:images]
        x = x.to(meta.dtype, copy=True)
        if broken is not None and per_image and x.is_floating_point():
            x.masked_fill_(broken.view(-1, *(1,) * (x.ndim - 1)), torch.nan)
        return x

    def lookup(name: TensorName) -> Tensor:
        return constants[name].clone()

    output = program.output.build({v: fresh(v) for v in program.output.values()}, lookup)
    if program.feature is None:
        return output, None
    # What the feature shares with the output must not share memory.
    return output, program.feature.build({v: fresh(v) for v in program.feature.values()}, lookup)
