"""A GPU that is none: the engine's device and kernels on the CPU, recording what is launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.gpu.device import Key, Launch
from fastpie.dual.gpu.kernels import ChannelsLast, Family, Torch
from fastpie.ops import reference
from tile_check import activation_function


class FakeDevice:
    """Runs everything at once, on the CPU; see fastpie.dual.gpu.device.Device.

    It knows for each stream how far it has waited for the others, and fails where a launch reads
    what its stream has not waited for, or uses a stream that a graph has not taken in.

    Attributes:
        launches: since the last replay or call began.
        graphs: captured so far.
        replays: of graphs.
    """

    def __init__(self, l2_bytes: int = 1 << 30) -> None:
        self.scope = "fake"
        self.l2_bytes = l2_bytes
        self.torch_device = torch.device("cpu")
        self.launches: list[Launch] = []
        self.graphs = self.replays = 0
        self.entered = self.left = 0
        self._stream: int | None = None  # that of the engine's block, if any
        self._begin()

    def _begin(self) -> None:
        self.launches = []
        self._clock = [[0, 0], [0, 0]]  # [stream][other]: how much of the other it has waited for
        self._made: dict[Key, tuple[int, int]] = {}

    @contextlib.contextmanager
    def stream(self, index: int) -> Iterator[None]:
        before, self._stream = self._stream, index
        yield
        self._stream = before

    def wait(self, waiting: int, awaited: int) -> None:
        assert waiting != awaited
        mine, others = self._clock[waiting], self._clock[awaited]
        self._clock[waiting] = [max(a, b) for a, b in zip(mine, others, strict=True)]

    def hold(self, tensor: Tensor, stream: int) -> None:
        assert isinstance(tensor, Tensor)

    def enter(self) -> None:
        assert self._stream is None  # the caller's stream is the current one
        self.entered += 1

    def leave(self, tensors: list[Tensor]) -> None:
        assert self._stream is None
        self.left += 1

    def launched(self, launch: Launch) -> None:
        s = launch.stream
        assert self._stream == s
        for key in launch.reads:
            maker, when = self._made.get(key, (s, 0))
            assert self._clock[s][maker] >= when, f"{launch.step} reads {key} too early"
        self._clock[s][s] += 1
        if s == 1:
            assert self._clock[1][0] or not self._clock[0][0], (
                "a graph has not taken this stream in"
            )
        self._made.update(dict.fromkeys(launch.writes, (s, self._clock[s][s])))
        self.launches.append(launch)

    def seconds(self, call: Callable[[], Any]) -> float:
        assert self._stream == 0  # what `call` reads was made on this stream
        call()
        return 1e-3

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        self.graphs += 1
        self._begin()
        with self.stream(0):
            call()
        names = [launch.step for launch in self.launches]

        def replay() -> None:
            self.replays += 1
            self._begin()
            with self.stream(0):
                call()
            assert [launch.step for launch in self.launches] == names
            # The main stream has waited for everything: what comes after may read it.
            assert self._clock[0][1] == self._clock[1][1]

        return replay


def launch_twin(
    inputs: Sequence[Tensor],
    weight: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    activation: tuple[str, float],
    tile: int,
) -> None:
    """The readable twin in place of a kernel: computes in fp32, rounds once."""

    def full(tensors: Sequence[Tensor | None]) -> list[Any]:
        return [None if t is None else t.float() for t in tensors]

    rank = len(stride)
    xs = full(inputs)
    if rank:  # what lies behind the image follows from the size of the result
        behind = []
        for d in range(rank):
            taps = (weight.shape[1 + d] - 1) * dilation[d] + 1
            wanted = (outputs[0].shape[2 + d] - 1) * stride[d] + taps
            behind.append(wanted - padding[d] - xs[0].shape[2 + d])
        pad = [p for d in reversed(range(rank)) for p in (padding[d], behind[d])]
        xs = [torch.nn.functional.pad(x, pad) for x in xs]
    for x in (*inputs, *outputs):
        assert rank != 2 or x.is_contiguous(memory_format=torch.channels_last)
    results = reference.masked_conv_nhwc(
        xs, weight.float(), masks, full(scales), full(biases), full(residuals),
        stride, [0] * rank, dilation, groups, activation_function(activation),
    )  # fmt: skip
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


def families(names: Sequence[str] = ("triton", "cuda"), tiles: int = 2) -> list[Family]:
    """torch's operators and twins under the names of our kernels."""
    activations = {"none", "relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu", "gelu_tanh"}
    return [
        Torch(),
        *(
            ChannelsLast(
                name,
                launch_twin,
                lambda layer, models: [(f"tile {i}", {"tile": i}) for i in range(tiles)],
                frozenset({torch.float32, torch.bfloat16, torch.float16}),
                frozenset(activations),
            )
            for name in names
        ),
    ]
