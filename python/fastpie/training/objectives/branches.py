"""Dense and pruned branch of one network that are trained together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastpie.dual.inputs import as_arguments
from fastpie.dual.model import DualModel
from fastpie.dual.output import DualOutput
from fastpie.ops import masked_conv1d, masked_conv2d, masked_conv3d, masked_linear
from fastpie.ops.masked_conv_sparse import FORWARD_DENSITY
from fastpie.pruning.masks import Masks

__all__ = ["TrainedBranches"]


class TrainedBranches(DualModel):
    """A `DualModel` for training: own BatchNorm weights and sparse kernels for the pruned branch.

    The running statistics are each branch's own in every `DualModel`. With `own_affine` the weights
    and biases of the BatchNorm layers are too: parameters of this module, equal to the model's at
    first.

    The sparse kernels of `fastpie.ops.masked_conv2d` compute the pruned branch's convolutions on the
    CPU, in fp32 and bf16, where shape and density of a layer speak for them; nothing is timed. They
    round otherwise than torch's. In what torch.compile compiles torch's kernels are used.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | Mapping[str, Tensor],
        *,
        own_affine: bool = False,
        sparse_kernels: bool = True,
    ) -> None:
        """Make the branches; `model` is left as it was.

        Args:
            model: see `DualModel`.
            masks: likewise.
            own_affine: whether the pruned branch has its own BatchNorm weights and biases.
            sparse_kernels: whether sparse kernels are used.
        """
        super().__init__(model, masks)
        self.sparse_kernels = sparse_kernels
        own = _batch_norm_affine(model) if own_affine else {}
        self._affine = nn.ParameterDict(
            # A name may not hold a dot.
            {
                name.replace(".", "/"): nn.Parameter(
                    p.detach().clone(), requires_grad=p.requires_grad
                )
                for name, p in own.items()
            }
        )
        self._kept: dict[str, tuple[Tensor, float]] = {}

    def pair(self, x_dense: Any, x_pruned: Any) -> DualOutput:
        """Each branch on its own input, in one graph.

        Unlike a `DualModel`'s, the branches draw their dropout one after the other: they see different
        images anyway, and without a look at the generators torch.compile gets it in one graph.

        Args:
            x_dense: input of the dense branch; a tuple is spread over its positional arguments.
            x_pruned: input of the pruned branch, likewise.
        """
        dense = self.model(*as_arguments(x_dense))
        pruned = [
            self.run_pruned(self.pruned_state(level), as_arguments(x_pruned))
            for level in range(len(self.sparsities))
        ]
        return DualOutput(dense, self.stack_levels(pruned), None)

    def pruned_state(self, level: int) -> dict[str, Tensor]:
        """The pruned branch's tensors by name, its own BatchNorm weights among them."""
        state = super().pruned_state(level)
        state.update((name.replace("/", "."), p) for name, p in self._affine.items())
        return state

    def run_pruned(
        self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The module tree with `state` in place of its tensors."""
        masked = self._for_sparse_kernels(state)
        if not masked:
            return super().run_pruned(state, args, kwargs)
        with _SparseKernels(masked):
            return super().run_pruned(state, args, kwargs)

    def _for_sparse_kernels(self, state: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Weight and mask by the identity of their product in `state`."""
        if not self.sparse_kernels or self.is_ladder or torch.compiler.is_compiling():
            return {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        masked: dict[int, tuple[Tensor, Tensor]] = {}
        for name, codes in self.levels():
            if codes.device.type != "cpu" or name not in state:
                continue
            keep, density = self._mask_of(name, codes)
            if (
                density < FORWARD_DENSITY
            ):  # else masked_conv2d multiplies once more than torch has to
                masked[id(state[name])] = parameters[name], keep
        return masked

    def _mask_of(self, name: str, codes: Tensor) -> tuple[Tensor, float]:
        """A mask and its density, the same tensor as long as the mask is the same.

        Packed weights are kept by its address. It is never changed in place: a graph may have saved it.
        """
        keep = codes > 0
        known = self._kept.get(name)
        if known is None or not torch.equal(known[0], keep):
            known = keep, keep.sum().item() / max(1, keep.numel())
            self._kept[name] = known
        return known


def _batch_norm_affine(model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of the BatchNorm layers by name."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, parameter in module.named_parameters(recurse=False)
    }


_OPERATORS: dict[Any, Callable[..., Tensor]] = {
    functional.conv1d: masked_conv1d,
    functional.conv2d: masked_conv2d,
    functional.conv3d: masked_conv3d,
    functional.linear: masked_linear,
}


class _SparseKernels(TorchFunctionMode):
    """Computes a convolution with a masked product by weight and mask instead.

    The product is there as well, for all else that a module may do with its weight, so that no module
    has to be known or swapped.
    """

    def __init__(self, masked: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Take weight and mask by the identity of their product."""
        super().__init__()
        self._masked = masked

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = _OPERATORS.get(func)
        if operator is not None:
            product = args[1] if len(args) > 1 else kwargs.get("weight")
            found = self._masked.get(id(product))
            if found is not None and len(args) > 1:
                return operator(args[0], *found, *args[2:], **kwargs)
            if found is not None:
                return operator(*args, **{**kwargs, "weight": found[0], "mask": found[1]})
        return func(*args, **kwargs)
