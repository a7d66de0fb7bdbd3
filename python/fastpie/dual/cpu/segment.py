"""From the steps of a segment to instructions over tensors and buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastpie.dual.cpu.code import Code, Frame, Instruction, Part, Place, Storage
from fastpie.dual.cpu.plan import Choice, Geometries, PassPlan, Segment, chunks_for
from fastpie.dual.cpu.position_steps import (
    Layer,
    PackedStep,
    PositionStep,
    Size,
    as_5d,
    global_average,
    pack,
    position_step,
    same_views,
    scale,
    unpack,
)
from fastpie.dual.images import final_values
from fastpie.dual.program import Affine, Call, Convolution, Linear, Program, Value
from fastpie.dual.states import ModelState
from fastpie.dual.tensor_steps import tensor_step
from fastpie.ops.packing import run_chain, to_positions
from fastpie.ops.positions import Positions

__all__ = ["SegmentCompiler"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class _Member:
    """A layer of a chain."""

    step: int
    run: PackedStep
    source: int  # places
    output: int
    residual: int | None
    lag: int
    kernel: str


_CHAIN_LINES = 8  # of a tile: the tiles of a bottleneck of ResNet-50 together fit 1 MiB of L2


_POOLED_BYTES = 384 << 10
"""Of a convolution's result that waits for its pooling at a time, for each thread: with the input
it fits 1 MiB of L2."""


class SegmentCompiler:
    """Turns the steps of a segment into instructions, once.

    Args:
        program: the captured model.
        state: the model's tensors.
        segment: which steps, in how many images.
        plan: form and kernel of each step, and the steps on positions.
        geometries: of all sizes.
        batch: the largest batch.
        outside: values that other models or the caller need, as tensors.
        later: values that later segments of this pass need.
        held: values that earlier segments hold on positions.
    """

    def __init__(
        self,
        program: Program,
        state: ModelState,
        segment: Segment,
        plan: PassPlan,
        geometries: Geometries,
        *,
        batch: int,
        outside: set[Value],
        later: set[Value],
        held: dict[Value, Positions],
    ) -> None:
        """See the class."""
        self._program, self._state, self._segment = program, state, segment
        self._choices, self._layers, self._geometries = plan.choices, plan.layers, geometries
        self._dtype = geometries.dtype
        self._images = segment.images or batch
        self._held = held
        self._final = final_values(program)
        self._made = {program.steps[i].result: i for i in segment.steps}
        self._last: dict[Value, int] = {}
        for i in segment.steps:
            for value in (*program.steps[i].values(), program.steps[i].result):
                self._last[value] = i
        # What is made on positions for later segments stays there; the rest goes as tensors.
        self._hold = {
            v for v in later - outside if v in self._made and self._made_on_positions(self._made[v])
        }
        self._wanted = outside | later - self._hold
        self._instructions: list[Instruction] = []
        self._tensors: set[Value] = set()  # values that lie as tensors now
        self._fresh: set[Value] = set()  # ... in memory of their own
        self._where: dict[Value, int] = {}  # place of each value on positions
        self._storages: list[Storage] = []
        self._places: list[Place] = []
        self._slots: dict[Value, tuple[int, int, int]] = {}  # root, first channel, of
        self._chain: list[_Member] = []
        self._chain_drop: list[Value] = []
        self._pooled: set[int] = set()  # poolings that run with the convolution before them
        self._roots: dict[int, int] = {}  # storage of each root
        self._root_users: dict[int, set[Value]] = {}

    def compile(self) -> Code:
        """The segment's instructions."""
        steps = self._program.steps
        inputs = list(
            dict.fromkeys(
                v for i in self._segment.steps for v in steps[i].values() if v not in self._made
            )
        )
        for value in [v for v in inputs if v in self._held]:
            inputs.remove(value)
            channels = int(self._program.meta[value].shape[1] or 0)
            self._where[value] = self._hold_place(value, self._held[value], channels)
        self._tensors.update(inputs)
        self._assign_slots()
        for i in self._segment.steps:
            begin = len(self._instructions)
            if self._choices[i].positions:
                self._on_positions(i)
            else:
                self._on_tensors(i)
            self._release(i, begin)
        self._end_chain()
        outputs = [v for v in self._made if v in self._wanted]
        # A micro-batch begins with a whole group of images in every geometry of the segment.
        group = max((place.positions.images for place in self._places), default=1)
        return Code(
            -(-self._segment.images // group) * group,
            inputs,
            outputs,
            {v: self._places[self._where[v]].positions for v in self._hold},
            self._instructions,
            self._storages,
            self._places,
        )

    def _made_on_positions(self, i: int) -> bool:
        return self._choices[i].positions and not self._layers[i].gives_tensor

    # ------------------------------------------------------------------ tensors

    def _on_tensors(self, i: int) -> None:
        self._end_chain()
        step = self._program.steps[i]
        for value in dict.fromkeys(step.values()):
            self._need_tensor(value)
        sizes = None
        overwrite = False
        if isinstance(step, Convolution):
            shape = self._program.meta[step.input].shape
            if all(n is not None for n in shape[1:]):
                sizes = (self._images, *(int(n or 0) for n in shape[1:]))
            overwrite = step.residual is not None and self._may_overwrite(step.residual, i)
        kernel, run = tensor_step(
            step,
            self._state,
            dtype=self._dtype,
            sizes=sizes,
            overwrite_residual=overwrite,
            is_output=step.result in self._final,
        )
        result = step.result

        def execute(frame: Frame) -> None:
            frame.values[result] = run(frame.values)

        self._emit(i, kernel, execute)
        self._tensors.add(result)
        if isinstance(step, Convolution | Affine):
            self._fresh.add(result)

    def _may_overwrite(self, value: Value, i: int) -> bool:
        """Whether nothing needs the memory of a value after step i, which reads it last."""
        if value not in self._fresh or value in self._wanted or self._last[value] != i:
            return False
        steps = self._program.steps
        if list(steps[i].values()).count(value) != 1:
            return False
        return not any(
            isinstance(user, Call) and value in user.aliased()
            for user in (steps[j] for j in self._segment.steps)
            if value in user.values()
        )

    def _need_tensor(self, value: Value) -> None:
        if value in self._tensors:
            return
        self._end_chain()
        place = self._where[value]
        shape = tuple(int(n or 0) for n in self._program.meta[value].shape[1:])
        memory = _FORMATS.get(len(shape) + 1, torch.contiguous_format)
        dtype, whole = self._dtype, value in self._wanted

        def execute(frame: Frame) -> None:
            if whole and frame.images < frame.batch:
                if value not in frame.whole:
                    frame.whole[value] = torch.empty(
                        (frame.batch, *shape), dtype=dtype, memory_format=memory
                    )
                y = frame.whole[value][frame.first : frame.first + frame.images]
            else:
                y = torch.empty((frame.images, *shape), dtype=dtype, memory_format=memory)
            unpack(frame.buffers[place], y)
            frame.values[value] = y

        self._emit(None, "to tensor", execute, name=self._name_of(value))
        self._tensors.add(value)
        self._fresh.add(value)

    # ------------------------------------------------------------------ positions

    def _on_positions(self, i: int) -> None:
        if i in self._pooled:
            return
        step, layer, choice = self._program.steps[i], self._layers[i], self._choices[i]
        positions = self._geometries.of(layer.size)
        if layer.kind == "concatenate":
            self._concatenate(i, layer, positions)
            return
        if layer.kind in ("global_average", "scale"):
            self._gate(i, layer, positions)
            return
        source = layer.source
        copies = layer.kind == "affine" or not layer.reads_in_place
        from_tensor = copies and (
            source not in self._where
            or self._geometries.of(layer.input_size).images not in (1, positions.images)
        )
        if from_tensor:
            self._need_tensor(source)
        elif source not in self._where:
            self._need_positions(source, layer.input_size)
        residual = None
        if isinstance(step, Convolution | Linear) and step.residual is not None:
            self._need_positions(step.residual, layer.size)
            residual = self._where[step.residual]
        chunks = chunks_for(positions, self._images, choice.lines)
        chains = (
            layer.kind == "convolution"
            and not copies
            and positions.groups(self._images) >= torch.get_num_threads()
        )
        pool = self._pool_behind(i)
        if pool is not None and residual is None:
            self._end_chain()
            self._with_pool(i, pool, None if from_tensor else self._where[source])
            return
        if not chains or (self._chain and self._chain[0].run.packed.positions != positions):
            self._end_chain()
        run = position_step(
            layer,
            self._state,
            positions,
            lines=choice.lines,
            blocked=choice.blocked,
            chunks=1 if chains else chunks,
        )
        if chains:
            assert isinstance(run, PackedStep)
            self._chain_on(i, run, self._where[source], residual, layer, choice)
        else:
            self._alone(i, run, layer, choice, None if from_tensor else self._where[source])
        if step.result in self._wanted:
            self._need_tensor(step.result)

    def _pool_behind(self, i: int) -> int | None:
        """The max pooling that alone reads the result of a convolution too large for the cache."""
        result = self._program.steps[i].result
        readers = [j for j in self._segment.steps if result in self._program.steps[j].values()]
        if result in self._wanted or result in self._hold or len(readers) != 1:
            return None
        pool = self._layers.get(readers[0])
        if self._layers[i].kind != "convolution" or pool is None or pool.kind != "max_pool":
            return None
        return readers[0] if self._channels_at_once(self._layers[i]) < pool.channels else None

    def _channels_at_once(self, layer: Layer) -> int:
        positions = self._geometries.of(layer.size)
        return max(1, _POOLED_BYTES // (positions.plane * positions.dtype.itemsize))

    def _with_pool(self, i: int, j: int, place: int | None) -> None:
        """A convolution and its pooling, some channels at a time: they stay in the cache."""
        layer, pool, choice = self._layers[i], self._layers[j], self._choices[i]
        positions, pooled = self._geometries.of(layer.size), self._geometries.of(pool.size)
        source, result = layer.source, self._program.steps[j].result
        count = -(-layer.channels // self._channels_at_once(layer))
        run = position_step(
            layer, self._state, positions, lines=choice.lines, blocked=choice.blocked, chunks=count
        )
        assert isinstance(run, PackedStep)
        pool_step = position_step(pool, self._state, pooled, lines=8, blocked=False, chunks=1)
        edges = [int(n) for n in run.packed.weights.chunk_channels]
        apart = None
        if not layer.reads_in_place:
            channels = int(self._program.meta[source].shape[1] or 0) * len(layer.views.phases)
            apart = self._allocate(positions, channels, private=True)
        between = self._allocate(positions, max(b - a for a, b in itertools.pairwise(edges)))
        output = self._allocate_for(result, pooled, pool.channels)
        whole = self._places[output]
        parts = range(len(self._places), len(self._places) + count)
        for a, b in itertools.pairwise(edges):
            self._places.append(replace(whole, channels=b - a, first=whole.first + a))

        def execute(frame: Frame) -> None:
            buffers, images = frame.buffers, frame.images
            given = as_5d(frame.values[source]) if place is None else buffers[place]
            given = run.taken_apart(given, None if apart is None else buffers[apart], images)
            for chunk, part in enumerate(parts):
                run.packed.run(
                    given,
                    buffers[between],
                    images,
                    activation=run.activation,
                    slope=run.slope,
                    chunk=chunk,
                )
                pool_step(buffers[between], None, buffers[part], None, images)

        self._emit(
            i, f"{choice.kernel}, with {self._program.steps[j].name.split('/')[-1]}", execute
        )
        self._storages[self._places[between].storage].users -= 1
        self._where[result] = output
        self._pooled.add(j)
        if result in self._wanted:
            self._need_tensor(result)

    def _alone(
        self, i: int, run: PositionStep, layer: Layer, choice: Choice, place: int | None
    ) -> None:
        step = self._program.steps[i]
        source = layer.source
        positions = self._geometries.of(layer.size)
        residual = None
        if isinstance(step, Convolution | Linear) and step.residual is not None:
            residual = self._where[step.residual]
        apart = None
        if layer.kind != "affine" and not layer.reads_in_place:
            channels = int(self._program.meta[source].shape[1] or 0) * len(layer.views.phases)
            apart = self._allocate(positions, channels, private=True)
        output = self._allocate_for(step.result, positions, layer.channels)

        def execute(frame: Frame) -> None:
            buffers = frame.buffers
            run(
                as_5d(frame.values[source]) if place is None else buffers[place],
                None if apart is None else buffers[apart],
                buffers[output],
                None if residual is None else buffers[residual],
                frame.images,
            )

        self._emit(i, choice.kernel, execute)
        self._where[step.result] = output

    # ------------------------------------------------------------------ chains

    def _chain_on(
        self,
        i: int,
        run: PackedStep,
        source: int,
        residual: int | None,
        layer: Layer,
        choice: Choice,
    ) -> None:
        """Add a layer to the chain; see MaskedConvChainArgs for its lag."""
        behind, ahead = run.packed.reach(_CHAIN_LINES)
        lags = {member.output: member.lag for member in self._chain}
        lag = max(
            lags[source] + ahead if source in lags else 0,
            lags.get(residual, 0) if residual is not None else 0,
        )
        for place, reach in ((source, behind), (residual, 0)):
            if place is not None and self._places[place].held is None:
                storage = self._storages[self._places[place].storage]
                until = float(lag + reach) if storage.chained else float("inf")
                storage.free_from = max(storage.free_from or 0.0, until)
        result = self._program.steps[i].result
        positions = run.packed.positions
        output = self._allocate_for(result, positions, layer.channels, lag=lag)
        if self._places[output].held is None:
            storage = self._storages[self._places[output].storage]
            storage.chained, storage.free_from = True, float(lag)
        self._chain.append(_Member(i, run, source, output, residual, lag, choice.kernel))
        self._where[result] = output

    def _end_chain(self) -> None:
        """Emit the chain so far."""
        members, self._chain = self._chain, []
        drop, self._chain_drop = self._chain_drop, []
        for storage in self._storages:
            storage.chained, storage.free_from = False, None
        if not members:
            return
        positions = members[0].run.packed.positions
        threads = torch.get_num_threads()

        def part(member: _Member) -> Part:
            def execute(frame: Frame) -> None:
                buffers = frame.buffers
                residual = None if member.residual is None else buffers[member.residual]
                member.run(
                    buffers[member.source], None, buffers[member.output], residual, frame.images
                )

            return Part(member.step, self._program.steps[member.step].name, member.kernel, execute)

        parts = [part(member) for member in members]
        lags = [member.lag for member in members]

        def together(frame: Frame) -> None:
            if positions.groups(frame.images) < threads:  # layer by layer all threads have work
                for one in parts:
                    one.run(frame)
                return
            buffers = frame.buffers
            layers = [
                m.run.packed.layer(
                    buffers[m.source],
                    buffers[m.output],
                    residual=None if m.residual is None else buffers[m.residual],
                    activation=m.run.activation,
                    slope=m.run.slope,
                )
                for m in members
            ]
            run_chain(layers, lags, positions, _CHAIN_LINES, frame.images)

        run = parts[0].run if len(parts) == 1 else together
        self._instructions.append(Instruction(parts, run, drop))

    # ------------------------------------------------------------------ conversions

    def _need_positions(self, value: Value, size: Size) -> None:
        if value in self._where:
            return
        self._end_chain()
        positions = self._geometries.of(size)
        channels = int(self._program.meta[value].shape[1] or 0)
        place = self._allocate_for(value, positions, channels)

        def execute(frame: Frame) -> None:
            pack(frame.values[value], frame.buffers[place])

        self._emit(None, "to positions", execute, name=self._name_of(value))
        self._where[value] = place

    def _concatenate(self, i: int, layer: Layer, positions: Positions) -> None:
        self._end_chain()
        step = self._program.steps[i]
        for value in dict.fromkeys(step.values()):
            self._need_positions(value, layer.size)
        result = self._allocate_for(step.result, positions, layer.channels)
        target = self._places[result]
        copies = []
        first = target.first
        for value in step.values():
            source = self._places[self._where[value]]
            if (source.storage, source.first) != (target.storage, first) or target.held:
                place = replace(target, channels=source.channels, first=first)
                self._places.append(place)
                copies.append((self._where[value], len(self._places) - 1))
            first += source.channels
        views = same_views(layer.size)

        def execute(frame: Frame) -> None:
            for source, destination in copies:
                to_positions(
                    frame.buffers[source],
                    frame.buffers[destination],
                    views,
                    (1, 1, 1),
                    images=frame.images,
                )

        self._emit(i, f"positions, {len(copies)} copied", execute)
        self._where[step.result] = result
        if step.result in self._wanted:
            self._need_tensor(step.result)

    def _gate(self, i: int, layer: Layer, positions: Positions) -> None:
        """The two ends of squeeze-and-excitation: an average, and a factor for each channel."""
        self._end_chain()
        step = self._program.steps[i]
        self._need_positions(layer.source, layer.size)
        source = self._where[layer.source]
        if layer.gives_tensor:
            shape = [int(n or 0) for n in self._program.meta[step.result].shape[1:]]

            def average(frame: Frame) -> None:
                means = global_average(frame.buffers[source], frame.images)
                frame.values[step.result] = means.reshape(frame.images, *shape)

            self._emit(i, "positions", average)
            self._tensors.add(step.result)
            return
        factor = step.values()[layer.factor]
        self._need_tensor(factor)
        output = self._allocate_for(step.result, positions, layer.channels)

        def execute(frame: Frame) -> None:
            scale(frame.buffers[source], frame.values[factor], frame.buffers[output], frame.images)

        self._emit(i, "positions", execute)
        self._where[step.result] = output
        if step.result in self._wanted:
            self._need_tensor(step.result)

    # ------------------------------------------------------------------ memory

    def _assign_slots(self) -> None:
        """Let the inputs of a concatenation be written where its result lies."""
        steps = self._program.steps
        cats = [
            i
            for i in self._segment.steps
            if self._choices[i].positions and self._layers[i].kind == "concatenate"
        ]
        for root, i in enumerate(reversed(cats)):
            result, values = steps[i].result, steps[i].values()
            channels = [int(self._program.meta[v].shape[1] or 0) for v in values]
            total = sum(channels)
            slots = [self._slots.get(v) for v in values]
            if result not in self._slots and slots[0] is not None:
                where, first, of = slots[0]
                expected = [(where, first + sum(channels[:k]), of) for k in range(len(values))]
                if slots == expected and result not in self._hold:
                    self._slots[result] = slots[0]
                    continue
            if result in self._hold:  # copied there
                continue
            where, first, of = self._slots.setdefault(result, (root, 0, total))
            for value, count in zip(values, channels, strict=True):
                if value not in self._hold and value not in self._where:
                    self._slots.setdefault(value, (where, first, of))
                first += count
        for value, (root, _, _) in self._slots.items():
            self._root_users.setdefault(root, set()).add(value)

    def _hold_place(self, value: Value, positions: Positions, channels: int) -> int:
        self._places.append(Place(-1, positions, channels, 0, channels, held=value))
        return len(self._places) - 1

    def _allocate_for(
        self, value: Value, positions: Positions, channels: int, *, lag: int | None = None
    ) -> int:
        if value in self._hold:
            return self._hold_place(value, positions, channels)
        if value not in self._slots:
            return self._allocate(positions, channels, lag=lag)
        root, first, of = self._slots[value]
        if root not in self._roots:
            place = self._allocate(positions, of)
            self._roots[root] = self._places[place].storage
        storage = self._roots[root]
        self._places.append(Place(storage, positions, channels, first, of))
        return len(self._places) - 1

    def _allocate(
        self,
        positions: Positions,
        channels: int,
        *,
        private: bool = False,
        lag: int | None = None,
    ) -> int:
        """A place of its own. What holds phases is private for ever: its halo is another.

        A layer of a chain may write where others of it have read, if it lags far enough behind
        them; what the chain reads from outside stays as it is.
        """
        index = None
        if not private:
            free = [
                k
                for k, s in enumerate(self._storages)
                if s.users == 0
                and s.positions == positions
                and (s.free_from is None or (lag is not None and s.free_from <= lag))
            ]
            fits = [k for k in free if self._storages[k].planes >= channels]
            if fits:
                index = min(fits, key=lambda k: self._storages[k].planes)
            elif free:
                index = max(free, key=lambda k: self._storages[k].planes)
        if index is None:
            self._storages.append(Storage(positions, channels))
            index = len(self._storages) - 1
        storage = self._storages[index]
        storage.planes = max(storage.planes, channels)
        storage.users += 1
        self._places.append(Place(index, positions, channels, 0, channels))
        return len(self._places) - 1

    def _release(self, i: int, begin: int) -> None:
        """Free what step i was the last to need."""
        dead = [
            v
            for v, last in self._last.items()
            if last == i and (v not in self._wanted or v not in self._made)
        ]
        drop = [v for v in dead if v in self._tensors]
        self._tensors.difference_update(drop)
        if self._chain:
            self._chain_drop += drop
        elif len(self._instructions) > begin:
            self._instructions[-1].drop += drop
        for value in (v for v, last in self._last.items() if last == i):
            if value not in self._where or self._places[self._where[value]].held is not None:
                continue
            if value in self._slots:
                root = self._slots[value][0]
                self._root_users[root].discard(value)
                if not self._root_users[root] and root in self._roots:
                    self._storages[self._roots[root]].users -= 1
            else:
                self._storages[self._places[self._where[value]].storage].users -= 1

    # ------------------------------------------------------------------ instructions

    def _emit(
        self, i: int | None, kernel: str, run: Callable[[Frame], None], *, name: str | None = None
    ) -> None:
        self._end_chain()
        label = name if i is None else self._program.steps[i].name
        self._instructions.append(Instruction([Part(i, label or "", kernel, run)], run))

    def _name_of(self, value: Value) -> str:
        i = self._made.get(value)
        return str(value) if i is None else self._program.steps[i].name
