"""The lowered dual forward on a GPU: all models' steps in one CUDA graph."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastpie.dual.gpu.device import Device, Key, Launch, fp32_convolutions, tf32_allowed
from fastpie.dual.gpu.kernels import Family
from fastpie.dual.gpu.plan import Group, Kernels, Plan, Segment, plans_of
from fastpie.dual.images import final_values, image_values
from fastpie.dual.program import Linear, Program, Step, Value, without_batch_sizes
from fastpie.dual.results import constants_of, fresh_results
from fastpie.dual.states import Models, ModelState, owners, states_of
from fastpie.dual.tensor_steps import TensorStep, channels_last, tensor_step
from fastpie.dual.tuning import Tuner
from fastpie.errors import FastpieError

__all__ = ["GpuLowered"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Part:
    """A segment's launches; `outputs` are read by others."""

    images: int
    launches: list[Launch]
    inputs: list[Key]
    outputs: list[Key]


class _Issued:
    """Launches issued so far: which stream each value was made on, and which streams were used."""

    def __init__(self, device: Device, seconds: dict[int, float] | None) -> None:
        self._device, self._seconds = device, seconds
        self._made_on: dict[Key, int] = {}
        self._used = {0}

    def issue(
        self,
        launches: Sequence[Launch],
        values: dict[Key, Any],
        targets: Mapping[Key, Tensor],
    ) -> None:
        """Run launches on `values`, which gain results; kernels that can write into `targets`."""
        for launch in launches:
            self._follow(launch, values)
            outputs = [targets.get(key) for key in launch.writes]
            with self._device.stream(launch.stream):
                self._device.launched(launch)
                results = launch.run(values, outputs)
            if self._seconds is not None:

                def again(launch: Launch = launch, outputs: Any = outputs) -> None:
                    launch.run(values, outputs)

                spent = self._device.seconds(again)
                self._seconds[id(launch)] = self._seconds.get(id(launch), 0.0) + spent
            for key, result in zip(launch.writes, results, strict=True):
                values[key] = result
                self._made_on[key] = launch.stream
            for key in launch.drop:
                del values[key]

    def _follow(self, launch: Launch, values: Mapping[Key, Any]) -> None:
        """Let the launch's stream wait for what it reads from others."""
        others = {self._made_on.get(key, 0) for key in launch.reads}
        if launch.stream not in self._used:
            others.add(0)  # a graph takes in a stream that waits for one of its own
            self._used.add(launch.stream)
        for other in others - {launch.stream}:
            self._device.wait(launch.stream, other)
        for key in launch.reads:
            if self._made_on.get(key, 0) != launch.stream:
                for tensor in _tensors(values[key]):
                    self._device.hold(tensor, launch.stream)

    def in_micro_batches(
        self, part: _Part, values: dict[Key, Any], micro: int, images: int
    ) -> None:
        """Some images after the other; what others read is gathered in tensors of the batch."""
        whole: dict[Key, Tensor] = {}
        for first in range(0, images, micro):
            rows = slice(first, min(first + micro, images))
            own = {key: values[key][rows] for key in part.inputs}
            targets = {key: x[rows] for key, x in whole.items()}
            self.issue(part.launches, own, targets)
            self.join()
            for key in part.outputs:
                if key not in whole:
                    whole[key] = _empty_like(own[key], images)
                    targets[key] = whole[key][rows]
                if own[key].data_ptr() != targets[key].data_ptr():
                    targets[key].copy_(own[key])
        for launch in part.launches:
            for key in launch.drop:
                values.pop(key, None)
        values.update(whole)

    def join(self) -> None:
        """Let the main stream wait for all others."""
        for stream in self._used - {0}:
            self._device.wait(0, stream)
        self._made_on = {}
        self._used = {0}


def _empty_like(x: Tensor, images: int) -> Tensor:
    """Memory for more images like those of `x`, channels innermost."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.empty(
        (images, *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=formats.get(x.ndim, torch.contiguous_format),
    )


class GpuLowered:
    """Both models (or all levels) from a snapshot of the weights; see fastpie.dual.cpu.lowered.

    A batch of the compiled size is one copy of the input, one graph and one copy of the results. A
    smaller one is the same with the rest of the input left as it was, where images are known to be
    independent; else its launches are issued one by one. The host never waits for the device.

    Attributes:
        program: the captured model.
    """

    def __init__(
        self,
        dual: Models,
        program: Program,
        batch: int,
        precision: str,
        device: Device,
        families: Sequence[Family],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan, compile and capture; times come from the tuner's cache or are taken now.

        Args:
            dual: the models.
            program: of `dual.model`.
            batch: the largest batch.
            precision: "fp32", "bf16" or "fp16".
            device: to run on.
            families: kernels to choose from.
            plan: of `plan()`, to choose as it did.
        """
        self.program = without_batch_sizes(program)
        self._batch, self._dtype = batch, _DTYPES[precision]
        self._device, self._families = device, families
        self._allow_tf32 = tf32_allowed()
        self._tuner = Tuner(device.scope, device.seconds)
        self._lock = threading.Lock()  # of the streams, which a refreshed engine has as well
        self._prepare(states_of(dual, self.program), None if plan is None else self._known(plan))
        self._tuner.save()

    @property
    def images_apart(self) -> bool:
        """Whether what the model returns of an image is known to depend on that image alone."""
        return set(self.program.outputs()) <= image_values(self.program)

    def plan(self) -> dict[str, Any]:
        """Kernels of each step, cut and streams of the pass, by names: JSON."""
        steps = self.program.steps
        return {
            "steps": {
                steps[i].name: [[list(g.models), g.kernel] for g in groups]
                for i, groups in self._plan.groups.items()
            },
            "segments": [[len(s.steps), s.images] for s in self._plan.segments],
            "streams": self._plan.streams,
        }

    def _known(self, plan: Mapping[str, Any]) -> Plan:
        by_name = {step.name: i for i, step in enumerate(self.program.steps)}
        try:
            groups = {
                by_name[name]: tuple(Group(tuple(models), kernel) for models, kernel in own)
                for name, own in plan["steps"].items()
            }
            order = iter(groups)
            segments = tuple(
                Segment(tuple(next(order) for _ in range(count)), images)
                for count, images in plan["segments"]
            )
            return Plan(groups, segments, plan["streams"])
        except (KeyError, TypeError, ValueError, StopIteration, RuntimeError) as error:
            raise FastpieError(
                f"Expected a plan of an engine of this model, but it does not fit: {error!r}."
            ) from error

    def refreshed(self, dual: Models) -> GpuLowered:
        """The same with the present weights and masks of `dual`; kernels are not chosen again.

        Unless another prefix is pruned now: then the pass is planned anew, from remembered times
        where there are.
        """
        fresh = object.__new__(GpuLowered)
        fresh.program, fresh._batch, fresh._dtype = self.program, self._batch, self._dtype
        fresh._device, fresh._families = self._device, self._families
        fresh._allow_tf32, fresh._tuner = self._allow_tf32, self._tuner
        fresh._lock = self._lock
        fresh._prepare(states_of(dual, self.program), self._plan)
        fresh._tuner.save()
        return fresh

    def _prepare(self, states: list[ModelState], known: Plan | None) -> None:
        program = self.program
        self._states = states
        self._owners = owners(program, states)
        self._constants = constants_of(program, states[0].tensors)
        self._device.enter()
        with self._lock, self._issuing(), self._device.stream(0):
            self._input = [self._static_input(value) for value in program.inputs]
            self._kernels = Kernels(
                program, states, self._device, self._families, self._tuner, self._batch,
                self._dtype, allow_tf32=self._allow_tf32,
            )  # fmt: skip
            if known is not None and self._fits(known):
                plans = [known]
            else:
                plans = plans_of(program, self._owners, self._kernels, self._device, self._batch)
            self._plan = self._fastest(plans)
            self._compile(self._plan)

    def _issuing(self) -> Any:
        return fp32_convolutions(allow_tf32=self._allow_tf32)

    def _fits(self, plan: Plan) -> bool:
        """Whether a plan names, for each step, the models that run it now."""
        own = {
            i: [m for m, owner in enumerate(self._owners[step.result]) if owner == m]
            for i, step in enumerate(self.program.steps)
        }
        return {
            i: [m for g in groups for m in g.models] for i, groups in plan.groups.items()
        } == own

    def _fastest(self, plans: list[Plan]) -> Plan:
        """The plan whose graph takes least."""
        if len(plans) == 1:
            return plans[0]

        def seconds(k: int) -> float:
            names = [(i, [(g.models, g.kernel) for g in own]) for i, own in plans[k].groups.items()]
            cut = [(len(s.steps), s.images) for s in plans[k].segments]
            network = hashlib.sha256(f"{self.program} {self.program.meta}".encode()).hexdigest()
            key = ("pass", network, names, cut, plans[k].streams, self._batch, str(self._dtype))

            def work() -> Callable[[], None]:
                self._compile(plans[k])
                return self._graph

            return self._tuner.seconds(key, work)

        return plans[min(range(len(plans)), key=seconds)]

    def _static_input(self, value: Value) -> Tensor:
        """Where the graph reads an input."""
        meta = self.program.meta[value]
        dtype = self._dtype if meta.dtype == torch.float32 else meta.dtype
        shape = [self._batch if n is None else n for n in meta.shape]
        return channels_last(torch.zeros(shape, dtype=dtype, device=self._device.torch_device))

    # ------------------------------------------------------------------------------ compilation

    def _compile(self, plan: Plan) -> None:
        """Turn a plan into launches and capture them."""
        self._parts = self._parts_of(plan)
        self._results: dict[Key, Any] = {}

        def work() -> None:
            self._results = self._execute(self._input, self._batch)

        self._graph = self._device.capture(work)

    def _parts_of(self, plan: Plan) -> list[_Part]:
        program = self.program
        launches: dict[int, list[Launch]] = {}
        last: dict[Key, Launch] = {}
        for segment in plan.segments:
            for i in segment.steps:
                launches[i] = [self._launch(i, g, plan.streams) for g in plan.groups[i]]
                for launch in launches[i]:
                    last.update(dict.fromkeys((*launch.reads, *launch.writes), launch))
        models = range(len(self._states))
        kept = {(v, self._owners[v][m]) for v in program.outputs() for m in models}
        for key, launch in last.items():
            if key not in kept:
                launch.drop.append(key)
        parts = []
        for index, segment in enumerate(plan.segments):
            own = [launch for i in segment.steps for launch in launches[i]]
            made = {key for launch in own for key in launch.writes}
            read = dict.fromkeys(key for launch in own for key in launch.reads if key not in made)
            later = {
                key
                for other in plan.segments[index + 1 :]
                for i in other.steps
                for launch in launches[i]
                for key in launch.reads
            }
            outputs = [key for key in made if key in later or key in kept]
            parts.append(_Part(segment.images, own, list(read), sorted(outputs)))
        return parts

    def _launch(self, i: int, group: Group, streams: int) -> Launch:
        step = self.program.steps[i]
        # The dense model has the main stream; so has whatever computes it and another together.
        stream = 0 if 0 in group.models or streams == 1 else 1
        writes = [(step.result, m) for m in group.models]
        reads = list(
            dict.fromkeys((v, self._owners[v][m]) for m in group.models for v in step.values())
        )
        run = self._layer(i, group) if i in self._kernels.layers else self._operator(step, group)
        return Launch(step.name, group.kernel, group.models, stream, reads, writes, run)

    def _layer(self, i: int, group: Group) -> Any:
        layer, kernel = self._kernels.layers[i], self._kernels.run(i, group)
        step = layer.step
        source = [(step.input, self._owners[step.input][m]) for m in group.models]
        added = [
            None if step.residual is None else (step.residual, self._owners[step.residual][m])
            for m in group.models
        ]

        def run(values: Mapping[Key, Any], outputs: list[Tensor | None]) -> list[Any]:
            laid_out = {key: layer.laid_out(values[key]) for key in dict.fromkeys(source)}
            residuals = [None if key is None else layer.laid_out(values[key]) for key in added]
            return kernel([laid_out[key] for key in source], residuals, outputs)

        return run

    def _operator(self, step: Step, group: Group) -> Any:
        (model,) = group.models
        is_output = isinstance(step, Linear) and step.result in final_values(self.program)
        _, compute = tensor_step(
            step, self._states[model], dtype=self._dtype, is_output=is_output, prepack=False
        )
        operands = {v: (v, self._owners[v][model]) for v in step.values()}
        return _single(compute, operands)

    # ------------------------------------------------------------------------------ execution

    def _execute(
        self, inputs: Sequence[Tensor], images: int, seconds: dict[int, float] | None = None
    ) -> dict[Key, Any]:
        """Issue every launch; the values that the model returns, by model.

        `seconds` gains the time of each launch, by its id; of micro-batches that of all.
        """
        issued = _Issued(self._device, seconds)
        values: dict[Key, Any] = {
            (name, 0): x for name, x in zip(self.program.inputs, inputs, strict=True)
        }
        with self._issuing():
            for part in self._parts:
                micro = part.images or images
                if micro >= images:
                    issued.issue(part.launches, values, {})
                else:
                    issued.in_micro_batches(part, values, micro, images)
            issued.join()
        return values

    def run(self, args: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        """Output and feature of each model.

        Args:
            args: the model's positional arguments.

        Returns:
            (output, feature) of the dense model and of each level. Tensors are fresh, and fp32
            where the model's are. The caller's stream waits for them, the host does not.

        Raises:
            FastpieError: for inputs of another kind than the example's.
        """
        inputs = self.program.flatten(args)
        meta = self.program.meta
        batched = [None in meta[value].shape[:1] for value in self.program.inputs]
        images = next(len(x) for x, is_batched in zip(inputs, batched, strict=True) if is_batched)
        as_one = images == self._batch or self.images_apart
        with self._lock:
            self._device.enter()
            with self._device.stream(0):
                broken = None
                if as_one:
                    results = self._replay(inputs, batched, images)
                    if self.images_apart:
                        broken = self._broken(batched, images)
                else:
                    results = self._issue_apart(inputs, batched, images)
                outputs = [
                    fresh_results(
                        self.program,
                        lambda value, m=m: results[value, self._owners[value][m]],  # type: ignore[misc]
                        self._constants,
                        images=images,
                        computed=self._batch if as_one else max(images, 1),
                        broken=broken,
                    )
                    for m in range(len(self._states))
                ]
            self._device.leave(_tensors(outputs))
        return outputs

    def _replay(
        self, inputs: Sequence[Tensor], batched: Sequence[bool], images: int
    ) -> Mapping[Key, Any]:
        """The graph on the inputs, and on what lies behind them in a smaller batch."""
        for static, x, is_batched in zip(self._input, inputs, batched, strict=True):
            (static[:images] if is_batched else static).copy_(x.detach(), non_blocking=True)
        self._graph()
        return self._results

    def _issue_apart(
        self, inputs: Sequence[Tensor], batched: Sequence[bool], images: int
    ) -> Mapping[Key, Any]:
        """Launch by launch on just the inputs; on one image of zeros where there are none."""
        given = [
            channels_last(x.detach().to(static.device, static.dtype, non_blocking=True))
            for x, static in zip(inputs, self._input, strict=True)
        ]
        if images == 0:
            given = [
                x.new_zeros((1, *x.shape[1:])) if is_batched else x
                for x, is_batched in zip(given, batched, strict=True)
            ]
        return self._execute(given, max(images, 1))

    def _broken(self, batched: Sequence[bool], images: int) -> Tensor | None:
        """Which images have a NaN; fused activations of libraries make a number of it."""
        found = None
        for static, is_batched in zip(self._input, batched, strict=True):
            if is_batched and static.is_floating_point():
                x = static[:images]
                nan = x.isnan().flatten(1).any(1) if x.ndim > 1 else x.isnan()
                found = nan if found is None else found | nan
        return found

    def report(self, args: tuple[Any, ...], names: Sequence[str]) -> list[dict[str, Any]]:
        """Share out the time of the graph to its launches; see DualEngine.report."""
        seconds: dict[int, float] = {}
        with self._lock:
            self._device.enter()
            with self._device.stream(0):
                for static, x in zip(self._input, self.program.flatten(args), strict=True):
                    static.copy_(x.detach())
                whole = self._device.seconds(self._graph)
                self._execute(self._input, self._batch, seconds)
        total = sum(seconds.values())
        over = {
            (self.program.steps[i].result, group.models[0]): group.over
            for i, groups in self._plan.groups.items()
            for group in groups
        }
        rows = []
        for part in self._parts:
            for launch in part.launches:
                row: dict[str, Any] = {
                    "model": " and ".join(names[m] for m in launch.models),
                    "layer": launch.step,
                    "kernel": launch.kernel or "torch",
                    "seconds": seconds[id(launch)] * whole / total,
                    "images": part.images or self._batch,
                    "over": [{"kernel": k, "seconds": s} for k, s in over[launch.writes[0]]],
                    "refused": self._kernels.refused_for(launch.step),
                }
                layer = self._kernels.layer_named(launch.step)
                if layer is not None:
                    multiply_adds, moved = layer.work()
                    row["multiply_adds"] = multiply_adds * self._batch * len(launch.models)
                    row["bytes"] = moved * self._batch * len(launch.models)
                rows.append(row)
        return rows


def _single(compute: TensorStep, operands: Mapping[Value, Key]) -> Any:
    """A step of one model as a launch's call."""

    def run(values: Mapping[Key, Any], outputs: list[Tensor | None]) -> list[Any]:
        return [compute({v: values[key] for v, key in operands.items()})]

    return run


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
