"""The lowered dual forward: a captured program, one plan for each model, one pass over the input."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.cpu.code import Code, Workspace
from fastpie.dual.cpu.plan import (
    Choice,
    Geometries,
    PassPlan,
    Segment,
    layers_of,
    plan_pass,
)
from fastpie.dual.cpu.segment import SegmentCompiler
from fastpie.dual.images import image_values
from fastpie.dual.program import Program, Value, without_batch_sizes
from fastpie.dual.results import constants_of, fresh_results
from fastpie.dual.states import Models, ModelState, owners, states_of
from fastpie.dual.tensor_steps import channels_last
from fastpie.dual.tuning import Tuner
from fastpie.errors import FastpieError
from fastpie.ops.positions import Positions

__all__ = ["Lowered"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class _Pass:
    """One model's own steps, and the first owner of each value that it reads."""

    model: int
    plan: PassPlan
    codes: list[Code]


class Lowered:
    """Both models (or all levels) as instructions, from a snapshot of the weights.

    Safe to run in several threads at once: each call takes a set of buffers of its own.

    Attributes:
        program: the captured model.
        passes: one for each model that differs from those before it.
    """

    def __init__(
        self,
        dual: Models,
        program: Program,
        batch: int,
        precision: str,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan and compile; times come from the tuner's cache or are taken now.

        Args:
            dual: the models.
            program: of `dual.model`.
            batch: the largest batch.
            precision: "fp32" or "bf16".
            plan: of `plan()`, to choose as it did.
        """
        self.program = without_batch_sizes(program)
        self._batch = batch
        self._dtype = _DTYPES[precision]
        self._lock = threading.Lock()
        self._tuner = Tuner()
        self._prepare(states_of(dual, self.program), self._known_passes(plan))
        self._tuner.save()

    @property
    def images_apart(self) -> bool:
        """Whether what the model returns of an image is known to depend on that image alone."""
        return set(self.program.outputs()) <= image_values(self.program)

    def plan(self) -> dict[str, Any]:
        """Form of each step and cut of each pass, by names: JSON."""
        steps = self.program.steps
        return {
            "passes": [
                {
                    "model": one.model,
                    "steps": {
                        steps[i].name: [c.kernel, c.positions, c.lines, c.blocked]
                        for i, c in one.plan.choices.items()
                    },
                    "segments": [[len(s.steps), s.images] for s in one.plan.segments],
                }
                for one in self.passes
            ]
        }

    def _known_passes(self, plan: Mapping[str, Any] | None) -> list[_Pass]:
        if plan is None:
            return []
        by_name = {step.name: i for i, step in enumerate(self.program.steps)}
        passes = []
        try:
            for one in plan["passes"]:
                choices = {
                    by_name[name]: Choice(positions, kernel, lines=lines, blocked=blocked)
                    for name, (kernel, positions, lines, blocked) in one["steps"].items()
                }
                order = iter(choices)
                segments = tuple(
                    Segment(tuple(itertools.islice(order, count)), images)
                    for count, images in one["segments"]
                )
                passes.append(_Pass(one["model"], PassPlan(choices, {}, segments), []))
        except (KeyError, TypeError, ValueError) as error:
            raise FastpieError(
                f"Expected a plan of an engine of this model, but it does not fit: {error!r}."
            ) from error
        return passes

    def refreshed(self, dual: Models) -> Lowered:
        """The same with the present weights and masks of `dual`; kernels are not chosen again.

        A layer that was not planned before (another prefix is pruned now) is timed.
        """
        fresh = object.__new__(Lowered)
        fresh.program, fresh._batch, fresh._dtype = self.program, self._batch, self._dtype
        fresh._lock = threading.Lock()
        fresh._tuner = self._tuner
        fresh._prepare(states_of(dual, self.program), self.passes)
        fresh._tuner.save()
        return fresh

    def _prepare(self, states: list[ModelState], known: Sequence[_Pass] = ()) -> None:
        program = self.program
        self._owners = owners(program, states)
        self._constants = constants_of(program, states[0].tensors)
        own = [
            [i for i, step in enumerate(program.steps) if self._owners[step.result][m] == m]
            for m in range(len(states))
        ]
        layers = [
            {} if m == 0 else layers_of(program, states[m], own[m], self._dtype)
            for m in range(len(states))
        ]
        geometries = Geometries(
            [layer for found in layers for layer in found.values()],
            self._batch,
            torch.get_num_threads(),
            self._dtype,
        )
        plans = {p.model: p.plan for p in known}
        self.passes: list[_Pass] = []
        for m, state in enumerate(states):
            if not own[m]:
                continue
            plan = plans.get(m)
            sparse = {i for i, c in plan.choices.items() if c.positions} if plan else set()
            if plan is None or set(plan.choices) != set(own[m]) or not sparse <= set(layers[m]):
                candidates = plan_pass(
                    program, state, own[m], layers[m], geometries, self._tuner, self._batch
                )
                compiled = self._fastest(m, candidates, state, geometries)
            else:
                plan = PassPlan(plan.choices, {i: layers[m][i] for i in sparse}, plan.segments)
                compiled = _Pass(m, plan, self._compile(m, plan, state, geometries))
            self.passes.append(compiled)
        self._workspaces: list[list[Workspace]] = []  # one for each pass; free ones

    def _fastest(
        self, model: int, plans: Sequence[PassPlan], state: ModelState, geometries: Geometries
    ) -> _Pass:
        """The faster of several plans, each timed as a whole pass on random inputs."""
        passes: dict[int, _Pass] = {}

        def compiled(k: int) -> _Pass:
            if k not in passes:
                codes = self._compile(model, plans[k], state, geometries)
                passes[k] = _Pass(model, plans[k], codes)
            return passes[k]

        images = image_values(self.program)
        outside = {v for code in compiled(0).codes for v in code.inputs}
        if not plans[0].layers or not outside <= images:
            return compiled(0)
        inputs: dict[Value, Any] = {}

        def prepare(k: int) -> Callable[[], Any]:
            one = compiled(k)
            space = Workspace(one.codes, self._batch)
            made: dict[Value, Any] = {}

            def run() -> None:
                for index, code in enumerate(one.codes):
                    for value in code.inputs:
                        if value not in made and value not in inputs:
                            inputs[value] = self._random(value)
                    taken = {v: made[v] if v in made else inputs[v] for v in code.inputs}
                    made.update(code.run(taken, self._batch, space, index))

            return run

        def seconds(k: int) -> float:
            text = repr([(i, c.kernel, c.seconds) for i, c in plans[k].choices.items()])
            key = ("pass", hashlib.sha256(text.encode()).hexdigest(), self._batch, str(self._dtype))
            return self._tuner.seconds(key, lambda: prepare(k))

        return compiled(min(range(len(plans)), key=seconds))

    def _random(self, value: Value) -> Any:
        """Something of a value's shape, to time with."""
        meta = self.program.meta[value]
        shape = [self._batch if n is None else n for n in meta.shape]
        if not meta.dtype.is_floating_point:
            return torch.zeros(shape, dtype=meta.dtype)
        dtype = self._dtype if meta.dtype == torch.float32 else meta.dtype
        return channels_last(torch.randn(shape).to(dtype))

    def _compile(
        self, model: int, plan: PassPlan, state: ModelState, geometries: Geometries
    ) -> list[Code]:
        program = self.program
        outside = set(program.outputs())
        for step in program.steps:
            runs = self._owners[step.result]
            for other, owner in enumerate(runs):
                if other == owner != model:  # another model runs this step
                    outside.update(v for v in step.values() if self._owners[v][other] == model)
        codes = []
        held: dict[Value, Positions] = {}  # on positions from one segment to the next
        for index, segment in enumerate(plan.segments):
            later = {
                v
                for other in plan.segments[index + 1 :]
                for i in other.steps
                for v in program.steps[i].values()
            }
            code = SegmentCompiler(
                program,
                state,
                segment,
                plan,
                geometries,
                batch=self._batch,
                outside=outside,
                later=later,
                held=held,
            ).compile()
            held.update(code.holds)
            codes.append(code)
        return codes

    def run(
        self,
        args: tuple[Any, ...],
        seconds: dict[tuple[int, int], list[float]] | None = None,
        whole: dict[int, float] | None = None,
    ) -> list[tuple[Any, Any]]:
        """Output and feature of each model.

        Args:
            args: the model's positional arguments.
            seconds: gains the times of the instructions of each (model, segment).
            whole: gains the time of each model's pass.

        Returns:
            (output, feature) of the dense model and of each level. Tensors are fresh, and fp32
            where the model's are.

        Raises:
            FastpieError: for inputs of another kind than the example's.
        """
        inputs = self.program.flatten(args)
        meta = self.program.meta
        batched = [value for value in self.program.inputs if None in meta[value].shape[:1]]
        images = next(
            x.shape[0] for v, x in zip(self.program.inputs, inputs, strict=True) if v in batched
        )
        if images == 0:  # run one image and hand out none of it
            inputs = [
                x.new_zeros((1, *x.shape[1:])) if v in batched else x
                for v, x in zip(self.program.inputs, inputs, strict=True)
            ]
        values: dict[tuple[Value, int], Any] = {
            (name, 0): x.detach().to(self._dtype) if x.dtype == torch.float32 else x.detach()
            for name, x in zip(self.program.inputs, inputs, strict=True)
        }
        with self._lock:
            workspaces = self._workspaces.pop() if self._workspaces else self._allocate()
        try:
            spaces = iter(workspaces)
            for one in self.passes:
                space = next(spaces)
                start = time.perf_counter()
                for index, code in enumerate(one.codes):
                    taken = {v: values[v, self._owners[v][one.model]] for v in code.inputs}
                    timed = None
                    if seconds is not None:
                        timed = seconds.setdefault((one.model, index), [0.0] * len(code.parts()))
                    results = code.run(taken, max(images, 1), space, index, timed)
                    values.update({(v, one.model): x for v, x in results.items()})
                if whole is not None:
                    whole[one.model] = time.perf_counter() - start
        finally:
            with self._lock:
                self._workspaces.append(workspaces)
        broken = self._broken(inputs, batched) if self.images_apart else None
        return [
            fresh_results(
                self.program,
                lambda value, m=m: values[value, self._owners[value][m]],  # type: ignore[misc]
                self._constants,
                images=images,
                computed=max(images, 1),
                broken=broken,
            )
            for m in range(self._models())
        ]

    def _broken(self, inputs: Sequence[Tensor], batched: Sequence[Value]) -> Tensor | None:
        """Which images have a NaN, if any has; oneDNN's fused activations make a number of it."""
        found = None
        for value, x in zip(self.program.inputs, inputs, strict=True):
            if value not in batched or not x.is_floating_point():
                continue
            pixels = x.detach().reshape(len(x), -1)
            if pixels.sum(1).isnan().any():  # or infinities of both signs
                nan = pixels.isnan().any(1)
                found = nan if found is None else found | nan
        return found if found is not None and bool(found.any()) else None

    def _models(self) -> int:
        return len(next(iter(self._owners.values())))

    def _allocate(self) -> list[Workspace]:
        return [Workspace(one.codes, self._batch) for one in self.passes]

    def report(self, args: tuple[Any, ...], names: Sequence[str]) -> list[dict[str, Any]]:
        """Share out the time of each pass to its layers; see DualEngine.report."""
        self.run(args)
        whole: dict[int, float] = {}
        self.run(args, whole=whole)
        seconds: dict[tuple[int, int], list[float]] = {}
        self.run(args, seconds)
        rows = []
        for one in self.passes:
            spent = [t for index in range(len(one.codes)) for t in seconds[one.model, index]]
            scale = whole[one.model] / sum(spent)  # clocks, and chained parts timed again, disturb
            parts = [(code, part) for code in one.codes for part in code.parts()]
            rows += [
                {
                    "model": names[one.model],
                    "layer": part.name,
                    "kernel": part.kernel,
                    "seconds": taken * scale,
                    "images": code.images or self._batch,
                    "over": self._over(one.plan, part.step),
                }
                for (code, part), taken in zip(parts, spent, strict=True)
            ]
        return rows

    def _over(self, plan: PassPlan, step: int | None) -> list[dict[str, Any]]:
        others = () if step is None else plan.choices[step].over
        return [{"kernel": kernel, "seconds": each * self._batch} for kernel, each in others]
