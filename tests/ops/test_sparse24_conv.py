"""The convolution on sparse tensor cores against its fp64 twin, emulated and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference
from fastpie.ops.sparse24 import pack_sparse24, sparse24_conv_cuda

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.125),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_emulated, id="emulated"),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        if (reason := _native.cuda_unusable_reason()) is not None:
            pytest.skip(reason)
    return request.param


@dataclass(frozen=True)
class Case:
    filters: int = 64
    channels: int = 32
    kernel: tuple[int, ...] = (1, 1)
    size: tuple[int, ...] = (7, 9)
    images: int = 2
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    behind: tuple[int, ...] | None = None  # padding, where it is another
    dilation: tuple[int, ...] = (1, 1)
    density: float = 0.2
    rows: int = 64
    tile_pixels: int = 64
    dtype: torch.dtype = torch.bfloat16
    with_scale: bool = True
    with_bias: bool = True
    with_residual: bool = False
    activation: str = "none"


CASES = {
    "1x1": Case(),
    "1x1, two tiles of pixels": Case(channels=96, size=(11, 13), tile_pixels=128),
    "nothing kept": Case(density=0.0),
    "no spills": Case(density=0.03, channels=64),
    "half": Case(density=0.5, channels=64),
    "dense": Case(density=1.0, channels=64, with_scale=False, with_bias=False),
    "3x3": Case(kernel=(3, 3), padding=(1, 1), channels=64, density=0.1),
    "3x3, half": Case(kernel=(3, 3), padding=(1, 1), density=0.5, dtype=torch.float16),
    "3x3, dense": Case(kernel=(3, 3), padding=(1, 1), channels=64, density=1.0),
    "stride": Case(kernel=(3, 3), stride=(2, 2), padding=(1, 1), size=(9, 8)),
    "uneven stride": Case(kernel=(1, 3), stride=(3, 2), padding=(0, 2), size=(8, 5)),
    "dilation": Case(kernel=(3, 3), padding=(2, 4), dilation=(2, 3), size=(9, 10), density=0.4),
    "more padding behind": Case(kernel=(3, 3), padding=(0, 1), behind=(2, 3), stride=(2, 1)),
    "window larger than the image": Case(kernel=(5, 5), padding=(2, 2), size=(2, 3), images=5),
    "several tiles of filters": Case(filters=200, density=0.3, with_residual=True),
    "odd filters": Case(filters=77, with_residual=True, activation="relu"),
    "tiles of 128 rows": Case(filters=192, rows=128, density=0.4, dtype=torch.float16),
    "tiles of 128 rows and pixels": Case(
        filters=136, rows=128, tile_pixels=128, size=(12, 11), with_residual=True
    ),
    "chosen tiles": Case(tile_pixels=0, size=(16, 17), images=3),
    "1D": Case(
        kernel=(3,), size=(40,), stride=(2,), padding=(1,), dilation=(2,), with_residual=True
    ),
    "3D": Case(
        kernel=(3, 2, 1), size=(4, 3, 5), stride=(2, 1, 1), padding=(1, 1, 0), dilation=(1, 2, 1)
    ),
    "linear": Case(kernel=(), size=(), stride=(), padding=(), dilation=(), images=70, filters=30),
    "nothing": Case(images=0),
}


def run(case: Case, device: str) -> None:
    """Compute into a poisoned output and compare with fp64 on the rounded operands."""

    def channels_last(*shape: int) -> Tensor:
        return torch.randn(shape).to(case.dtype).movedim(-1, 1)

    x = channels_last(case.images, *case.size, case.channels)
    weight = torch.randn(case.filters, *case.kernel, case.channels).to(case.dtype)
    mask = torch.rand(weight.shape) < case.density
    scale = torch.rand(case.filters) + 0.5 if case.with_scale else None
    bias = torch.randn(case.filters) if case.with_bias else None
    behind = case.padding if case.behind is None else case.behind
    size = [
        (n + p + q - d * (k - 1) - 1) // s + 1
        for n, p, q, d, k, s in zip(
            case.size, case.padding, behind, case.dilation, case.kernel, case.stride, strict=True
        )
    ]
    shape = (case.images, *size, case.filters)
    residual = channels_last(*shape) if case.with_residual else None

    packed = pack_sparse24(weight, mask, case.rows).to(device)
    memory = torch.full((math.prod(shape) + 64,), torch.nan, dtype=case.dtype, device=device)
    output = memory[: math.prod(shape)].view(shape).movedim(-1, 1)
    moved = [None if t is None else t.to(device) for t in (scale, bias, residual)]
    geometry = (case.stride, case.padding, case.dilation)
    sparse24_conv_cuda(
        x.to(device), packed, *moved, output, *geometry, (case.activation, 0.125), case.tile_pixels
    )
    assert memory[math.prod(shape) :].isnan().all(), "written behind the output"

    if case.behind is not None:  # the twin takes what is padded the same before and behind
        ends = [
            n for p, q in reversed(list(zip(case.padding, behind, strict=True))) for n in (p, q)
        ]
        x, geometry = F.pad(x, ends), (case.stride, (0,) * len(size), case.dilation)

    def twin(x: Tensor, weight: Tensor, add: list[Tensor | None], activation: str) -> Tensor:
        words = reference.pack_mask(mask.movedim(-1, 1))
        s, b, r = (None if t is None else t.double() for t in add)
        return reference.masked_conv_nhwc(
            [x.double()], weight.double(), [words], [s], [b], [r], *geometry, 1, ACTIVATIONS[activation]
        )[0]  # fmt: skip

    expected = twin(x, weight, [scale, bias, residual], case.activation)
    added = [scale] + [None if t is None else t.abs() for t in (bias, residual)]
    terms = twin(x.abs(), weight.abs(), added, "none")
    rounding = 2**-8 if case.dtype is torch.bfloat16 else 2**-10
    error = (output.cpu().double() - expected).abs()
    bad = ~(error <= rounding * expected.abs() + 1e-5 * terms + 1e-7)
    assert not bad.any(), f"{int(bad.sum())} of {bad.numel()}, largest error {error.max()}"


@pytest.mark.parametrize("name", CASES)
def test_is_the_twin(name: str, device: str) -> None:
    run(CASES[name], device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: str) -> None:
    run(Case(activation=activation, with_residual=True, dtype=torch.float16), device)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_the_threads(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    run(CASES["3x3, half"], device)
    run(replace(CASES["3x3, half"], filters=128, rows=128, density=0.7), device)


def test_products_are_those_of_the_packing(device: str) -> None:
    """One kept weight a row and one pixel not 0: each output is one product, exactly."""
    torch.manual_seed(5)
    weight = torch.randn(64, 3, 3, 32).half()
    mask = torch.rand(64, 288).argsort(1).argsort(1).view(weight.shape) < 100
    packed = pack_sparse24(weight, mask).to(device)
    for _ in range(3):
        place = tuple(int(torch.randint(n, ())) for n in (3, 3, 32))
        x = torch.zeros(1, 3, 3, 32, dtype=torch.half)
        x[(0, *place)] = 1.0
        output = torch.full((1, 1, 1, 64), torch.nan, dtype=torch.half, device=device)
        sparse24_conv_cuda(
            x.movedim(-1, 1).to(device), packed, None, None, None, output.movedim(-1, 1),
            (1, 1), (0, 0), (1, 1),
        )  # fmt: skip
        column = (slice(None), *place)
        assert torch.equal(output.view(64).cpu(), torch.where(mask, weight, 0)[column])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, "channels to be a multiple of 32"),
        ({"rows": 32}, "tiles of 64 or 128 rows"),
        ({"dtype": torch.float32}, "bf16 or fp16"),
        ({"tile_pixels": 32}, "64 or 128 pixels"),
        ({"kernel": (17, 17), "padding": (8, 8)}, "1 to 256 taps"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(
    change: dict[str, object], message: str, device: str
) -> None:
    with pytest.raises(FastpieError, match=message):
        run(replace(Case(), **change), device)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused() -> None:
    packed = pack_sparse24(torch.randn(64, 1, 1, 32).half(), torch.ones(64, 1, 1, 32).bool())
    x, out = (torch.empty(2, 5, 5, c, dtype=torch.half).movedim(-1, 1) for c in (32, 64))
    good = {
        "input": x, "packed": packed, "scale": None, "bias": None, "residual": None, "output": out,
        "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "activation": ("none", 0.0),
    }  # fmt: skip
    for change, message in (
        ({"input": x.contiguous()}, "`input`.*last in memory"),
        ({"input": x[:, :16]}, "`input`.*second of size 32"),
        ({"input": x.float()}, "`input` to be torch.float16"),
        ({"output": out[:1]}, "`output` to have 2 images, but got 1"),
        ({"output": out.movedim(1, -1)}, "`output`.*second of size 64"),
        ({"residual": out[..., :3].movedim(1, -1).contiguous().movedim(-1, 1)}, "`residual`"),
        ({"scale": torch.ones(32)}, r"`scale` to be contiguous float32 of shape \[64\]"),
        ({"bias": torch.ones(64).half()}, "`bias`.*but got torch.float16"),
        ({"stride": (1,)}, "for each of the 2 dimensions"),
        ({"stride": (0, 1)}, "`stride` to be >= 1"),
        ({"padding": (-1, 0)}, "`padding` to be >= 0"),
        ({"activation": ("tanh", 0.0)}, "but got 'tanh'"),
    ):
        with pytest.raises(FastpieError, match=message):
            sparse24_conv_cuda(**{**good, **change})  # type: ignore[arg-type]
    if not _C.cuda_emulated:
        with pytest.raises(FastpieError, match="CUDA device, but got cpu"):
            sparse24_conv_cuda(**good)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_can_be_captured_in_a_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weight = torch.randn(64, 3, 3, 64, device="cuda").bfloat16()
    packed = pack_sparse24(weight, torch.rand(weight.shape) < 0.2)
    x = torch.randn(4, 9, 9, 64, device="cuda").bfloat16().movedim(-1, 1)
    outputs = [torch.full_like(x, torch.nan) for _ in range(2)]

    def call(output: Tensor) -> None:
        geometry = ((1, 1), (1, 1), (1, 1))
        sparse24_conv_cuda(x, packed, None, None, None, output, *geometry, ("relu", 0.0))

    call(outputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(outputs[1])
    graph.replay()
    assert torch.equal(outputs[0], outputs[1])
