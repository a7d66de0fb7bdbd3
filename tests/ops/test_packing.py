"""The kernel `masked_conv` and its packing: positions in, positions out, against float64."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpie import _C, FastpieError
from fastpie.ops.packing import (
    ACTIVATIONS,
    PackedConv,
    PackedInputGradient,
    from_positions,
    to_positions,
)
from fastpie.ops.positions import Buffer, Positions, Views, views_of

CAPABILITIES = _C.cpu_capabilities()
DTYPES = [torch.float32, torch.bfloat16]
SLOPE = 0.2
ACTIVATE = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}
ONE = (1, 1, 1)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", request.param)
    assert _C.cpu_capability() == request.param
    return request.param


@dataclass
class Layer:
    """A masked convolution of some images; values that bf16 holds exactly where asked for."""

    x: Tensor  # [N, C, D, H, W]
    weight: Tensor  # [K, C / groups, kd, kh, kw]
    keep: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ONE
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = ONE
    groups: int = 1

    @property
    def views(self) -> Views:
        geometry = (self.x.shape[2:], self.weight.shape[2:])
        return views_of(*map(tuple, geometry), self.stride, self.padding, self.dilation)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def exact(self) -> Tensor:  # float64
        bias = None if self.bias is None else self.bias.double()
        return self.convolve(self.x.double(), (self.weight * self.keep).double(), bias)

    def size_of_terms(self) -> Tensor:  # float64, the sum of the absolute values of the terms
        bias = None if self.bias is None else self.bias.double().abs()
        weight = (self.weight * self.keep).double().abs()
        return self.convolve(self.x.double().abs(), weight, bias)


def random_layer(generator: random.Random, dtype: torch.dtype = torch.float32) -> Layer:
    """Any rank, stride, padding, dilation, groups, depthwise, density and layout."""
    pick = generator.choice
    while True:
        rank = pick([1, 2, 2, 3])

        def axes(values: list[int], other: int, rank: int = rank) -> tuple[int, ...]:
            return (*[other] * (3 - rank), *(pick(values) for _ in range(rank)))

        size, kernel = axes([1, 4, 7, 9, 14], 1), axes([1, 2, 3, 5], 1)
        stride, padding, dilation = axes([1, 1, 2, 3], 1), axes([0, 1, 2, 6], 0), axes([1, 1, 2], 1)
        axis = zip(size, kernel, padding, dilation, strict=True)
        if all(n + 2 * p > d * (k - 1) for n, k, p, d in axis):
            break
    images, groups = pick([1, 2, 3, 17]), pick([1, 1, 2, 4])
    channels, out_channels = groups * pick([1, 2, 5, 16]), groups * pick([1, 3, 8, 20])
    if pick([True, False, False]):  # depthwise
        groups = channels = pick([3, 8])
        out_channels = channels * pick([1, 2])
    x = torch.randn(images, channels, *size)
    layout = pick(["contiguous", "channels_last", "transposed", "every_second"])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last_3d)
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "every_second":
        x = torch.randn(images, channels, *size[:2], 2 * size[2])[..., ::2]
    weight = torch.randn(out_channels, channels // groups, *kernel).to(dtype).float()
    keep = torch.rand(weight.shape) < pick([0, 0.1, 0.5, 1])
    bias = torch.randn(out_channels) if pick([True, False]) else None
    return Layer(x.to(dtype), weight, keep, bias, stride, padding, dilation, groups)


def small_layer(dtype: torch.dtype = torch.float32, density: float = 0.3) -> Layer:
    """5 images, 3x3, several tiles and blocks; padding, so that there is a halo."""
    weight = torch.randn(11, 6, 1, 3, 3).to(dtype).float()
    x = torch.randn(5, 6, 1, 9, 13).to(dtype)
    keep = torch.rand(weight.shape) < density
    return Layer(x, weight, keep, torch.randn(11), padding=(0, 1, 1))


def compute(
    layer: Layer,
    *,
    images: int = 1,
    halo: tuple[int, int, int] = (0, 0, 0),
    residual: Tensor | None = None,  # as the output
    activation: str = "none",
    **options: Any,
) -> Tensor:  # [N, K, D, H, W] of the dtype of the input
    """Through positions and back, with the output buffer full of NaN; its halo must become zero."""
    count, channels = layer.x.shape[:2]
    dtype, views, out_channels = layer.x.dtype, layer.views, len(layer.weight)
    halo = tuple(h + e for h, e in zip(views.halo, halo, strict=True))
    positions = Positions(views.size, halo, images, dtype)
    conv = PackedConv(
        layer.weight,
        layer.keep,
        views,
        positions,
        groups=layer.groups,
        bias=layer.bias,
        **options,
    )
    source = Buffer(positions, channels * len(views.phases), count)
    to_positions(layer.x, source, views, layer.stride)
    target = Buffer(positions, out_channels, count, fill=torch.nan)
    added = None
    if residual is not None:
        added = Buffer(positions, out_channels, count)
        to_positions(residual, added, views_of(views.size, ONE, ONE, (0, 0, 0), ONE), ONE)
    before = source._storage.clone()
    conv.run(source, target, count, residual=added, activation=activation, slope=SLOPE)
    assert same_bits(source._storage, before)
    assert_halo_is_zero(target, count)
    output = torch.full((count, out_channels, *views.size), torch.nan, dtype=dtype)
    from_positions(target, output)
    return output


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def assert_halo_is_zero(buffer: Buffer, images: int) -> None:
    """+0 beside the pixels in every line that has some; all other lines and the guards untouched."""
    p = buffer.positions
    valid = torch.from_numpy(p.valid.astype("int64"))
    pixel = (valid[:, None] >> torch.arange(p.line) & 1).bool()
    count = p.groups(images) * buffer.channels
    body = buffer._storage[buffer._begin :][: count * p.plane].view(count, -1, p.line)
    used = pixel.any(1)
    assert not bits(body)[:, ~pixel & used[:, None]].any()
    assert body[:, ~used].isnan().all()
    assert buffer._storage[: buffer._begin].isnan().all()
    assert buffer._storage[buffer._begin + count * p.plane :].isnan().all()


def assert_close(found: Tensor, expected: Tensor, size_of_terms: Tensor) -> None:
    """One rounding to the dtype of the output, and fp32 sums of terms of that size."""
    assert found.shape == expected.shape
    rounding = 2.0**-8 if found.dtype is torch.bfloat16 else 2.0**-23
    allowed = rounding * expected.abs() + 1e-6 * size_of_terms + 1e-6
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_output_equals_a_float64_convolution(dtype: torch.dtype, seed: int, capability: str):
    generator = random.Random(f"{seed}{dtype}{capability}")
    pick = generator.choice
    for _ in range(30):
        layer = random_layer(generator, dtype)
        expected, terms = layer.exact(), layer.size_of_terms()
        residual = None
        if pick([True, False]):
            residual = torch.randn(expected.shape).to(dtype)
            expected, terms = expected + residual.double(), terms + residual.double().abs()
        activation = pick(list(ACTIVATIONS))
        options = {
            "images": pick([1, 2, 4, 8, 16, 17, 32]),
            "halo": pick([(0, 0, 0), (0, 1, 2)]),
            "lines": pick([None, 1, 3, 14, 40]),
            "block_channels": pick([None, 1, 3]),
            "chunks": pick([1, 2, 5, 99]),
        }
        found = compute(layer, residual=residual, activation=activation, **options)
        assert_close(found, ACTIVATE[activation](expected), terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation: str, dtype: torch.dtype, capability: str):
    values = torch.cat([torch.randn(300) * 4, torch.linspace(-120, 120, 201)])
    special = torch.tensor([torch.nan, torch.inf, 3e38, -1e20, 0.0, -0.0, 3.0, -3.0, 6.0])
    x = torch.cat([values, special]).to(dtype).view(1, 1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, 1)
    layer = Layer(x, one, one.bool())
    expected = ACTIVATE[activation](x.double())
    if activation == "hardswish":  # x * relu6(x + 3) is infinite in fp32, in torch too
        expected = ACTIVATE[activation](x.float()).double()
    found = compute(layer, activation=activation)
    assert found.dtype is dtype
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_lines_blocks_chunks_and_threads_do_not_change_a_bit(
    activation: str, dtype: torch.dtype, capability: str, restore_threads: None
) -> None:
    layer = small_layer(dtype)
    residual = torch.randn(layer.exact().shape).to(dtype)
    for images in (1, 2, 16):
        torch.set_num_threads(1)
        results = []
        for lines, block, chunks in itertools.product([1, 3, 12, 40], [1, 4, 6], [1, 4, 11]):
            torch.set_num_threads(1 + len(results) % 3)
            results.append(
                compute(
                    layer,
                    images=images,
                    residual=residual,
                    activation=activation,
                    lines=lines,
                    block_channels=block,
                    chunks=chunks,
                )
            )
        assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_threads_than_work_and_repeats_do_not_change_a_bit(
    dtype: torch.dtype, restore_threads: None
) -> None:
    layer = random_layer(random.Random(1), dtype)
    results = []
    for threads in (1, 2, 2, 2, 7):
        torch.set_num_threads(threads)
        results.append(compute(layer, lines=1, chunks=3))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_kept_weights_the_output_is_the_bias_whatever_comes_in(
    dtype: torch.dtype, capability: str
) -> None:
    layer = small_layer(dtype, density=0)
    layer.x.fill_(torch.nan)
    bias = layer.bias.view(1, -1, 1, 1, 1)
    for images in (1, 4):
        found = compute(layer, images=images, activation="relu")
        assert torch.equal(found, F.relu(bias).to(dtype).expand_as(found))
    layer.bias = None
    assert not bits(compute(layer)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["one", "all"])
def test_one_kept_weight_and_all(density: str, dtype: torch.dtype, capability: str) -> None:
    layer = small_layer(dtype, density=density == "all")
    if density == "one":
        layer.keep[7, 2, 0, 2, 0] = True
    for images in (1, 4):
        found = compute(layer, images=images)
        assert_close(found, layer.exact(), layer.size_of_terms())
        if density == "one":
            others = [k for k in range(11) if k != 7]
            bias = layer.bias[others].to(dtype).view(-1, 1, 1, 1)
            assert torch.equal(found[:, others], bias.expand_as(found[:, others]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_pixel_reaches_the_outputs_that_read_it_and_no_other(
    dtype: torch.dtype, value: float, capability: str
) -> None:
    """Not its neighbours in a register either, which may be those of another image."""
    layer = small_layer(dtype)
    bad = torch.zeros(layer.x.shape, dtype=torch.bool)
    bad[1, 2, 0, 4, 6] = bad[3, 0, 0, 0, 0] = bad[4, 5, 0, 8, 12] = True
    clean, weight = layer.x.clone(), layer.weight
    reached = layer.convolve(bad.double(), layer.keep.double(), None) > 0
    expected = layer.convolve(bad.double(), (weight.sign() * layer.keep).double(), None) * value
    for images in (1, 2, 4, 16):
        layer.x = clean
        without = compute(layer, images=images)
        layer.x = clean.masked_fill(bad, value)
        found = compute(layer, images=images)
        assert torch.equal(found.isnan(), reached & math.isnan(value))
        assert same_bits(found[~reached], without[~reached])
        if math.isinf(value):
            assert torch.equal(found[reached].double(), expected[reached])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_any_payload_stays_one(dtype: torch.dtype, capability: str) -> None:
    patterns = [0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000]
    layer = small_layer(dtype)
    layer.bias[: len(patterns)] = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for activation in ACTIVATIONS:
        found = compute(layer, activation=activation)
        assert found[:, : len(patterns)].isnan().all()
        assert not found[:, len(patterns) :].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_an_earlier_call_leave_no_trace(dtype: torch.dtype, capability: str) -> None:
    """Lanes without an image hold what was there before; a batch may be smaller than the memory."""
    layer = small_layer(dtype)
    views = layer.views
    positions = Positions(views.size, views.halo, 4, dtype)
    conv = PackedConv(layer.weight, layer.keep, views, positions, bias=layer.bias)
    source, target = Buffer(positions, 6, 5), Buffer(positions, 11, 5)
    for count, x in ((5, torch.full_like(layer.x, torch.nan)), (2, layer.x), (3, layer.x)):
        x = x[:count]
        to_positions(x, source, views, ONE)
        conv.run(source, target, count)
        found = torch.empty(count, 11, *views.size, dtype=dtype)
        from_positions(target, found)
    assert same_bits(found, compute(layer, images=4)[:3])


def test_row_scale_folds_a_batch_norm_into_the_weights() -> None:
    layer = small_layer()
    scale = torch.rand(11) + 0.5
    found = compute(layer, row_scale=scale)
    layer.weight = layer.weight * scale.view(-1, 1, 1, 1, 1)
    assert same_bits(found, compute(layer))


def test_bf16_weights_are_rounded_to_nearest_even() -> None:
    layer = small_layer(torch.bfloat16, density=1)
    found = compute(layer)
    layer.weight = layer.weight + layer.weight.abs() * 2.0**-10  # below half of the last place
    assert same_bits(compute(layer), found)


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("block", [1, 4, None])
@pytest.mark.parametrize("groups", [1, 3])
def test_packing_holds_each_kept_weight_once_and_names_its_place(
    groups: int, block: int | None, chunks: int
) -> None:
    weight = torch.randn(12, 9 // groups, 1, 3, 3)
    keep = torch.rand(weight.shape) < 0.4
    views = views_of((1, 6, 6), (1, 3, 3), (1, 2, 2), (0, 1, 1), ONE)
    positions = Positions(views.size, views.halo, 1, torch.float32)
    conv = PackedConv(
        weight,
        keep,
        views,
        positions,
        groups=groups,
        chunks=chunks,
        block_channels=block or 99,
        with_order=True,
    )
    packed = conv.weights
    assert torch.equal(packed.order.sort().values, keep.view(-1).nonzero().view(-1))
    values = packed.entries.view(torch.float32)[:, 0]
    assert torch.equal(values, weight.view(-1)[packed.order])
    assert packed.blocks == (1 if block is None else -(-9 // groups // block))
    # {channel, count}, begin: each channel in each block, rows of a block in order of their length.
    channel, count = packed.rows[:, 0] & 0xFFFFFFFF, packed.rows[:, 0] >> 32
    edges = packed.chunk_channels.tolist()
    row = 0
    for first, end in itertools.pairwise(edges):
        for _ in range(packed.blocks):
            part = slice(row, row + end - first)
            assert channel[part].sort().values.tolist() == list(range(first, end))
            assert torch.equal(count[part], count[part].sort().values)
            row += end - first
    assert row == len(packed.rows)
    assert torch.equal(packed.rows[:, 1], count.cumsum(0) - count)
    assert int(count.sum()) == keep.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_refilled_takes_new_values_at_the_same_places(layout: str, dtype: torch.dtype) -> None:
    layer = small_layer(dtype)
    views = layer.views
    positions = Positions(views.size, views.halo, 1, dtype)
    conv = PackedConv(layer.weight, layer.keep, views, positions, with_order=True)
    weight = torch.randn_like(layer.weight)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last_3d)
    elif layout == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    before = conv.weights.entries.clone()
    other = conv.refilled(weight, layer.bias)
    expected = PackedConv(weight.contiguous(), layer.keep, views, positions)
    assert torch.equal(other.weights.entries, expected.weights.entries)
    assert torch.equal(conv.weights.entries, before)
    assert conv.refilled(weight).weights is other.weights
    weight[tuple(layer.keep.nonzero()[0])] += 1
    assert conv.refilled(weight).weights is not other.weights


@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_of_the_weight_is_that_of_autograd(
    threads: int, capability: str, restore_threads: None
) -> None:
    torch.set_num_threads(threads)
    generator = random.Random(capability)
    for _ in range(25):
        layer = random_layer(generator)
        images, lines = generator.choice([1, 2, 16]), generator.choice([1, 3, 8, 20])
        views = layer.views
        positions = Positions(views.size, views.halo, images, torch.float32)
        conv = PackedConv(
            layer.weight,
            layer.keep,
            views,
            positions,
            groups=layer.groups,
            lines=lines,
            block_channels=layer.weight.shape[1],
            chunks=generator.choice([1, 3]),
            with_order=True,
        )
        count, channels = layer.x.shape[:2]
        dy = torch.randn(count, len(layer.weight), *views.size)
        source = Buffer(positions, channels * len(views.phases), count)
        target = Buffer(positions, len(layer.weight), count)
        to_positions(layer.x, source, views, layer.stride)
        to_positions(dy, target, views_of(views.size, ONE, ONE, (0, 0, 0), ONE), ONE)
        sums = torch.ones(len(conv.weights.order))  # what there is is added to
        conv.add_weight_gradient(source, target, count, sums)
        again = torch.ones_like(sums)
        torch.set_num_threads(3 - threads)
        conv.add_weight_gradient(source, target, count, again)
        torch.set_num_threads(threads)
        assert same_bits(sums, again)

        def gradient(x: Tensor, dy: Tensor, layer: Layer = layer) -> Tensor:
            weight = torch.zeros_like(layer.weight, dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(layer.convolve(x, weight, None), weight, dy)[0]

        order = conv.weights.order
        expected = gradient(layer.x.double(), dy.double()).reshape(-1)[order]
        terms = gradient(layer.x.double().abs(), dy.double().abs()).reshape(-1)[order]
        assert_close(sums, expected + 1, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_input_is_that_of_autograd(dtype: torch.dtype, capability: str) -> None:
    generator = random.Random(capability)
    for _ in range(15):
        layer = random_layer(generator, dtype)
        views, images = layer.views, generator.choice([1, 2, 16])
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        size = tuple(layer.x.shape[2:])
        packed = PackedInputGradient(
            layer.weight, layer.keep, size, views.size, *geometry, images, dtype
        )
        dy = torch.randn(len(layer.x), len(layer.weight), *views.size).to(dtype)
        source = Buffer(packed.positions, len(layer.weight), len(dy))
        to_positions(dy, source, packed.views, ONE)
        found = torch.zeros(layer.x.shape, dtype=dtype)
        packed.run(source, found)

        def gradient(weight: Tensor, dy: Tensor, layer: Layer = layer) -> Tensor:
            x = layer.x.double().requires_grad_()
            return torch.autograd.grad(layer.convolve(x, weight, None), x, dy)[0]

        weight = (layer.weight * layer.keep).double()
        terms = gradient(weight.abs(), dy.double().abs())
        assert_close(found, gradient(weight, dy.double()), terms)


@pytest.mark.parametrize(("source_dtype", "dtype"), list(itertools.product(DTYPES, repeat=2)))
@pytest.mark.parametrize("images", [1, 3, 16])
def test_to_positions_scales_activates_and_takes_a_stride_apart(
    images: int, dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    """From a tensor and from another buffer, for full groups and the last one."""
    stride = (1, 2, 2)
    views = views_of((1, 9, 7), (1, 3, 3), stride, (0, 1, 1), ONE)
    assert len(views.phases) == 4
    x = torch.randn(7, 5, 1, 9, 7).to(source_dtype)
    whole = views_of((1, 9, 7), ONE, ONE, (0, 0, 0), ONE)
    scale, shift = torch.randn(5), torch.randn(5)
    expected = x.float() * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    expected = F.leaky_relu(expected, SLOPE).to(dtype)
    positions = Positions(views.size, views.halo, images, dtype)
    for lanes in {1, images}:
        held = Buffer(Positions((1, 9, 7), (0, 0, 1), lanes, source_dtype), 5, 7)
        to_positions(x, held, whole, ONE)
        for source in (x, held):
            target = Buffer(positions, 5 * 4, 7)
            prologue = {"scale": scale, "shift": shift, "activation": "leaky_relu", "slope": SLOPE}
            to_positions(source, target, views, stride, images=7, **prologue)
            pixels = target.pixels(7).float()
            pixels = pixels.permute(0, 5, 1, 2, 3, 4).reshape(-1, 5, 4, *views.size)
            assert not pixels[7:].any()
            for index, (phase, (_, rows, columns)) in enumerate(
                zip(views.phases, views.stored, strict=True)
            ):
                part = expected[..., phase[1] :: 2, phase[2] :: 2].float()
                # Stored pixels behind the output's size lie in the halo.
                rows, columns = min(rows, views.size[1]), min(columns, views.size[2])
                found = pixels[:7, :, index, :, :rows, :columns]
                assert torch.equal(found, part[..., :rows, :columns])


def test_from_positions_writes_any_strides_and_nothing_beside() -> None:
    positions = Positions((2, 3, 5), (1, 1, 1), 4, torch.bfloat16)
    buffer = Buffer(positions, 3, 6)
    buffer.pixels(6).copy_(torch.randn(2, 3, 2, 3, 5, 4))
    expected = buffer.pixels(6).permute(0, 5, 1, 2, 3, 4).reshape(8, 3, 2, 3, 5)[:6]
    for dtype in DTYPES:
        memory = torch.full((6, 5, 2, 5, 3, 4), 7.0, dtype=dtype)
        view = memory.permute(0, 4, 2, 5, 1, 3)[..., 2][:, :, :, :3]
        assert view.shape == (6, 3, 2, 3, 5)
        kept = memory.clone()
        kept.permute(0, 4, 2, 5, 1, 3)[..., 2][:, :, :, :3].copy_(expected)
        from_positions(buffer, view)
        assert torch.equal(memory, kept)


def test_what_does_not_fit_is_refused() -> None:
    views = views_of((1, 4, 4), ONE, ONE, (0, 0, 0), ONE)
    lanes = {n: Buffer(Positions((1, 4, 4), (0, 0, 0), n, torch.float32), 2, 4) for n in (2, 4)}
    with pytest.raises(FastpieError, match="1 or 4 images in a group, but got 2"):
        to_positions(lanes[2], lanes[4], views, ONE, images=4)
    weight = torch.randn(3, 4, 1, 1, 1)
    positions = lanes[4].positions
    with pytest.raises(FastpieError, match=r"< 2\^31 elements"):
        PackedConv(weight, weight != 0, views, positions, input_plane=2**30)
