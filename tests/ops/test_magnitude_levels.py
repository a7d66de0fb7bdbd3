"""`magnitude_levels`: exact selection by magnitude, the CUDA kernels against the twin bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpie import _C, FastpieError, ops
from fastpie.ops import _native, reference
from fastpie.ops.magnitude_levels import _kernel_arguments
from fastpie.pruning.prune import _levels_of

SENTINEL = 0xAB


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.float32)


def _finite_bits(*shape: int) -> Tensor:
    """Every finite fp32 number is as likely as any other."""
    bits = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    x = _bits(bits)
    return torch.where(x.isfinite(), x, 1.0)


WEIGHTS = {
    "normal": torch.randn,
    "ties": lambda *shape: torch.randn(shape).mul(3).round() / 3,
    "zeros": lambda *shape: torch.where(torch.rand(shape) < 0.7, -0.0, torch.randn(shape)).where(
        torch.rand(shape) < 0.7, torch.tensor(0.0)
    ),
    "equal": lambda *shape: torch.full(shape, -0.25),
    # Around the largest subnormal number and among the smallest ones.
    "subnormal": lambda *shape: _bits(torch.randint(0x7FFFE0, 0x800020, shape).to(torch.int32)),
    "tiny": lambda *shape: _bits(torch.randint(0, 40, shape).to(torch.int32)),
    "any_bits": _finite_bits,
    # Equal but for the digit of one pass.
    "last_digit": lambda *shape: _bits(0x3F800000 + torch.randint(0, 256, shape).to(torch.int32)),
    "third_digit": lambda *shape: _bits(
        0x3F800000 + torch.randint(0, 256, shape).to(torch.int32) * 256
    ),
    "ascending": lambda *shape: torch.arange(shape[0] * shape[1]).float().reshape(shape),
    "descending": lambda *shape: -torch.arange(shape[0] * shape[1]).flip(0).float().reshape(shape),
}


def _counts(total: int, levels: int) -> list[int]:
    return torch.randint(0, total + 1, (levels,)).sort().values.tolist()


# ---------------------------------------------------------------------------- the twin, the operator


@pytest.mark.parametrize("kind", WEIGHTS)
def test_twin_is_what_prune_selects_with_numpy(kind: str) -> None:
    weight = WEIGHTS[kind](13, 31)
    sparsities = [0.0, 0.1, 0.5, 0.501, 0.9, 1.0]
    codes, nonfinite = reference.magnitude_levels([weight], [round(s * 403) for s in sparsities])
    want = _levels_of(weight.abs().reshape(-1).numpy(), sparsities)
    assert torch.equal(codes, torch.from_numpy(want))
    assert nonfinite.tolist() == [0]


def test_operator_orders_equal_magnitudes_by_place_in_the_list() -> None:
    weights = [torch.tensor([[2.0, -1.0]]), torch.tensor([1.0, 0.0, -2.0]).half()]
    codes, nonfinite = ops.magnitude_levels(weights, [0, 2, 4])
    assert codes.tolist() == [2, 1, 2, 1, 3]
    assert codes.dtype is torch.uint8
    assert nonfinite.tolist() == [0, 0]


def test_operator_counts_what_is_not_finite() -> None:
    weights = [torch.tensor([1.0, torch.nan, -torch.inf]), torch.ones(3), torch.tensor([torch.inf])]
    assert ops.magnitude_levels(weights, [1])[1].tolist() == [2, 0, 1]


def test_operator_passes_torch_opcheck() -> None:
    arguments = ([torch.randn(3, 4), torch.randn(5).half()], [2, 9])
    torch.library.opcheck(torch.ops.fastpie.magnitude_levels.default, arguments)


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        ([], [1], "at least one tensor"),
        ([torch.zeros(3).double()], [1], "float64"),
        ([torch.zeros(3)], [], "1 to 255"),
        ([torch.zeros(3)], [1] * 256, "1 to 255"),
        ([torch.zeros(3)], [-1], r"\[0, 3\]"),
        ([torch.zeros(3)], [4], r"\[0, 3\]"),
        ([torch.zeros(3)], [2, 1], "do not decrease"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], [1], "one device"),
    ],
)
def test_bad_arguments_are_refused(weights: list[Tensor], counts: list[int], message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.magnitude_levels(weights, counts)


# ---------------------------------------------------------------------------- the CUDA kernels


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_emulated, id="emulated"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
            ],
            id="gpu",
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[0, 1], ids=["seed0", "seed1"])
def _seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of threads, where they are emulated."""
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(request.param))


def _kernel(weights: list[Tensor], counts: list[int], device: str, blocks: int) -> list[Tensor]:
    """Codes and counts of bad weights of the kernels, on poisoned memory."""
    weights = [weight.to(device) for weight in weights]
    codes, nonfinite, arguments, alive = _kernel_arguments(weights, counts, blocks)
    codes.fill_(SENTINEL)
    nonfinite.fill_(-1)
    alive[-1].fill_(SENTINEL)  # the workspace
    _native.call(_C.magnitude_levels_cuda, *arguments, 0)
    return [codes.cpu(), nonfinite.cpu()]


def _check(weights: list[Tensor], counts: list[int], device: str, blocks: int = 2) -> None:
    got = _kernel(weights, counts, device, blocks)
    want = reference.magnitude_levels(weights, counts)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


@pytest.mark.usefixtures("_seed")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_kernels_of_every_kind_of_weights(kind: str, device: str) -> None:
    weights = [WEIGHTS[kind](*shape) for shape in ((7, 300), (1, 1), (33, 31), (4, 9))]
    total = sum(weight.numel() for weight in weights)
    _check(weights, [0, 0, *_counts(total, 5), total], device)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "mixed"])
def test_kernels_in_half_precision(dtypes: str, kind: str, device: str) -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    chosen = {"bf16": [bf16] * 3, "fp16": [fp16] * 3, "mixed": [fp16, fp32, bf16]}[dtypes]
    shapes = ((3, 700), (5, 5), (40, 30))
    weights = [WEIGHTS[kind](*s).to(d) for s, d in zip(shapes, chosen, strict=True)]
    weights[0][0, :9] = torch.linspace(0, 5e-7, 9).to(chosen[0])  # subnormal in fp16
    _check(weights, _counts(3325, 6), device)


@pytest.mark.parametrize(
    "sizes", [[1], [0, 1, 0], [0, 0], [31, 33], [1023, 1024, 1025], [0, 5, 0, 2048, 0]], ids=str
)
def test_kernels_on_odd_sizes(sizes: list[int], device: str) -> None:
    weights = [torch.randn(n).mul(50).round() for n in sizes]
    total = sum(sizes)
    _check(weights, [0], device)
    _check(weights, [total], device)
    _check(weights, _counts(total, 3), device)


@pytest.mark.parametrize("kind", ["any_bits", "ties", "equal"])
def test_kernels_with_as_many_levels_as_codes_have(kind: str, device: str) -> None:
    weight = WEIGHTS[kind](50, 40)
    _check([weight], _counts(2000, 255), device)
    _check([weight], list(range(1000, 1255)), device)


@pytest.mark.usefixtures("_seed")
@pytest.mark.parametrize("blocks", [1, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_kernels_when_warps_read_several_tiles(kind: str, blocks: int, device: str) -> None:
    weights = [WEIGHTS[kind](*shape) for shape in ((130, 500), (1, 9), (10, 1000))]
    _check(weights, _counts(75_009, 4), device, blocks)


@pytest.mark.parametrize("counts", [[0], [5], [1500]])
def test_kernels_count_what_is_not_finite(counts: list[int], device: str) -> None:
    weights = [torch.randn(n) for n in (1, 700, 3, 2000)]
    weights[0][0] = torch.nan
    weights[1][torch.randperm(700)[:90]] = -torch.inf
    weights[3][torch.randperm(2000)[:1100]] = -torch.nan
    assert _kernel(weights, counts, device, 2)[1].tolist() == [1, 90, 0, 1100]
    halves = [weight.half() for weight in weights]
    assert _kernel(halves, counts, device, 2)[1].tolist() == [1, 90, 0, 1100]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_operator_on_a_gpu(kind: str) -> None:
    weights = [WEIGHTS[kind](*shape) for shape in ((3000, 2000), (17, 9), (1500, 2001))]
    weights.append(WEIGHTS[kind](64, 72).view(64, 8, 3, 3).to(memory_format=torch.channels_last))
    counts = _counts(sum(weight.numel() for weight in weights), 40)
    codes, nonfinite = ops.magnitude_levels([weight.cuda() for weight in weights], counts)
    want = reference.magnitude_levels(weights, counts)
    assert torch.equal(codes.cpu(), want[0])
    assert torch.equal(nonfinite.cpu(), want[1])
