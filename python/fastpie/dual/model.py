"""`DualModel`: the dense model and its pruned self, two passes over one module tree.

This is the truth that every engine is held to. It is written to be obvious, not fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastpie.dual import calibration
from fastpie.dual.engine import DualEngine
from fastpie.dual.features import features_of, watched
from fastpie.dual.inputs import as_arguments, random_state
from fastpie.dual.output import DualOutput, Features
from fastpie.errors import FastpieError
from fastpie.pruning.masks import Masks

__all__ = ["Buffers", "DualModel"]


class DualModel(nn.Module):
    """A dense model together with its pruned self.

    `forward` runs `model(*args)` and then, from the same state of the random generators, the same
    module tree with `weight * mask` in place of each masked weight and with the pruned model's own
    normalisation statistics. No module is swapped and no parameter copied: changes of the dense
    weights show in the next call, and gradients of both outputs reach the same parameters (through
    the pruned output only where the weight is kept).

    Equivalent to::

        dense = model(x)
        pruned_model = copy.deepcopy(model)
        masks.apply_(pruned_model)
        pruned = pruned_model(x)

    but with one set of parameters, gradients into it, and the same dropout in both.

    Attributes:
        model: the module given, unchanged.
        feature_module: the name of what is returned as `features`, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | Mapping[str, Tensor],
        features: str | None = None,
    ) -> None:
        """A dual model that shares the parameters of `model`.

        Args:
            model: any module with masked parameters; it is left as it was.
            masks: from `fastpie.prune`, or bool tensors by parameter name (True = kept).
            features: what to return of both models beside their outputs: the name of a submodule for
                its output, with ":input" for what goes into it, with ":pooled" for mean and standard
                deviation of each channel; several with + between them, pooled, side by side;
                "penultimate" for what goes into the last linear layer. `fastpie.dual.stage_features`
                names those of every stage.

        Raises:
            FastpieError: if the masks are another model's, or there is no such submodule.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise FastpieError(f"Expected `model` to be an nn.Module, but got {type(model)}.")
        if not isinstance(masks, Masks):
            masks = Masks.from_tensors(masks, model)
        masks.check_model(model)
        self.model = model
        self.feature_module = None if features is None else features_of(model, features)
        self._sparsities = list(masks.sparsities)
        self._is_ladder = masks.is_ladder
        self._fingerprint = masks.fingerprint
        self._info = dict(masks.info)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Buffers, so that .to() moves them and state_dict() keeps them; a name may not hold a dot.
        # Copies: other masks are written into them.
        self._levels = Buffers(
            {
                name: level.to(parameters[name].device, copy=True)
                for name, level in masks.levels.items()
            }
        )
        self._statistics = nn.ModuleList(
            Buffers({k: v.detach().clone() for k, v in calibration.statistics_of(model).items()})
            for _ in self._sparsities
        )
        self.training = model.training

    @property
    def masks(self) -> Masks:
        """The masks in force, a copy on the CPU."""
        return Masks(
            {name: level.to("cpu", copy=True) for name, level in self._levels.items()},
            self._sparsities,
            is_ladder=self._is_ladder,
            fingerprint=self._fingerprint,
            info=self._info,
        )

    @masks.setter
    def masks(self, masks: Masks) -> None:
        """Put other masks of the same model and levels in force, e.g. after more training."""
        masks.check_model(self.model)
        if masks.sparsities != self._sparsities or masks.is_ladder != self._is_ladder:
            raise FastpieError(
                f"Expected masks of the levels {self._sparsities} (ladder: {self._is_ladder}), "
                f"but got {masks}."
            )
        if set(masks) != {name for name, _ in self._levels.items()}:
            raise FastpieError("Expected masks of the same parameters as those in force.")
        for name, level in self._levels.items():
            level.copy_(masks.levels[name])
        self._info = dict(masks.info)

    @property
    def sparsities(self) -> list[float]:
        """The levels of the masks."""
        return list(self._sparsities)

    @property
    def is_ladder(self) -> bool:
        """Whether outputs of the pruned model carry a leading level dimension."""
        return self._is_ladder

    def forward(self, *args: Any, **kwargs: Any) -> DualOutput:
        """Both models on the same input.

        Args:
            *args: the inputs of `model`, any number.
            **kwargs: likewise.

        Returns:
            DualOutput(dense, pruned, features), in the structure that `model` returns.
        """
        return self._run((args, kwargs), (args, kwargs))

    def pair(self, x_dense: Any, x_pruned: Any) -> DualOutput:
        """Each model on its own input, in one graph: two views of the same images, say.

        Args:
            x_dense: input of the dense model; a tuple is spread over its positional arguments.
            x_pruned: input of the pruned model, likewise.
        """
        return self._run((as_arguments(x_dense), {}), (as_arguments(x_pruned), {}))

    def _run(
        self,
        of_dense: tuple[tuple[Any, ...], dict[str, Any]],
        of_pruned: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> DualOutput:
        restore = random_state(of_dense)
        with self.watch_features() as seen:
            dense = self.model(*of_dense[0], **of_dense[1])
            pruned = []
            for level in range(len(self._sparsities)):
                restore()
                pruned.append(self.run_pruned(self.pruned_state(level), of_pruned[0], of_pruned[1]))
        features = None
        if seen is not None:
            if len(seen) != 1 + len(pruned):
                raise FastpieError(
                    f"Expected module {self.feature_module!r} to be called once by each model, but "
                    f"both models together called it {len(seen)} times instead of "
                    f"{1 + len(pruned)}."
                )
            features = Features(seen[0], self.stack_levels(seen[1:]))
        return DualOutput(dense, self.stack_levels(pruned), features)

    def pruned_state(self, level: int) -> dict[str, Tensor]:
        """Masked weights and own statistics of the pruned model at one level, by name.

        What `torch.func.functional_call(model, ...)` needs to run the pruned model. The statistics
        are the buffers themselves: a call in training mode updates them.
        """
        state = self.at_every_site(lambda weight, codes: weight * (codes > level))
        state.update(self._statistics[level].items())  # type: ignore[operator]
        return state

    def at_every_site(self, change: Any) -> dict[str, Tensor]:
        """change(weight, levels) of each masked weight, once, by every place that holds it."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {
            id(parameters[name]): change(parameters[name], codes)
            for name, codes in self._levels.items()
        }
        return {
            f"{prefix}.{name}" if prefix else name: changed[id(parameter)]
            for prefix, module in self.model.named_modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in changed
        }

    def run_pruned(
        self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The module tree with `state` in place of its tensors.

        Buffers not in `state` are lent as copies, so that only the dense pass writes to them.
        tie_weights=False: torch's tying swaps a module that has two names twice and leaves the
        swapped weight behind; `state` names every place itself.
        """
        others = {
            path: buffer.clone()
            for prefix, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and (path := f"{prefix}.{name}" if prefix else name) not in state
        }
        return functional_call(self.model, {**others, **state}, args, kwargs, tie_weights=False)

    def recalibrate(self, batches: Iterable[Any]) -> DualModel:
        """Replace the pruned model's BatchNorm statistics by those of data, level by level.

        Each BatchNorm layer with a removed weight upstream gets the mean and the unbiased variance
        of its input over all batches, while it normalises each batch by that batch's own (as
        `torch.optim.swa_utils.update_bn` does, but pooled over samples rather than averaged over
        batches). Layers with no removed weight upstream keep the dense statistics. The dense model
        is untouched; both run in eval mode here.

        Args:
            batches: what `model` takes, or tuples, lists or dicts as a DataLoader gives them: the
                first element, or the value of "image", is the input. Iterated once.

        Returns:
            self.

        Raises:
            FastpieError: for no batches, or data that give NaN or infinite statistics.
        """
        pooled = self.calibration()
        for batch in batches:
            pooled.add(batch)
            if pooled.idle:
                break
        pooled.finish()
        return self

    def calibration(self) -> calibration.Calibration:
        """What `recalibrate` does, for a caller who has the batches one after the other."""
        return calibration.calibration_of(self)

    def compile(  # type: ignore[override]
        self,
        x: Any,
        *,
        precision: str = "fp32",
        backend: str = "auto",
        plan: Mapping[str, Any] | None = None,
    ) -> DualEngine:
        """Freeze both models into an engine for inputs like `x`.

        Args:
            x: an example input; a tuple is spread over the model's positional arguments. Its batch
                size is the largest that the engine takes.
            precision: "fp32", "bf16" or, on a GPU, "fp16": what is computed in; outputs are fp32.
                On a GPU fp32 means IEEE arithmetic unless torch is told to use TF32
                (``torch.set_float32_matmul_precision("high")``).
            backend: "cpu": captured, lowered and timed, with the sparse kernels; "cuda" and
                "triton": the same for a GPU, with our kernels in CUDA or in Triton beside cuDNN's;
                "reference": two plain passes; "auto": "cpu" for an example on the CPU, all kernels
                that there are for one on a GPU. What cannot be captured runs as "reference", with
                one warning that names the operator.
            plan: of another engine (`engine.plan`), to choose kernels as it did instead of by
                timing.

        Returns:
            DualEngine, after its output matched this model's on the example.

        Raises:
            FastpieError: for an unknown option, or an engine that does not match.
        """
        return DualEngine(self, x, precision=precision, backend=backend, plan=plan)

    def levels(self) -> Iterator[tuple[str, Tensor]]:
        """Each masked parameter's name and, for each weight, the first level that keeps it not.

        uint8 or wider; a weight is kept at level l (from 0) where its code is above l.
        """
        return self._levels.items()

    def statistics(self, level: int) -> dict[str, Tensor]:
        """The pruned model's normalisation buffers at one level, by name in `model`."""
        return dict(self._statistics[level].items())  # type: ignore[operator]

    def own_statistics(self) -> dict[str, Tensor]:
        """The pruned model's normalisation buffers at every level, by one flat name ("0/bn1.running_mean")."""
        return {
            f"{level}/{name}": buffer
            for level in range(len(self._sparsities))
            for name, buffer in self.statistics(level).items()
        }

    def get_extra_state(self) -> Tensor:
        """The levels, which belong to the masks that state_dict() holds: JSON in a uint8 tensor.

        A tensor, so that state_dict() holds tensors only (safetensors, weight averaging).
        """
        text = json.dumps({"sparsities": self._sparsities, "is_ladder": self._is_ladder})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, stored: Tensor) -> None:
        """Take the levels of a stored dual model with as many of them."""
        state = json.loads(bytes(stored.tolist()))
        if len(state["sparsities"]) != len(self._sparsities) or (
            state["is_ladder"] != self._is_ladder
        ):
            raise FastpieError(
                f"Expected the state of a dual model with levels like {self._sparsities}, but got "
                f"{state['sparsities']}."
            )
        self._sparsities = list(state["sparsities"])

    def stack_levels(self, outputs: list[Any]) -> Any:
        """Outputs of the levels in one structure: stacked on a ladder, else the only one."""
        if not self._is_ladder:
            return outputs[0]
        return pytree.tree_map(
            lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else list(leaves),
            *outputs,
        )

    @contextmanager
    def watch_features(self) -> Iterator[list[Any] | None]:
        """Collect what the named module returns while the block runs."""
        if self.feature_module is None:
            yield None
            return
        with watched(self.model, self.feature_module) as seen:
            yield seen


class Buffers(nn.Module):
    """Tensors by dotted name as buffers of a module."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these tensors themselves, not copies."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names, with their dots, and tensors."""
        for name, tensor in self._buffers.items():
            assert tensor is not None
            yield name.replace("/", "."), tensor
