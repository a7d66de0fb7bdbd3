"""Packing for sparse tensor cores: nothing lost, the layout as written down, the least columns."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import networks
from fastpie.errors import FastpieError
from fastpie.ops import reference
from fastpie.ops.sparse24 import Sparse24, pack_sparse24

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(
    shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Weights with zeros of both signs and NaN among them, and a mask."""
    weight = torch.randn(shape).to(dtype)
    values = torch.tensor([0.0, -0.0, torch.nan, torch.inf], dtype=dtype)
    odd = torch.rand(shape) < 0.1
    weight = torch.where(odd, values[torch.randint(4, shape)], weight)
    return weight, torch.rand(shape) < density


def assert_lossless(weight: Tensor, mask: Tensor, rows: int) -> Sparse24:
    packed = pack_sparse24(weight, mask, rows)
    bits = torch.int32 if weight.dtype is torch.float32 else torch.int16
    expected = torch.where(mask, weight, 0).view(bits)
    found = packed.unpack()
    assert found.shape == weight.shape
    assert torch.equal(found.view(bits), expected)
    return packed


def slots_of(packed: Sparse24) -> list[tuple[int, int, int, int]]:
    """(row, column, place in `order`, slot of the tile) of each weight, read as the contract says."""
    found = []
    main = -(-packed.columns // 32)
    bounds = packed.step_begin.tolist()
    order, words = packed.order.tolist(), packed.metadata.tolist()
    ranges = itertools.pairwise(packed.copy_begin.tolist())
    for tile, (first, end) in enumerate(itertools.pairwise(bounds)):
        source = {slot: column for column, slot in packed.copies[slice(*next(ranges))].tolist()}
        for step in range(first, end):
            for block, lane, pair in itertools.product(
                range(packed.rows // 16), range(32), range(4)
            ):
                g, t, high, half = lane // 4, lane % 4, pair % 2, pair // 2
                row, group = 16 * block + g + 8 * high, t + 4 * half
                word = words[step][block // 2][4 * g + block % 2 * 2 + group // 4] & 0xFFFFFFFF
                field = word >> (16 * high + 4 * (group % 4)) & 15
                places = field & 3, field >> 2
                assert places[0] < places[1]  # of one group: at most two, in order
                for member, place in enumerate(places):
                    index = order[step][block][lane][4 * half + 2 * high + member]
                    if index < 0:
                        continue
                    slot = 4 * group + place
                    column = (step - first) * 32 + slot
                    if step - first >= main:
                        column = source[(step - first - main) * 32 + slot]
                    found.append(
                        (tile * packed.rows + row, column, index, (step - first) * 32 + slot)
                    )
    return found


def least_extra_columns(mask: Tensor, rows: int) -> int:
    """By trying, for each group of each tile, every set of columns."""
    total = 0
    for tile in mask.split(rows):
        for group in tile.split(4, dim=1):
            excess = (group.sum(1) - 2).clamp(min=0)
            sets = itertools.chain.from_iterable(
                itertools.combinations(range(group.shape[1]), n) for n in range(5)
            )
            total += next(
                len(columns) for columns in sets if (group[:, list(columns)].sum(1) >= excess).all()
            )
    return total


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rows", [64, 128])
def test_random_masks_are_packed_without_loss(sparsity: float, rows: int) -> None:
    for dtype, shape in zip(DTYPES, [(200, 3, 3, 64), (256, 1, 1, 256), (100, 96)], strict=True):
        assert_lossless(*layer(shape, 1 - sparsity, dtype), rows)


@settings(max_examples=60, deadline=None)
@given(
    filters=st.integers(0, 80),
    kernel=st.lists(st.integers(1, 3), max_size=2),
    channels=st.integers(0, 37),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.95, 1.0]),
    rows=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_packed_without_loss_and_reported_truly(
    filters: int,
    kernel: list[int],
    channels: int,
    density: float,
    rows: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, mask = layer((filters, *kernel, channels), density, dtype)
    for _ in range(3):  # empty rows and columns
        if filters and channels:
            mask[torch.randint(filters, ())] = False
            mask[..., torch.randint(channels, ())] = False
    packed = assert_lossless(weight, mask, rows)
    flat = mask.reshape(filters, packed.columns)
    groups = -(-packed.columns // 4)
    per_group = F.pad(flat, (0, 4 * groups - packed.columns)).view(filters, groups, 4).sum(2)
    report = packed.report()
    assert report["kept"] == flat.sum()
    assert report["groups"] == per_group.numel()
    assert report["overfull"] == (per_group > 2).sum()
    assert report["spilled"] == (per_group - 2).clamp(min=0).sum()
    assert report["extra_columns"] == len(packed.copies)
    assert report["extra_columns"] == (least_extra_columns(flat, rows) if flat.numel() else 0)
    tiles = -(-filters // rows)
    assert len(packed.values) * 32 == pytest.approx(report["growth"] * tiles * packed.columns)


@pytest.mark.parametrize(("density", "rows"), [(0.1, 64), (0.5, 32), (0.97, 64)])
def test_the_layout_is_the_one_of_the_contract(density: float, rows: int) -> None:
    weight, mask = layer((80, 3, 3, 12), density)
    packed = pack_sparse24(weight, mask, rows)
    slots = slots_of(packed)
    columns = packed.columns
    assert sorted(index for *_, index, _ in slots) == mask.view(-1).nonzero().view(-1).tolist()
    assert all(row * columns + column == index for row, column, index, _ in slots)
    assert len({(row, slot) for row, _, _, slot in slots}) == len(slots)
    values = torch.where(packed.order < 0, 0, weight.view(-1)[packed.order.clamp(min=0)])
    assert torch.equal(packed.values.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0])
def test_two_steps_of_extra_columns_are_filled_at_a_time(density: float) -> None:
    packed = pack_sparse24(*layer((130, 3, 3, 64), density))
    for first, end in itertools.pairwise(packed.copy_begin.tolist()):
        columns, slots = packed.copies[first:end].unbind(1)
        assert (columns.diff() > 0).all()
        assert len(slots.unique()) == len(slots)
        steps = slots.div(32, rounding_mode="floor")
        latest = steps.cummax(0).values
        assert (steps >= latest - 1).all()
        assert latest[-1] > 1 or density < 0.5


def test_extra_columns_are_well_filled() -> None:
    """Few rows use an extra column, so four of them nearly always share a group."""
    for density, slack in ((0.1, 1.02), (0.3, 1.02), (0.5, 1.02)):
        packed = pack_sparse24(*layer((512, 2048), density))
        for first, end in itertools.pairwise(packed.copy_begin.tolist()):
            used = len(packed.copies[first:end, 1].div(4, rounding_mode="floor").unique()) * 4
            assert used <= (end - first) * slack + 4


def test_a_dense_weight_doubles_the_columns_and_a_24_weight_adds_none() -> None:
    weight = torch.randn(64, 256).half()
    everything = torch.ones_like(weight, dtype=torch.bool)
    assert assert_lossless(weight, everything, 64).report()["growth"] == 2
    halved = everything.unflatten(1, (-1, 4)).clone()
    halved[..., [1, 2]] = False
    packed = assert_lossless(weight, halved.flatten(1), 64)
    assert packed.report()["growth"] == 1
    assert packed.report()["overfull"] == packed.report()["extra_columns"] == 0


@pytest.mark.parametrize(("rows", "expected"), [(64, 1.06), (128, 1.11)])
def test_growth_at_ninety_percent(rows: int, expected: float) -> None:
    """For independent weights, as a large layer has it."""
    packed = assert_lossless(*layer((512, 3, 3, 512), 0.1), rows)
    assert packed.report()["growth"] == pytest.approx(expected, abs=0.015)


def test_trained_like_masks_of_layers_of_resnet50_are_packed_without_loss() -> None:
    """One threshold over layers of its shapes: layer1.0.conv2, layer2.0.conv3, layer3.1.conv2, fc."""
    layers = [nn.Conv2d(64, 64, 3), nn.Conv2d(128, 512, 1), nn.Conv2d(256, 256, 3)]
    model = nn.Sequential(*layers, nn.Linear(2048, 1000))
    for module in model:
        nn.init.normal_(module.weight)
    ladder = networks.masks_for(model, [0.7, 0.9], scope="global", kind="trained-like")
    for masks in map(ladder.at, ladder.sparsities):
        for name, module in model.named_children():
            weight = module.weight.detach().bfloat16().movedim(1, -1)
            mask = masks[f"{name}.weight"].movedim(1, -1)
            assert assert_lossless(weight, mask, 64).report()["overfull"] > 0


def test_a_bit_packed_mask_is_the_same_mask() -> None:
    weight, mask = layer((70, 3, 3, 40), 0.3)
    words = reference.pack_mask(mask.movedim(-1, 1))
    one, other = pack_sparse24(weight, mask), pack_sparse24(weight, words)
    assert torch.equal(one.order, other.order)
    assert torch.equal(one.metadata, other.metadata)
    assert torch.equal(one.copies, other.copies)


def test_the_result_does_not_depend_on_the_threads(restore_threads: None) -> None:
    weight, mask = layer((300, 3, 3, 32), 0.4)
    packed = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        packed.append(pack_sparse24(weight, mask))
    for name in ("order", "metadata", "copies", "step_begin", "copy_begin", "counts"):
        assert torch.equal(getattr(packed[0], name), getattr(packed[1], name))


@pytest.mark.parametrize("channels_last", [False, True])
def test_refilled_takes_other_values_of_any_layout(channels_last: bool) -> None:
    weight, mask = layer((70, 3, 3, 40), 0.3)
    packed = pack_sparse24(weight, mask)
    other = torch.randn(weight.shape).bfloat16()
    if not channels_last:
        other = other.movedim(-1, 1).contiguous().movedim(1, -1)
        mask = mask.movedim(-1, 1).contiguous().movedim(1, -1)
        assert torch.equal(pack_sparse24(other, mask).order, packed.order)
    assert torch.equal(packed.refilled(other).unpack(), torch.where(mask, other, 0))
    with pytest.raises(FastpieError, match=r"torch.bfloat16 of shape \[70, 3, 3, 40\]"):
        packed.refilled(other.float())


def test_bad_input_is_refused() -> None:
    weight, mask = layer((64, 64), 0.5)
    for arguments, message in (
        ((weight.double(), mask), "float32, bfloat16 or float16, but got torch.float64"),
        ((weight[0], mask[0]), r"shape \[K, \*kernel, C\], but got \[64\]"),
        ((weight, mask[:, :32]), r"bool of shape \[64, 64\].*but got torch.bool \[64, 32\]"),
        ((weight, mask.float()), "but got torch.float32"),
        ((weight, mask, 48), "multiple of 32 up to 256, but got 48"),
        ((weight, mask, 288), "but got 288"),
        ((weight, mask, 64.0), "but got 64.0"),
    ):
        with pytest.raises(FastpieError, match=message):
            pack_sparse24(*arguments)
