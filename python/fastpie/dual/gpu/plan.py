"""The plan of a pass on a GPU: which kernel computes each step, for which models together.

Kernels are chosen layer by layer: each candidate is checked, then timed on random inputs of the
layer's size. What the layers do not show (two models on two streams, images in micro-batches whose
activations stay in the cache) makes several plans, of which the fastest whole pass is taken.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.gpu.device import Device
from fastpie.dual.gpu.kernels import Candidate, Family, Run, Torch
from fastpie.dual.gpu.layers import GpuLayer
from fastpie.dual.images import final_values, image_values
from fastpie.dual.program import Convolution, Linear, Program, Value
from fastpie.dual.states import ModelState
from fastpie.dual.tuning import Tuner
from fastpie.errors import FastpieError

__all__ = ["Group", "Kernels", "Plan", "Segment", "plans_of"]

_AGREE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference from torch's result that a kernel may have, relative to the largest value.
Each rounds its result once; bf16 has 8 bits of mantissa, fp16 11."""

_AGREE_TF32 = 4e-3

_L2_SHARE = 0.5
"""Of the L2 cache that the activations of a micro-batch may fill; the rest is for the weights."""


@dataclass(frozen=True)
class Group:
    """Models for which one kernel computes a step.

    Attributes:
        models: one, or two that share a launch.
        kernel: "" where there was no choice.
        seconds: measured for the batch; 0 where there was no choice.
        over: the other kernels and their seconds.
    """

    models: tuple[int, ...]
    kernel: str = ""
    seconds: float = 0.0
    over: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Segment:
    """Steps that run one after another on some images at a time.

    Attributes:
        steps: positions in the program.
        images: of a micro-batch; 0: all.
    """

    steps: tuple[int, ...]
    images: int


@dataclass(frozen=True)
class Plan:
    """A whole pass.

    Attributes:
        groups: of each step that some model runs itself.
        segments: in order.
        streams: 2 where the dense model has one of its own.
    """

    groups: Mapping[int, tuple[Group, ...]]
    segments: tuple[Segment, ...]
    streams: int = 1


class Kernels:
    """Finds, checks and times the kernels of the layers of a program.

    Attributes:
        dtype: computed in.
        layers: the steps among which there is a choice.
        refused: (step, kernel) and why it was not considered.
    """

    def __init__(
        self,
        program: Program,
        states: Sequence[ModelState],
        device: Device,
        families: Sequence[Family],
        tuner: Tuner,
        batch: int,
        dtype: torch.dtype,
        *,
        allow_tf32: bool,
    ) -> None:
        """See the class."""
        self._program, self._states, self._device = program, states, device
        self._families, self._tuner, self._batch = families, tuner, batch
        self.dtype = dtype
        self._tolerance = _AGREE[dtype]
        if dtype == torch.float32 and allow_tf32:
            self._tolerance = _AGREE_TF32
        self._precision = (str(dtype), allow_tf32)
        self.layers: dict[int, GpuLayer] = {}
        self.refused: dict[tuple[str, str], str] = {}
        self._runs: dict[tuple[int, tuple[int, ...], str], Run] = {}
        final = final_values(program)
        for i, step in enumerate(program.steps):
            if not isinstance(step, Convolution | Linear):
                continue
            if isinstance(step, Linear) and step.result in final and dtype != torch.float32:
                continue  # the last layer is computed in fp32
            known = [program.meta[step.input], program.meta[step.result]]
            if all(m.shape[0] is None and all(m.shape[1:]) for m in known):
                self.layers[i] = GpuLayer(program, step, states, dtype)

    def refused_for(self, name: str) -> list[dict[str, str]]:
        """The kernels that a step of this name could not have, and why not."""
        return [
            {"kernel": kernel, "reason": reason}
            for (step, kernel), reason in self.refused.items()
            if step == name
        ]

    def layer_named(self, name: str) -> GpuLayer | None:
        """The layer of a step's name, if there was a choice."""
        return next((layer for layer in self.layers.values() if layer.step.name == name), None)

    def run(self, i: int, group: Group) -> Run:
        """The call of a kernel that was chosen.

        Raises:
            FastpieError: if this machine has no kernel of that name for the layer.
        """
        key = (i, group.models, group.kernel)
        if key not in self._runs:
            for candidate in self._candidates(i, group.models):
                if candidate.name == group.kernel:
                    self._runs[key] = candidate.prepare()
                    break
            else:
                raise FastpieError(
                    f"Expected a kernel {group.kernel!r} for {self._program.steps[i].name}, as the "
                    "plan names it, but there is none here."
                )
        return self._runs[key]

    def best(self, i: int, models: tuple[int, ...], *, shared: bool) -> Group | None:
        """The fastest kernel of a layer for one model or two; None if none is right.

        Args:
            i: position of the step.
            models: that it is to compute.
            shared: whether both have the same input.
        """
        layer = self.layers[i]
        timed: list[tuple[float, str]] = []
        inputs, residuals = self._operands(layer, len(models), shared)
        for candidate in self._candidates(i, models):
            key = (*self._key(layer, models, shared), candidate.name)

            def work(candidate: Candidate = candidate) -> Any:
                run = candidate.prepare()
                self._check(i, models, run, inputs(), residuals())
                x, r, out = inputs(), residuals(), [None] * len(models)
                return lambda: run(x, r, out)

            try:
                timed.append((self._tuner.seconds(key, work), candidate.name))
            except Exception as error:  # whatever a library raises: too much shared memory, say
                name = layer.step.name
                self.refused[name, candidate.name] = str(error)
                if isinstance(error, _WrongResultError):
                    warnings.warn(
                        f"{name}: the kernel {candidate.name!r} gives wrong results on this GPU and is "
                        f"left out: {error}",
                        stacklevel=2,
                    )
        if not timed:
            return None
        (seconds, name), *others = sorted(timed)
        return Group(models, name, seconds, tuple((n, s) for s, n in others))

    def _candidates(self, i: int, models: tuple[int, ...]) -> list[Candidate]:
        layer = self.layers[i]
        return [c for family in self._families for c in family.candidates(layer, models)]

    def _operands(self, layer: GpuLayer, models: int, shared: bool) -> Any:
        """Functions that give random inputs and residuals, made once."""
        made: dict[str, Any] = {}
        device = self._device.torch_device
        generator = torch.Generator(device).manual_seed(0)

        def random(size: tuple[int, ...]) -> Tensor:
            x = torch.randn(self._batch, *size, generator=generator, device=device)
            return layer.laid_out(x.to(layer.dtype))

        def inputs() -> list[Tensor]:
            if "x" not in made:
                first = random(layer.input_size)
                made["x"] = [first] + [
                    first if shared else random(layer.input_size) for _ in range(models - 1)
                ]
            return list(made["x"])

        def residuals() -> list[Tensor | None]:
            if "r" not in made:
                step = layer.step
                if step.residual == step.input:  # x + convolution(x)
                    made["r"] = inputs()
                else:
                    has = step.residual is not None
                    made["r"] = [random(layer.output_size) if has else None for _ in range(models)]
            return list(made["r"])

        return inputs, residuals

    def _check(
        self,
        i: int,
        models: tuple[int, ...],
        run: Run,
        inputs: list[Tensor],
        residuals: list[Tensor | None],
    ) -> None:
        """Refuse a kernel that does not give what torch gives, or does not write everything."""
        layer = self.layers[i]
        poisoned: list[Tensor | None] = [layer.empty(self._batch).fill_(torch.nan) for _ in models]
        got = run(inputs, residuals, poisoned)
        for k, model in enumerate(models):
            (reference,) = Torch().candidates(layer, (model,))
            (want,) = reference.prepare()(inputs[k : k + 1], residuals[k : k + 1], [None])
            scale = want.abs().max().float().clamp(min=1e-30)
            error = ((got[k].float() - want.float()).abs().max() / scale).item()
            if not error <= self._tolerance:  # NaN too
                raise _WrongResultError(
                    f"Expected the result of torch to {self._tolerance:g} of its largest value, but "
                    f"it differs by {error:.3g}."
                )

    def _key(self, layer: GpuLayer, models: tuple[int, ...], shared: bool) -> tuple[Any, ...]:
        """What the time of a layer depends on, besides the kernel."""
        densities = tuple(float(f"{layer.density(m):.1e}") for m in models)
        step = layer.step
        behind = step.padding_behind if isinstance(step, Convolution) else None
        activation = None if layer.activation is None else layer.activation.name
        own = [layer.states[m] for m in models]
        return (
            "layer",
            layer.input_size,
            layer.output_size,
            tuple(own[0].tensors[step.weight].shape),
            (layer.window, behind),
            (step.residual is not None, activation, step.bias is not None, step.norm is not None),
            (densities, shared),
            (*self._precision, self._batch),
        )


class _WrongResultError(FastpieError):
    """A kernel computes something else."""


def plans_of(
    program: Program,
    owners: Mapping[Value, list[int]],
    kernels: Kernels,
    device: Device,
    batch: int,
) -> list[Plan]:
    """Plans worth timing as whole passes, what the layers' times favour first.

    Args:
        program: the captured model.
        owners: of its values, see fastpie.dual.states.
        kernels: of its layers.
        device: to run on.
        batch: the largest batch.
    """
    alone: dict[int, tuple[Group, ...]] = {}
    together: dict[int, tuple[Group, ...]] = {}
    for i, step in enumerate(program.steps):
        own = [m for m, owner in enumerate(owners[step.result]) if owner == m]
        if i not in kernels.layers:
            alone[i] = together[i] = tuple(Group((m,)) for m in own)
            continue
        singles = [_required(kernels, i, m) for m in own]
        alone[i] = tuple(singles)
        together[i] = _paired(i, singles, owners[kernels.layers[i].step.input], kernels)
    whole = (Segment(tuple(alone), 0),)
    cut = _segments(program, list(alone), owners, kernels.dtype, device, batch)
    plans = [Plan(together, whole)]
    if cut != whole:
        plans.append(Plan(together, cut))
    if any(len(groups) > 1 for groups in alone.values()):
        plans.append(Plan(alone, whole, streams=2))
    return plans


def _required(kernels: Kernels, i: int, model: int) -> Group:
    best = kernels.best(i, (model,), shared=False)
    if best is None:
        reasons = {k: v for (_, k), v in kernels.refused.items()}
        raise FastpieError(f"Expected a kernel for step {i} of the program, but got {reasons}.")
    return best


def _paired(
    i: int, singles: list[Group], owner: Sequence[int], kernels: Kernels
) -> tuple[Group, ...]:
    """Two models at a time where one launch takes less than two."""
    groups: list[Group] = []
    for pair in (singles[k : k + 2] for k in range(0, len(singles), 2)):
        if len(pair) == 2:
            models = tuple(g.models[0] for g in pair)
            shared = owner[models[0]] == owner[models[1]]
            both = kernels.best(i, models, shared=shared)
            apart = sum(g.seconds for g in pair)
            if both is not None and both.seconds < apart:
                names = " + ".join(g.kernel for g in pair)
                groups.append(replace(both, over=((names, apart), *both.over)))
                continue
        groups += pair
    return tuple(groups)


def _segments(
    program: Program,
    steps: Sequence[int],
    owners: Mapping[Value, list[int]],
    dtype: torch.dtype,
    device: Device,
    batch: int,
) -> tuple[Segment, ...]:
    """Cut the pass where one value is alive, and let the early parts run on few images at a time.

    The activations of a part are to fit the L2 cache, those of all models.
    """
    apart = image_values(program)
    last_use = program.last_use()
    alive: set[Value] = set()
    atoms: list[list[int]] = [[]]
    for i in steps:
        result = program.steps[i].result
        if result not in apart:
            return (Segment(tuple(steps), 0),)
        atoms[-1].append(i)
        alive = {v for v in {*alive, result} if last_use.get(v, -1) > i}
        if len(alive) == 1:
            atoms.append([])
    segments: list[tuple[list[int], int]] = []
    for atom in (a for a in atoms if a):
        images = batch
        for i in atom:
            step = program.steps[i]
            bytes_each = sum(
                math.prod(int(n or 1) for n in program.meta[v].shape[1:])
                * dtype.itemsize
                * len(set(owners[v]))
                for v in {*step.values(), step.result}
            )
            images = min(images, max(1, int(_L2_SHARE * device.l2_bytes / max(1, bytes_each))))
        count = 1 << (images.bit_length() - 1) if images < batch else 0
        if segments and segments[-1][1] == count:
            segments[-1][0].extend(atom)
        else:
            segments.append((atom, count))
    return tuple(Segment(tuple(part), images) for part, images in segments)
