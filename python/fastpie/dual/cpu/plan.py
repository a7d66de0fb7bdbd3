"""The plan of one model's pass: for each step the form it runs in, and in how many images at once.

A step runs on tensors (oneDNN or torch) or on positions (the sparse kernels). Every choice is by
timing, conversions between the forms included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpie.dual.cpu.position_steps import (
    Layer,
    Size,
    as_5d,
    global_average,
    layer_of,
    pack,
    position_step,
    scale,
    unpack,
)
from fastpie.dual.images import final_values, image_values
from fastpie.dual.program import Affine, Call, Convolution, Linear, Program, Step, Value
from fastpie.dual.states import ModelState
from fastpie.dual.tensor_steps import channels_last, tensor_step
from fastpie.dual.tuning import Tuner
from fastpie.ops.positions import Buffer, Positions

__all__ = ["Choice", "Geometries", "PassPlan", "Segment", "plan_pass"]

_LINES = (4, 8, 14)
"""Tiles tried, in cache lines; see csrc/cpu/masked_conv.cpp for what binds."""

_WORKING_SET = 1 << 20
"""Bytes of one layer's result for each thread. Least of .5, 1, 2 and 4 MiB by a little; with more
the pruned pass of ResNet-50 took up to 1.3 times as long (Zen 4, 1 MiB of L2)."""

_TENSOR_BYTES = 16 << 20
"""Bytes of the largest tensor of a micro-batch. An allocator gives larger ones back at once (glibc
from 32 MiB), and the next has all its pages to be faulted in again: 5 % of the dense pass of
ResNet-50 at batch 16 (Zen 4; micro-batches of 4 and 8 images took the same, 2 a little more)."""

_WASTE = 1.2
"""Positions computed for each pixel that a geometry may cost before images are interleaved."""


@dataclass(frozen=True)
class Choice:
    """How a step runs.

    Attributes:
        positions: on positions, else on tensors.
        kernel: name for the report.
        seconds: measured, for each image; 0 where there was no choice.
        over: the other kernels and their seconds.
        lines: cache lines of a tile.
        blocked: whether input channels are cut into blocks.
    """

    positions: bool
    kernel: str
    seconds: float = 0.0
    over: tuple[tuple[str, float], ...] = ()
    lines: int = 8
    blocked: bool = True


class Geometries:
    """One geometry for each spatial size, so that layers of a stage read each other's results.

    Attributes:
        dtype: of the positions.
        threads: that share the work.
    """

    def __init__(
        self, layers: Sequence[Layer], batch: int, threads: int, dtype: torch.dtype
    ) -> None:
        """See the class."""
        self.dtype, self.threads = dtype, threads
        self._halo: dict[Size, Size] = {}
        self._channels: dict[Size, int] = {}
        for layer in layers:
            for size, channels in ((layer.size, layer.channels), (layer.input_size, 1)):
                known = self._halo.get(size, (0, 0, 0))
                halo = layer.views.halo if size == layer.size else (0, 0, 0)
                self._halo[size] = tuple(  # type: ignore[assignment]
                    max(a, b) for a, b in zip(known, halo, strict=True)
                )
                self._channels[size] = max(self._channels.get(size, 1), channels)
        self._images = {size: self._interleaved(size, batch, threads) for size in self._halo}
        pools = [layer for layer in layers if layer.kind == "max_pool"]
        for _ in pools:  # pooling keeps the images where they are; one may lower those of others
            for layer in pools:
                fewer = min(self._images[layer.size], self._images[layer.input_size])
                self._images[layer.size] = self._images[layer.input_size] = fewer

    def of(self, size: Size) -> Positions:
        """The geometry of a size."""
        return Positions(size, self._halo[size], self._images[size], self.dtype)

    def knows(self, size: Size) -> bool:
        """Whether some layer has this size."""
        return size in self._halo

    def images_at_once(self, size: Size) -> int:
        """Images of a micro-batch: enough for the threads, few enough for their caches."""
        p = self.of(size)
        each = p.plane * self._channels[size] * p.dtype.itemsize / p.images
        wanted = p.images * self.threads
        while 2 * wanted * each <= _WORKING_SET * self.threads:
            wanted *= 2
        return wanted

    def _interleaved(self, size: Size, batch: int, threads: int) -> int:
        """Fewest images in the lanes that leave few of them to the halo and to the last line."""
        images = 1
        if size == (1, 1, 1):
            return 16
        while images < 16:
            p = Positions(size, self._halo[size], images, self.dtype)
            pixels = size[0] * size[1] * size[2] * images
            if (p.valid != 0).sum() * p.line <= _WASTE * pixels or 2 * images * threads > batch:
                break
            images *= 2
        return images


@dataclass(frozen=True)
class Segment:
    """Steps of one pass that run one after another on some images at a time.

    Attributes:
        steps: positions in the program.
        images: of a micro-batch; 0: all.
    """

    steps: tuple[int, ...]
    images: int


@dataclass(frozen=True)
class PassPlan:
    """Plan of one model: its choices by step, and its segments in order."""

    choices: dict[int, Choice]
    layers: dict[int, Layer]
    segments: tuple[Segment, ...]


def plan_pass(
    program: Program,
    state: ModelState,
    steps: Sequence[int],
    layers: dict[int, Layer],
    geometries: Geometries,
    tuner: Tuner,
    batch: int,
) -> tuple[PassPlan, PassPlan]:
    """Choose form and kernel of each step of one model.

    Returns the plan of least seconds by the times of single layers, and the one on tensors alone:
    caches and memory see the whole, so the two are to be timed as passes.

    Args:
        program: the captured model.
        state: the model's tensors.
        steps: positions of the steps that this model runs itself.
        layers: the steps that can run on positions.
        geometries: of all layers.
        tuner: gives times.
        batch: the largest batch.
    """
    costs = _Costs(program, state, steps, layers, geometries, tuner, batch)
    plans = []
    for on_positions in (costs.choose(), set[int]()):
        choices = {i: costs.choice(i, i in on_positions) for i in steps}
        segments = _segments(program, steps, choices, layers, geometries, batch)
        plans.append(PassPlan(choices, {i: layers[i] for i in on_positions}, segments))
    return plans[0], plans[1]


class _Costs:
    """Seconds per image of each step in each form, and of the conversions; see plan_pass."""

    def __init__(
        self,
        program: Program,
        state: ModelState,
        steps: Sequence[int],
        layers: dict[int, Layer],
        geometries: Geometries,
        tuner: Tuner,
        batch: int,
    ) -> None:
        self._program, self._state, self._steps = program, state, steps
        self._batch, self._dtype, self._tuner = batch, geometries.dtype, tuner
        self._geometries, self._layers = geometries, layers
        self._makers = {program.steps[i].result: i for i in steps}
        self._readers: dict[Value, list[int]] = {}
        for i in steps:
            for value in dict.fromkeys(program.steps[i].values()):
                self._readers.setdefault(value, []).append(i)
        self._tensor: dict[int, float] = {}
        self._position: dict[int, Choice] = {}
        for i in steps:
            if i in layers:
                self._tensor[i] = self._time_tensor(i)
                self._position[i] = self._best_on_positions(i)

    def choice(self, i: int, positions: bool) -> Choice:
        """The step's kernel in a form, with what it was chosen over."""
        if i not in self._layers:
            return Choice(False, "")
        mine, other = self._position[i], (("onednn", self._tensor[i]),)
        if positions:
            return dataclasses.replace(mine, over=(*other, *mine.over))
        name = "onednn" if isinstance(self._program.steps[i], Convolution) else "torch"
        return Choice(False, name, self._tensor[i], ((mine.kernel, mine.seconds), *mine.over))

    def choose(self) -> set[int]:
        """The layers to run on positions: from each of three beginnings, change what pays."""
        if not self._position:
            return set()
        every = set(self._position)
        starts = [
            set(),
            every,
            {i for i in every if self._position[i].seconds < self._tensor[i]},
        ]
        return min((self._improve(start) for start in starts), key=self._total)

    def _improve(self, chosen: set[int]) -> set[int]:
        """Change the form of one layer, or of one and its readers, while that saves time."""
        chosen = set(chosen)
        changed = True
        while changed:
            changed = False
            for i in self._position:
                result = self._program.steps[i].result
                readers = {j for j in self._readers.get(result, ()) if j in self._position}
                for group in ({i}, {i, *readers}):
                    values = {v for j in group for v in self._touched(j)}
                    before = self._part(chosen, group, values)
                    trial = chosen ^ group
                    if self._part(trial, group, values) < before * (1 - 1e-9):
                        chosen, changed = trial, True
        return chosen

    def _touched(self, i: int) -> list[Value]:
        step = self._program.steps[i]
        return [*step.values(), step.result]

    def _total(self, chosen: set[int]) -> float:
        values = {v for i in self._steps for v in self._touched(i)}
        return self._part(chosen, set(self._steps), values)

    def _part(self, chosen: set[int], steps: set[int], values: set[Value]) -> float:
        """Seconds of some steps, and of converting some values."""
        seconds = sum(
            self._position[i].seconds if i in chosen else self._tensor.get(i, 0.0) for i in steps
        )
        return seconds + sum(self._conversion(value, chosen) for value in values)

    def _conversion(self, value: Value, chosen: set[int]) -> float:
        """Seconds to have a value in every form in which it is read."""
        maker = self._makers.get(value)
        here = maker in chosen and not self._layers[maker].gives_tensor
        for i in self._readers.get(value, ()):
            there = i in chosen and self._layers[i].reads_on_positions(value)
            either = there and value == self._layers[i].source and self._takes_either(i)
            if there != here and not either:
                return self._time_conversion(value, to_positions=there)
        return 0.0

    def _takes_either(self, i: int) -> bool:
        """Whether the layer copies its input anyway, from wherever it lies."""
        layer = self._layers[i]
        return layer.kind == "affine" or not layer.reads_in_place

    def _key(self, i: int) -> tuple[Any, ...]:
        """What the time of a step depends on, besides the kernel."""
        step = self._program.steps[i]
        shapes = tuple(self._program.meta[v].shape[1:] for v in step.values() if self._has_shape(v))
        if isinstance(step, Convolution | Linear):
            what: tuple[Any, ...] = (
                tuple(self._state.tensors[step.weight].shape),
                (step.stride, step.padding, step.padding_behind, step.dilation, step.groups)
                if isinstance(step, Convolution)
                else "linear",
                step.residual is not None,
                None if step.activation is None else step.activation.name,
            )
        elif isinstance(step, Affine):
            what = ("affine", None if step.activation is None else step.activation.name)
        else:
            assert isinstance(step, Call)
            what = (str(step.target), repr([a for a in step.args[1:] if not isinstance(a, Value)]))
        return (*what, shapes, str(self._dtype))

    def _has_shape(self, value: Value) -> bool:
        return value in self._program.meta

    def _inputs(self, step: Step, images: int) -> dict[Value, Any]:
        generator = torch.Generator().manual_seed(0)
        values: dict[Value, Any] = {}
        for value in step.values():
            shape = (images, *(n or 1 for n in self._program.meta[value].shape[1:]))
            x = torch.randn(shape, generator=generator).to(self._dtype)
            values[value] = channels_last(x)
        return values

    def _time_tensor(self, i: int) -> float:
        step = self._program.steps[i]
        images = min(self._batch, 4)

        def prepare() -> Any:
            values = self._inputs(step, images)
            sizes = tuple(values[step.values()[0]].shape)
            _, run = tensor_step(step, self._state, dtype=self._dtype, sizes=sizes)
            return lambda: run(values)

        return self._tuner.seconds(("tensor", *self._key(i), images), prepare) / images

    def _best_on_positions(self, i: int) -> Choice:
        layer = self._layers[i]
        positions = self._geometries.of(layer.size)
        images = min(self._batch, positions.images * torch.get_num_threads())
        density: float | None = None
        options = [(14, False)]
        if layer.kind in ("global_average", "scale"):
            return Choice(True, "positions", self._time_gate(i))
        if layer.kind == "concatenate":  # its inputs are written where the result lies
            return Choice(True, "in place")
        if layer.kind == "convolution":
            assert isinstance(layer.step, Convolution | Linear)
            density = 1.0
            if layer.step.weight in self._state.keep:
                keep = self._state.keep[layer.step.weight]
                density = float(f"{keep.sum().item() / keep.numel():.1e}")
            blocks = (False,) if self._dtype == torch.bfloat16 else (True, False)
            options = [(lines, blocked) for lines in _LINES for blocked in blocks]
        timed = []
        for lines, blocked in options:
            key = ("positions", *self._key(i), density, positions.images, positions.halo)

            def prepare(lines: int = lines, blocked: bool = blocked) -> Any:
                return self._prepare_on_positions(layer, positions, images, lines, blocked)

            seconds = self._tuner.seconds((*key, images, lines, blocked), prepare) / images
            name = f"sparse, {lines} lines" + (", blocked" if blocked else "")
            if layer.kind != "convolution":
                name = "positions"
            timed.append(Choice(True, name, seconds, (), lines, blocked))
        return min(timed, key=lambda c: c.seconds)

    def _time_gate(self, i: int) -> float:
        layer = self._layers[i]
        positions = self._geometries.of(layer.size)
        images = min(self._batch, positions.images * torch.get_num_threads())

        def prepare() -> Any:
            source, output = (Buffer(positions, layer.channels, images) for _ in range(2))
            if layer.gives_tensor:
                return lambda: global_average(source, images)
            factor = torch.ones((images, layer.channels), dtype=self._dtype)
            return lambda: scale(source, factor, output, images)

        key = ("positions", layer.kind, layer.channels, positions, images)
        return self._tuner.seconds(key, prepare) / images

    def _prepare_on_positions(
        self, layer: Layer, positions: Positions, images: int, lines: int, blocked: bool
    ) -> Any:
        step = layer.step
        values = self._inputs(step, images)
        chunks = chunks_for(positions, images, lines)
        run = position_step(
            layer, self._state, positions, lines=lines, blocked=blocked, chunks=chunks
        )
        source = as_5d(values[layer.source])
        apart = None
        input: Any = source
        if layer.kind != "affine" and layer.reads_in_place:
            input = Buffer(self._geometries.of(layer.input_size), source.shape[1], images)
            pack(source, input)
        elif layer.kind != "affine":
            apart = Buffer(positions, source.shape[1] * len(layer.views.phases), images)
        output = Buffer(positions, layer.channels, images)
        residual = None
        if isinstance(step, Convolution | Linear) and step.residual is not None:
            residual = Buffer(positions, layer.channels, images)
        return lambda: run(input, apart, output, residual, images)

    def _time_conversion(self, value: Value, *, to_positions: bool) -> float:
        meta = self._program.meta.get(value)
        if meta is None or any(n is None for n in meta.shape[1:]):
            return float("inf")
        _, channels, *rest = (int(n or 0) for n in meta.shape)
        size: Size = (1,) * (3 - len(rest)) + tuple(rest)  # type: ignore[assignment]
        if not self._geometries.knows(size):
            return float("inf")
        positions = self._geometries.of(size)
        images = min(self._batch, positions.images * torch.get_num_threads())

        def prepare() -> Any:
            x = channels_last(torch.zeros((images, channels, *rest), dtype=self._dtype))
            buffer = Buffer(positions, channels, images)
            return (lambda: pack(x, buffer)) if to_positions else (lambda: unpack(buffer, x))

        key = ("to positions" if to_positions else "to tensor", channels, positions, images)
        return self._tuner.seconds(key, prepare) / images


def chunks_for(positions: Positions, images: int, lines: int) -> int:
    """Cuts of the output channels: some where there are fewer tiles than the threads need."""
    threads = torch.get_num_threads()
    tiles = positions.groups(images) * -(-int((positions.valid != 0).sum()) // lines)
    return 1 if threads == 1 or tiles >= 4 * threads or tiles % threads == 0 else 2 * threads


def _segments(
    program: Program,
    steps: Sequence[int],
    choices: dict[int, Choice],
    layers: dict[int, Layer],
    geometries: Geometries,
    batch: int,
) -> tuple[Segment, ...]:
    """Cut the pass where one value is alive, by how many images suit what lies between."""
    images_of = image_values(program)
    apart = all(program.steps[i].result in images_of for i in steps)
    if not apart:
        return (Segment(tuple(steps), 0),) if steps else ()
    on_tensors = [i for i in steps if not choices[i].positions]
    tensors = _images_of_tensors(program, on_tensors, batch, geometries)
    last_use = program.last_use()
    own = {program.steps[i].result for i in steps}
    alive: set[Value] = set()
    atoms: list[list[int]] = [[]]
    for i in steps:
        atoms[-1].append(i)
        alive.add(program.steps[i].result)
        alive = {v for v in alive if last_use.get(v, -1) > i and v in own}
        if len(alive) == 1 and next(iter(alive)) in program.meta:
            atoms.append([])
    wanted: list[int | None] = []  # the least that a layer on positions wants
    for atom in atoms:
        sizes = [
            geometries.images_at_once(size)
            for i in atom
            if choices[i].positions
            for size in (layers[i].size, layers[i].input_size)
        ]
        wanted.append(min(sizes, default=None))
    segments: list[tuple[list[int], int]] = []
    for k, atom in enumerate(atoms):
        images = wanted[k]
        if images is None:  # between two others like them: no cut, which would be a copy
            around = [next((n for n in side if n), 0) for side in (wanted[:k][::-1], wanted[k:])]
            images = around[0] if around[0] == around[1] > 0 else tensors
        if segments and segments[-1][1] == images:
            segments[-1] = ([*segments[-1][0], *atom], images)
        elif atom:
            segments.append(([*atom], images))
    return tuple(
        Segment(tuple(part), 0 if images >= batch else images) for part, images in segments if part
    )


def _images_of_tensors(
    program: Program, steps: Sequence[int], batch: int, geometries: Geometries
) -> int:
    """Images of a micro-batch of steps on tensors; as even a cut of the batch as the threads allow."""
    threads = geometries.threads
    each = max(
        (
            math.prod(n or 1 for n in program.meta[program.steps[i].result].shape[1:])
            for i in steps
            if program.steps[i].result in program.meta
        ),
        default=1,
    )
    most = max(threads, _TENSOR_BYTES // (each * geometries.dtype.itemsize) // threads * threads)
    images = -(-batch // -(-batch // most))
    return min(most, -(-images // threads) * threads)


def layers_of(
    program: Program, state: ModelState, steps: Sequence[int], dtype: torch.dtype
) -> dict[int, Layer]:
    """The steps of one model that can run on positions."""
    found = {}
    outputs = final_values(program)
    images = image_values(program)
    for i in steps:
        step = program.steps[i]
        if step.result not in images:
            continue
        if isinstance(step, Linear) and step.result in outputs and dtype != torch.float32:
            continue  # the last layer is computed in fp32
        layer = layer_of(program, step, state)
        if layer is not None:
            found[i] = layer
    return found
