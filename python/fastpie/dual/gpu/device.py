"""What the engine asks of a GPU: streams, graphs, clocks.

Planning, capture and execution know a GPU through `Device` alone, so that they run without one: the
tests put a device in its place that runs on the CPU and records the launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpie.dual.program import Value
from fastpie.dual.tuning import kernels_digest

__all__ = ["CudaDevice", "Device", "Key", "Launch", "fp32_convolutions", "tf32_allowed"]

_FLUSH_BYTES = 256 << 20
"""Written before each timed call: several times the largest L2 (60 MB on an H200), so that inputs
come from memory."""

_HEAD_START = 2_000_000
"""Cycles, about 1 ms, that the GPU waits before a timed call, so that the CPU has queued all its
launches by then: in a graph they cost nothing, from Python (an estimate) 10 to 200 us each."""

_REPEATS = 9
_WARM_UP = 2


Key = tuple[Value, int]
"""A value of the program and the first model that has it."""


@dataclass(frozen=True)
class Launch:
    """One call: a kernel for one or two models, or an operator of torch for one.

    Attributes:
        step: name of the step.
        kernel: "" where there was no choice.
        models: that it computes for.
        stream: it runs on.
        reads: what it needs.
        writes: what it makes, one for each model.
        run: from the values so far, and memory to write to or None, to the results.
        drop: what nothing needs after it.
    """

    step: str
    kernel: str
    models: tuple[int, ...]
    stream: int
    reads: list[Key]
    writes: list[Key]
    run: Callable[[Mapping[Key, Any], list[Tensor | None]], list[Any]]
    drop: list[Key] = field(default_factory=list)


class Device(Protocol):
    """A GPU, or what stands for one in a test.

    Attributes:
        scope: what the time of a kernel depends on besides its work: model, driver, libraries.
        l2_bytes: of the cache that all multiprocessors share.
        torch_device: where tensors live.
    """

    scope: str
    l2_bytes: int
    torch_device: torch.device

    def stream(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """Issue what the block launches to stream `index`; 0 is the engine's main stream."""

    def wait(self, waiting: int, awaited: int) -> None:
        """Let one stream wait for all that another was given so far."""

    def hold(self, tensor: Tensor, stream: int) -> None:
        """Let the memory of a tensor of another stream not be used again before `stream` is done."""

    def enter(self) -> None:
        """Let the main stream wait for the caller's."""

    def leave(self, tensors: list[Tensor]) -> None:
        """Let the caller's stream wait for the main one, and hold the tensors for it."""

    def launched(self, launch: Launch) -> None:
        """Told of each launch before it is issued."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median time of a call on the main stream, its inputs not in the cache."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """A graph of all that `call` launches; the function returned launches it again."""


class CudaDevice:
    """A CUDA device through torch."""

    def __init__(self, device: torch.device) -> None:
        """Two streams of its own on a device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 32 << 20))
        self.scope = " | ".join(
            (
                f"{properties.name} {properties.major}.{properties.minor}",
                f"torch {torch.__version__}",
                f"cudnn {torch.backends.cudnn.version()}",
                f"kernels {kernels_digest(triton=True)}",
            )
        )
        self._streams = [torch.cuda.Stream(self.torch_device) for _ in range(2)]

    @contextlib.contextmanager
    def stream(self, index: int) -> Iterator[None]:
        """See Device."""
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._streams[index]):
            yield

    def wait(self, waiting: int, awaited: int) -> None:
        """See Device."""
        self._streams[waiting].wait_stream(self._streams[awaited])

    def hold(self, tensor: Tensor, stream: int) -> None:
        """See Device."""
        tensor.record_stream(self._streams[stream])

    def enter(self) -> None:
        """See Device."""
        self._streams[0].wait_stream(torch.cuda.current_stream(self.torch_device))

    def leave(self, tensors: list[Tensor]) -> None:
        """See Device."""
        current = torch.cuda.current_stream(self.torch_device)
        current.wait_stream(self._streams[0])
        for tensor in tensors:
            tensor.record_stream(current)

    def launched(self, launch: Launch) -> None:
        """See Device; here nobody listens."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """See Device."""
        with self.stream(0):
            flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.torch_device)
            for _ in range(_WARM_UP):
                call()
            times = []
            for _ in range(_REPEATS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_HEAD_START)
                flush.zero_()
                start.record()
                call()
                end.record()
                times.append((start, end))
            self._streams[0].synchronize()
            milliseconds: list[float] = sorted(start.elapsed_time(end) for start, end in times)
            return milliseconds[_REPEATS // 2] / 1e3

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """See Device."""
        with self.stream(0):
            for _ in range(_WARM_UP):  # libraries set themselves up, which no graph can hold
                call()
            self._streams[0].synchronize()
        graph = torch.cuda.CUDAGraph()
        # A thread that decodes or pins memory meanwhile must not break the capture.
        capture = torch.cuda.graph(
            graph, stream=self._streams[0], capture_error_mode="thread_local"
        )
        with torch.cuda.device(self.torch_device):
            # cuBLAS's workspace belongs to the stream and may be freed (torch.compile does); one
            # that is made during the capture belongs to the graph.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with capture:
                    call()
            finally:
                torch._C._cuda_clearCublasWorkspaces()

        def replay() -> None:
            with self.stream(0):
                graph.replay()

        return replay


@contextlib.contextmanager
def fp32_convolutions(*, allow_tf32: bool) -> Iterator[None]:
    """Let cuDNN compute fp32 convolutions in TF32 or not, while the block runs."""
    settings: Any = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9
    name, value = ("fp32_precision", "tf32" if allow_tf32 else "ieee")
    if settings is None:
        settings, name, value = torch.backends.cudnn, "allow_tf32", allow_tf32  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def tf32_allowed() -> bool:
    """Whether the user lets fp32 products be computed in TF32, ten bits of mantissa.

    `torch.set_float32_matmul_precision("high")` or `torch.backends.cuda.matmul.allow_tf32 = True`.
    torch's default for convolutions alone, which is TF32, does not count.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    if setting is not None and setting != "none":
        return bool(setting == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)
