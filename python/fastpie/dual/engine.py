"""`DualEngine`: a frozen dual forward, one pass over the input.

Backends: "cpu" lowers the captured program for the CPU (fastpie.dual.cpu), "cuda" and "triton" for a GPU
(fastpie.dual.gpu); "reference" is the two passes of DualModel, for what cannot be lowered.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastpie.dual.cpu.lowered import Lowered
from fastpie.dual.inputs import as_arguments, batch_size, random_state
from fastpie.dual.output import DualOutput, Features
from fastpie.dual.reference import Reference, device_of
from fastpie.errors import FastpieError
from fastpie.pruning.masks import Masks

if TYPE_CHECKING:
    from fastpie.dual.gpu.lowered import GpuLowered
    from fastpie.dual.model import DualModel

__all__ = ["DualEngine"]

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
PRECISIONS = ("fp32", "bf16", "fp16")

# Largest deviation from DualModel that is handed out, relative to the largest output. bf16 keeps
# eight bits of each product; 0.1 lets a deep network pass and a wrong weight not. fp16 keeps eleven.
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2}

# Images on which the engine is held to DualModel where it is known to treat each by itself.
_CHECKED = 4


class DualEngine:
    """Both models on inputs of one kind, eval mode, from a snapshot of weights and masks.

    Made by `DualModel.compile`. Outputs are fresh tensors without gradient, fp32 where the model's
    are. Any batch up to the compiled one is taken; later changes of the model do not show until
    `refresh`. Calls from several threads at once are safe.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        batch: the largest batch size, that of the example.
    """

    def __init__(
        self,
        dual: DualModel,
        x: Any,
        *,
        precision: str = "fp32",
        backend: str = "auto",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        """See `DualModel.compile`."""
        if backend not in BACKENDS:
            raise FastpieError(f"Expected `backend` to be one of {BACKENDS}, but got {backend!r}.")
        if precision not in PRECISIONS:
            raise FastpieError(
                f"Expected `precision` to be one of {PRECISIONS}, but got {precision!r}."
            )
        if plan is not None:
            backend = plan.get("backend", backend)
        self.precision = precision
        self._source = dual
        self._example = as_arguments(x)
        self.batch = batch_size(self._example)
        device = device_of(self._example)
        self._backend = _checked_backend(backend, precision, device)
        self._program: Reference | Lowered | GpuLowered
        self._program = self._lowered(device, plan) or Reference(dual, precision)
        self._check(self._program, _frozen(dual), self.batch)

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda", "triton" or "reference"."""
        if isinstance(self._program, Reference):
            return "reference"
        return "cuda" if self._backend == "auto" else self._backend

    def _lowered(
        self, device: torch.device, plan: Mapping[str, Any] | None
    ) -> Lowered | GpuLowered | None:
        """The lowered program, or None, with a warning, where DualModel must run instead."""
        if self._backend == "reference":
            return None
        other = _other_dtype(self._source, self._example)
        if other is not None:
            reason = f"it computes in {other}, and the kernels in {', '.join(PRECISIONS)}"
        else:
            # Late: torch.export takes longer to import than the rest of fastpie.
            from fastpie.dual.capture import CaptureError, capture

            try:
                program = capture(
                    self._source.model,
                    self._example,
                    feature_module=self._source.feature_module,
                )
                lowered = (self._source, program, self.batch, self.precision)
                # Tensors of an inference mode could not be written to outside it.
                with torch.inference_mode(False), torch.no_grad():
                    if self._backend == "cpu":
                        return Lowered(*lowered, plan)
                    from fastpie.dual.gpu import available
                    from fastpie.dual.gpu.lowered import GpuLowered

                    gpu = available.device_of(device)
                    return GpuLowered(*lowered, gpu, available.families_of(self._backend), plan)
            except CaptureError as error:
                reason = str(error)
        warnings.warn(
            f"{type(self._source.model).__name__} runs as DualModel, two plain passes: {reason}",
            stacklevel=4,
        )
        return None

    def refresh(self, masks: Masks | None = None) -> None:
        """Take a new snapshot of the weights and statistics, with `masks` or else the model's.

        Nothing is captured again, and no kernel timed again unless a layer that had none is masked
        now. The DualModel is not changed; the old snapshot stays in force if this raises.

        Raises:
            FastpieError: if the masks are another model's or have other levels, or the new
                snapshot does not give what the model gives on two images of the example.
        """
        dual = _frozen(self._source)
        if masks is not None:
            dual.masks = masks
        with torch.inference_mode(False), torch.no_grad():
            program = self._program.refreshed(dual)
        self._check(program, dual, min(self.batch, _CHECKED))
        self._program = program

    def __call__(self, *args: Any) -> DualOutput:
        """Both models on a batch of at most the compiled size.

        Args:
            *args: the model's positional inputs, like the example's.

        Returns:
            DualOutput, as the DualModel gives it in eval mode.

        Raises:
            FastpieError: for a larger batch, or inputs of another kind.
        """
        if len(args) != len(self._example):
            raise FastpieError(
                f"Expected {len(self._example)} inputs, as the example had, but got {len(args)}."
            )
        if batch_size(args) > self.batch:
            raise FastpieError(
                f"Expected a batch of at most {self.batch}, the compiled size, but got "
                f"{batch_size(args)}."
            )
        return self._run(self._program, args)

    @property
    def plan(self) -> dict[str, Any]:
        """What was chosen by timing, for `DualModel.compile(plan=...)`: JSON.

        Two engines with one plan, of the same versions and number of threads on the same kind of
        processor, give the same bits.
        """
        if isinstance(self._program, Reference):
            return {"backend": "reference"}
        return {"backend": self._backend, **self._program.plan()}

    def report(self) -> list[dict[str, Any]]:
        """What runs and how long it takes, measured now on the example.

        Returns:
            One row for each kernel call: `model` ("dense", "pruned at 0.9"), `layer`, `kernel`,
            `seconds` for the whole batch, `images` of a micro-batch, and `over`, the kernels that
            it was chosen over with their seconds; on a GPU also `refused`, the kernels that failed
            or gave wrong results when this engine was planned, and `multiply_adds` (of dense
            models) and `bytes` of the activations read and written. The reference backend has one row for
            each pass.
        """
        names = ["dense"] + [f"pruned at {s:g}" for s in self._source.sparsities]
        with torch.no_grad():
            return self._program.report(self._example, names)

    def _run(self, program: Reference | Lowered | GpuLowered, args: tuple[Any, ...]) -> DualOutput:
        with torch.no_grad(), torch.autocast(device_of(args).type, enabled=False):
            results = program.run(args)
        stack = self._source.stack_levels
        features = None
        if self._source.feature_module is not None:
            features = Features(results[0][1], stack([feature for _, feature in results[1:]]))
        return DualOutput(results[0][0], stack([output for output, _ in results[1:]]), features)

    def _check(
        self, program: Reference | Lowered | GpuLowered, dual: DualModel, images: int
    ) -> None:
        """Hold the engine, run on the first images of the example, to DualModel."""
        cut = _part_of_batch(self.batch, slice(0, images))
        example = pytree.tree_map(cut, self._example)
        restore = random_state(example)
        got = self._run(program, example)
        if images > _CHECKED and not isinstance(program, Reference) and program.images_apart:
            # The first and the last of them: DualModel takes longer than all the rest.
            ends = torch.cat([torch.arange(_CHECKED // 2), torch.arange(-(_CHECKED // 2), 0)])
            example = pytree.tree_map(_part_of_batch(images, ends), example)
            of_dense = _part_of_batch(images, ends)
            of_pruned = _part_of_batch(images, ends, dual.is_ladder)
            features = got.features and Features(
                pytree.tree_map(of_dense, got.features.dense),
                pytree.tree_map(of_pruned, got.features.pruned),
            )
            got = DualOutput(
                pytree.tree_map(of_dense, got.dense),
                pytree.tree_map(of_pruned, got.pruned),
                features,
            )
        restore()
        with torch.no_grad(), torch.autocast(device_of(example).type, enabled=False):
            expected = dual(*example)
        tolerance = _TOLERANCE[self.precision]
        error = _deviation(got, expected)
        if error <= tolerance:
            return
        # The model may amplify rounding (BatchNorm of a channel that is all but constant): then its
        # own fp32 or bf16 output is as far from the truth. Both are held to fp64.
        own = self._run(Reference(dual, self.precision), example)
        try:
            with torch.no_grad(), torch.autocast(device_of(example).type, enabled=False):
                exact = copy.deepcopy(dual).double()(*pytree.tree_map(_double, example))
        except (RuntimeError, TypeError):  # a model that names fp32 in its code
            exact = expected
        if _deviation(got, exact) > max(tolerance, 2 * _deviation(own, exact)):
            raise FastpieError(
                f"Expected the engine to match the model to {tolerance:g} on the example, but it "
                f"differs by {error:.3g}."
            )


def _checked_backend(backend: str, precision: str, device: torch.device) -> str:
    """The backend to run on a device; "auto" remains on a GPU, where it is every kernel there is.

    Raises:
        FastpieError: where it cannot run there, or not in that precision.
    """
    # Late: loaded with the first engine, not with fastpie.
    from fastpie.dual.gpu import available

    if backend == "auto" and device.type == "cpu":
        backend = "cpu"
    elif backend == "auto" and available.unusable_reason("auto", device) is not None:
        backend = "reference"
    if backend == "cpu" and device.type != "cpu":
        raise FastpieError(
            f"Expected an example on the CPU for backend 'cpu', but it is on {device}."
        )
    if backend in ("cuda", "triton"):
        reason = available.unusable_reason(backend, device)
        if reason is not None:
            raise FastpieError(f"Expected backend {backend!r} to be usable, but {reason}.")
    if precision == "fp16" and device.type == "cpu" and backend not in ("cuda", "triton"):
        raise FastpieError("Expected precision 'fp32' or 'bf16' on the CPU, but got 'fp16'.")
    return backend


def _deviation(got: DualOutput, want: DualOutput) -> float:
    """Largest deviation of a tensor, relative to the largest value of the tensor wanted."""
    worst = 0.0
    for w, g in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if not isinstance(w, Tensor) or not w.is_floating_point() or not w.numel():
            continue
        w, g = w.double(), g.double()
        if not torch.equal(w.isfinite(), g.isfinite()):
            raise FastpieError(
                "Expected the engine to give finite outputs where the model does, but it does not "
                "on the example."
            )
        scale = w.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
        worst = max(worst, ((g - w).nan_to_num(0, 0, 0).abs().max() / scale).item())
    return worst


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _frozen(dual: DualModel) -> DualModel:
    return copy.deepcopy(dual).eval().requires_grad_(False)


def _other_dtype(dual: DualModel, example: tuple[Any, ...]) -> torch.dtype | None:
    """A floating dtype other than fp32 among the model's tensors and the inputs, if any."""
    tensors = [*dual.model.parameters(), *dual.model.buffers(), *pytree.tree_leaves(example)]
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    others = (d for d in dtypes if d.is_floating_point or d.is_complex)
    return next((d for d in others if d != torch.float32), None)


def _part_of_batch(batch: int, part: Any, after_levels: bool = False) -> Callable[[Any], Any]:
    """A function that takes some images of a tensor whose dimension of images has this length."""
    dim = int(after_levels)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] == batch:
            return leaf[:, part] if after_levels else leaf[part]
        return leaf

    return take
