"""A compiled segment of a pass: instructions over tensors and buffers, and their execution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.program import Value
from fastpie.ops.positions import Buffer, Positions

__all__ = ["Code", "Frame", "Instruction", "Part", "Place", "Storage", "Workspace"]


@dataclass
class Frame:
    """What instructions see: values of a micro-batch, buffers, and results of the whole batch."""

    values: dict[Value, Any]
    buffers: list[Buffer]
    images: int
    first: int = 0
    batch: int = 0
    whole: dict[Value, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One layer or conversion.

    Attributes:
        step: position of the step in the program, or None for a conversion.
        name: of the step.
        kernel: of the call.
        run: computes it alone.
    """

    step: int | None
    name: str
    kernel: str
    run: Callable[[Frame], None]


@dataclass
class Instruction:
    """One call of a kernel: of one layer, or of several chained ones.

    Attributes:
        parts: the layers.
        run: the call.
        drop: values that nothing needs after it.
    """

    parts: list[Part]
    run: Callable[[Frame], None]
    drop: list[Value] = field(default_factory=list)

    def timed(self, frame: Frame) -> list[float]:
        """Run, and the seconds of each part: of chained ones its share by what each takes alone."""
        start = time.perf_counter()
        self.run(frame)
        together = time.perf_counter() - start
        if len(self.parts) == 1:
            return [together]
        alone = []
        for part in self.parts:  # computes the same again
            start = time.perf_counter()
            part.run(frame)
            alone.append(time.perf_counter() - start)
        return [together * seconds / sum(alone) for seconds in alone]


@dataclass(frozen=True)
class Place:
    """Channels of a storage that hold a value, or the value held between segments."""

    storage: int
    positions: Positions
    channels: int
    first: int
    of: int
    held: Value | None = None


@dataclass
class Storage:
    """Memory that values on positions share one after another."""

    positions: Positions
    planes: int  # of each group
    users: int = 0  # places in use
    # Within a chain: whether a layer of it wrote here, and the lag from which another may.
    chained: bool = False
    free_from: float | None = None


class Workspace:
    """The buffers of a pass, for one call at a time."""

    def __init__(self, codes: Sequence[Code], batch: int) -> None:
        """Allocate for the micro-batches of each segment, and for what is held between them."""
        held: dict[Value, Buffer] = {}
        for place in (p for code in codes for p in code.places):
            if place.held is not None and place.held not in held:
                held[place.held] = Buffer(place.positions, place.of, batch)
        self.buffers: list[list[Buffer]] = []
        for code in codes:
            images = code.images or batch
            whole = [Buffer(s.positions, s.planes, images) for s in code.storages]
            self.buffers.append(
                [
                    Buffer(
                        p.positions,
                        p.channels,
                        images,
                        within=whole[p.storage] if p.held is None else held[p.held],
                        first=p.first,
                        # A group keeps its planes whatever value lies there: in a chain the
                        # groups are not equally far.
                        of=p.of if p.held is not None else code.storages[p.storage].planes,
                    )
                    for p in code.places
                ]
            )


@dataclass
class Code:
    """A compiled segment.

    Attributes:
        images: of a micro-batch; 0: the whole batch.
        inputs: tensors that it takes from outside.
        outputs: tensors that others need.
        holds: values that it leaves on positions for later segments, with their geometry.
        instructions: in order.
    """

    images: int
    inputs: list[Value]
    outputs: list[Value]
    holds: dict[Value, Positions]
    instructions: list[Instruction]
    storages: list[Storage]
    places: list[Place]

    def parts(self) -> list[Part]:
        """The parts of all instructions, in order."""
        return [part for instruction in self.instructions for part in instruction.parts]

    def run(
        self,
        values: dict[Value, Any],
        batch: int,
        workspace: Workspace,
        index: int,
        seconds: list[float] | None = None,
    ) -> dict[Value, Any]:
        """Run on a batch and return the outputs; `seconds` gains the time of each instruction."""
        micro = self.images or batch
        held = [k for k, p in enumerate(self.places) if p.held is not None]
        whole_buffers = workspace.buffers[index]
        frame = Frame({}, list(whole_buffers), micro, batch=batch)
        parts: dict[Value, list[Any]] = {value: [] for value in self.outputs}
        for first in range(0, batch, micro):
            images = min(micro, batch - first)
            frame.first, frame.images = first, images
            for place in held:
                frame.buffers[place] = whole_buffers[place].from_image(first)
            if images == batch:
                frame.values = {v: values[v] for v in self.inputs}
            else:
                frame.values = {v: values[v][first : first + images] for v in self.inputs}
            position = 0
            for instruction in self.instructions:
                if seconds is None:
                    instruction.run(frame)
                else:
                    for spent in instruction.timed(frame):
                        seconds[position] += spent
                        position += 1
                for value in instruction.drop:
                    del frame.values[value]
            for value, part in parts.items():
                if value not in frame.whole:
                    part.append(frame.values[value])
        whole = {
            value: part[0] if len(part) == 1 else torch.cat(part)
            for value, part in parts.items()
            if part
        }
        return {**whole, **frame.whole}
