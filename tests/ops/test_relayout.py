"""The kernel `relayout` against plain indexing, in any order of the dimensions on either side."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpie import _C
from fastpie.ops.packing import ACTIVATIONS
from fastpie.ops.positions import dtype_code

DTYPES = list(itertools.product([torch.float32, torch.bfloat16], repeat=2))
SLOPE = 0.3
ACTIVATE = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}
EXACT = ("none", "relu", "relu6", "leaky_relu")


@dataclass
class Side:
    """An array in some order: memory that ends with its last element, and where the first lies."""

    memory: Tensor
    strides: Sequence[int]
    first: int

    def view(self, sizes: Sequence[int]) -> Tensor:
        return self.memory.as_strided(sizes, self.strides, self.first)

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.first * self.memory.element_size()


def random_side(
    sizes: Sequence[int], dtype: torch.dtype, order: Sequence[int], generator: random.Random
) -> Side:
    """Random values; the last dimension of `order` is the closest."""
    pick = generator.choice
    strides, step = [0] * 7, pick([1, 1, 1, 2, 3])
    for d in reversed(order):
        strides[d] = step
        step = step * max(1, sizes[d]) + pick([0, 0, 1, 5])
    first = pick([0, 1, 3, 16])
    reach = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n)
    return Side((torch.randn(first + reach + 1) * 4).to(dtype), strides, first)


def relayout(
    source: Side,
    target: Side,
    sizes: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    threads: int = 1,
) -> None:
    _C.relayout_cpu(
        source.address,
        dtype_code(source.memory.dtype),
        tuple(source.strides),
        target.address,
        dtype_code(target.memory.dtype),
        tuple(target.strides),
        tuple(sizes),
        0 if scale is None else scale.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        ACTIVATIONS[activation],
        SLOPE,
        threads,
    )


def check(
    source: Side,
    target: Side,
    sizes: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    threads: int = 1,
) -> None:
    """Compare the whole memory of the target: what no index reaches must be as it was."""
    x = source.view(sizes).float()
    per_channel = (1, -1, 1, 1, 1, 1, 1)
    if scale is not None:
        x = x * scale.view(per_channel)
    if shift is not None:
        x = x + shift.view(per_channel)
    expected = Side(target.memory.clone(), target.strides, target.first)
    expected.view(sizes).copy_(ACTIVATE[activation](x))
    relayout(source, target, sizes, scale, shift, activation, threads)
    found = target.memory
    if activation in EXACT:
        assert torch.equal(found, expected.memory), (sizes, source.strides, target.strides)
    else:
        half = found.dtype is torch.bfloat16
        tolerance = {"rtol": 8e-3 if half else 2e-6, "atol": 2e-6}
        torch.testing.assert_close(found, expected.memory, **tolerance)


def random_order(generator: random.Random) -> list[int]:
    return generator.sample(range(7), 7)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize(("source_dtype", "target_dtype"), DTYPES)
def test_random_sizes_and_strides(
    source_dtype: torch.dtype,
    target_dtype: torch.dtype,
    capability: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    generator = random.Random(f"{capability}{source_dtype}{target_dtype}")
    for _ in range(60):
        sizes = [generator.choice([1, 1, 1, 2, 3, 4, 5, 8, 9]) for _ in range(7)]
        source, target = (
            random_side(sizes, dtype, random_order(generator), generator)
            for dtype in (source_dtype, target_dtype)
        )
        if generator.random() < 0.2:  # an expanded dimension
            source.strides[generator.randrange(7)] = 0
        scale, shift = (
            torch.randn(sizes[1]) if generator.random() < 0.4 else None for _ in range(2)
        )
        activation = generator.choice(["none", "none", *ACTIVATE])
        check(source, target, sizes, scale, shift, activation, generator.choice([1, 2]))


@pytest.mark.parametrize("lanes", [2, 4, 8, 16, 3, 17])
@pytest.mark.parametrize(("source_dtype", "target_dtype"), DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_short_lines_of_images_side_by_side(
    lanes: int, source_dtype: torch.dtype, target_dtype: torch.dtype, scaled: bool
) -> None:
    generator = random.Random(lanes)
    sizes = [2, 3, 1, 1, 5, 7, lanes]
    scale, shift = (torch.randn(3), torch.randn(3)) if scaled else (None, None)
    for order in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 1, 6], [6, 0, 1, 2, 3, 4, 5]):
        source, target = (
            random_side(sizes, dtype, order, generator) for dtype in (source_dtype, target_dtype)
        )
        check(source, target, sizes, scale, shift)
        for side in (source, target):  # as images side by side are: without a gap
            side.strides[:] = [*(torch.empty(sizes).stride())]
            side.memory = torch.randn(side.first + torch.Size(sizes).numel()).to(side.memory.dtype)
        check(source, target, sizes, scale, shift)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("width", [*range(1, 14), 64])
def test_lines_are_read_to_their_last_element_and_no_further(width: int, stride: int) -> None:
    """Every second pixel is read in pairs: the last pair would end behind the memory."""
    sizes = [1, 2, 1, 1, 3, width, 1]
    for source_dtype, target_dtype in DTYPES:
        row = (width - 1) * stride + 1
        source = Side(
            torch.randn(6 * row).to(source_dtype), [0, 3 * row, 0, 0, row, stride, 0], first=0
        )
        memory = torch.full((6 * width,), 7.0, dtype=target_dtype)
        target = Side(memory, [0, 3 * width, 0, 0, width, 1, 0], 0)
        check(source, target, sizes)
        check(target, source, sizes, torch.tensor([2.0, -1.0]), None, "relu")


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100])
def test_both_phases_of_a_line_at_once(
    width: int, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels at even places to one plane, those at odd places to the next."""
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    sizes = [1, 3, 2, 1, 5, width, 1]
    for source_dtype, target_dtype in DTYPES:
        source = Side(
            torch.randn(30 * width).to(source_dtype), [0, 10 * width, 1, 0, 2 * width, 2, 0], 0
        )
        plane = 5 * width + 3
        memory = torch.full((6 * plane - 3,), 7.0, dtype=target_dtype)
        target = Side(memory, [0, 2 * plane, plane, 0, width, 1, 0], 0)
        check(source, target, sizes)
        check(source, target, sizes, activation="relu")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("order", list(itertools.permutations([1, 4, 6]))[::2])
def test_arrays_large_enough_for_several_threads(order: tuple[int, ...], threads: int) -> None:
    generator = random.Random(threads)
    sizes = [3, 20, 1, 1, 33, 1, 32]
    source = random_side(sizes, torch.float32, [0, 2, 3, 5, *order], generator)
    target = random_side(sizes, torch.bfloat16, [0, 2, 3, 5, 1, 4, 6], generator)
    check(source, target, sizes, torch.randn(20), torch.randn(20), "relu", threads)
    check(target, source, sizes, threads=threads)


@pytest.mark.parametrize("empty", range(7))
def test_without_elements_nothing_is_written(empty: int) -> None:
    sizes = [2, 3, 2, 2, 2, 2, 4]
    generator = random.Random(empty)
    source = random_side(sizes, torch.float32, range(7), generator)
    target = random_side(sizes, torch.float32, range(7), generator)
    before = target.memory.clone()
    sizes[empty] = 0
    relayout(source, target, sizes)
    assert torch.equal(target.memory, before)


def test_one_element() -> None:
    for source_dtype, target_dtype in DTYPES:
        source = Side(torch.randn(1).to(source_dtype), [9] * 7, 0)
        target = Side(torch.zeros(1).to(target_dtype), [5] * 7, 0)
        check(source, target, [1] * 7)
        check(source, target, [1] * 7, torch.ones(1) * 3, torch.ones(1), "relu6")


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("transposed", [False, True])
def test_rounding_and_special_values_are_those_of_torch(
    transposed: bool, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, the largest numbers, subnormal ones, infinities and NaN, from fp32 to bf16 and back."""
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    around = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (halves[::7, None] + around).view(torch.float32)  # every exponent, NaN too
    rows = len(values)
    sizes = [1, 1, 1, 1, rows, 6, 1]
    source = Side(values.contiguous(), [0, 0, 0, 0, 6, 1, 0], 0)
    strides = [0, 0, 0, 0, 1, rows, 0] if transposed else source.strides
    target = Side(torch.zeros(rows * 6, dtype=torch.bfloat16), strides, 0)
    relayout(source, target, sizes)
    found, expected = target.view(sizes)[0, 0, 0, 0, :, :, 0], values.bfloat16()
    assert torch.equal(found.isnan(), values.isnan())
    ordered = ~values.isnan()
    bits = torch.int16
    assert torch.equal(found[ordered].view(bits), expected[ordered].view(bits))
    back = Side(torch.zeros(rows * 6), source.strides, 0)
    relayout(target, back, sizes)
    assert torch.equal(back.memory.view(rows, 6)[ordered], expected.float()[ordered])
    assert torch.equal(back.memory.view(rows, 6).isnan(), values.isnan())
    # A copy without a change of dtype keeps the bits, those of a NaN too.
    copy = Side(torch.zeros(rows * 6), strides, 0)
    relayout(source, copy, sizes)
    found = copy.view(sizes)[0, 0, 0, 0, :, :, 0]
    assert torch.equal(found.contiguous().view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
@pytest.mark.parametrize("activation", ACTIVATE)
def test_activations_of_special_values(
    activation: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    values = torch.tensor([torch.nan, torch.inf, 1e38, 3.4e38, 100, -100, -1e30, 0.0, -0.0, 1e-44])
    sizes = [1, 1, 1, 1, 1, len(values), 1]
    source = Side(values, [0, 0, 0, 0, 0, 1, 0], 0)
    target = Side(torch.zeros(len(values)), source.strides, 0)
    relayout(source, target, sizes, activation=activation)
    expected = ACTIVATE[activation](values.double()).float()
    if activation == "hardswish":  # x * relu6(x + 3) is infinite in fp32, in torch too
        expected = ACTIVATE[activation](values)
    torch.testing.assert_close(target.memory, expected, equal_nan=True, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("side", [0, 1])
def test_fp16_is_refused(side: int) -> None:
    sides = [Side(torch.zeros(4), [0, 0, 0, 0, 0, 1, 0], 0) for _ in range(2)]
    sides[side].memory = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="fp32 or bf16"):
        relayout(*sides, [1, 1, 1, 1, 1, 4, 1])
