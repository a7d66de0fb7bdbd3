"""Packed weights of masked_conv: never stale, packed once, freed with the mask, safe in threads."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpie import _C, ops
from fastpie.nn import MaskedConv2d
from fastpie.ops import masked_conv_sparse


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of the native packing so far, one entry each; every call takes the kernels."""
    calls: list[int] = []
    original = _C.pack_masked_conv

    def counted(*args: Any) -> None:
        calls.append(1)
        original(*args)

    monkeypatch.setattr(_C, "pack_masked_conv", counted)
    monkeypatch.setattr(masked_conv_sparse, "is_worth", lambda *args, **kwargs: True)
    return calls


def check(x: Tensor, layer: nn.Module) -> None:
    expected = F.conv2d(x, layer.weight * layer.mask, layer.bias, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def layer() -> MaskedConv2d:
    return MaskedConv2d(4, 6, 3, padding=1, mask=torch.rand(6, 4, 3, 3) < 0.5)


def test_packed_once_while_nothing_changes(layer: MaskedConv2d, packings: list[int]) -> None:
    for _ in range(5):
        check(torch.randn(2, 4, 7, 7), layer)
    assert len(packings) == 1
    for _ in range(3):  # and once for each of the two gradients
        layer(torch.randn(2, 4, 7, 7, requires_grad=True)).sum().backward()
    assert len(packings) == 3
    check(torch.randn(2, 4, 9, 7), layer)  # another geometry
    assert len(packings) == 4


def test_values_follow_every_way_of_changing_a_weight(
    layer: MaskedConv2d, packings: list[int]
) -> None:
    x = torch.randn(2, 4, 7, 7)
    check(x, layer)
    with torch.no_grad():
        layer.weight.add_(1)
    check(x, layer)
    layer.weight.data.mul_(2)  # the version counter does not move
    check(x, layer)
    layer.weight.data[layer.mask][:1] = 7
    layer.weight.data.view(-1)[int(layer.mask.view(-1).nonzero()[0])] = 7  # a single value
    check(x, layer)
    layer.weight.detach().numpy()[:] += 1
    check(x, layer)
    layer.weight.data = torch.randn_like(layer.weight)
    check(x, layer)
    nn.utils.vector_to_parameters(torch.randn(6 * 4 * 9 + 6), layer.parameters())
    check(x, layer)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(6, 4, 3, 3)})
    check(x, layer)
    layer.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    check(x, layer)
    layer.to(memory_format=torch.channels_last)
    check(x, layer)
    for optimizer in (
        torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True),
        torch.optim.Adam(layer.parameters(), lr=0.1, fused=True),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            check(x, layer)


def test_new_values_are_not_packed_again(layer: MaskedConv2d, packings: list[int]) -> None:
    x = torch.randn(2, 4, 7, 7)
    for _ in range(4):
        check(x, layer)
        layer.weight.data.add_(1)
    assert len(packings) == 1


def test_places_follow_every_way_of_changing_a_mask(
    layer: MaskedConv2d, packings: list[int]
) -> None:
    x = torch.randn(2, 4, 7, 7)
    check(x, layer)
    layer.mask.logical_not_()
    check(x, layer)
    layer.mask.data[0, 0, 0, 0] ^= True
    check(x, layer)
    layer.mask.numpy()[1] ^= True
    check(x, layer)
    layer.mask = torch.rand(6, 4, 3, 3) < 0.5
    check(x, layer)
    layer.load_state_dict({**layer.state_dict(), "mask": torch.rand(6, 4, 3, 3) < 0.5})
    check(x, layer)
    assert len(packings) == 6


def test_one_mask_for_two_weights(packings: list[int]) -> None:
    mask = torch.rand(6, 4, 3, 3) < 0.5
    x, a, b = torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    for weight in (a, b, a, b):
        torch.testing.assert_close(ops.masked_conv2d(x, weight, mask), F.conv2d(x, weight * mask))
    assert len(packings) == 1


def test_gradients_see_the_weight_of_their_forward(
    layer: MaskedConv2d, packings: list[int]
) -> None:
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    output = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_memory_goes_with_the_mask_and_does_not_grow(packings: list[int]) -> None:
    gc.collect()
    before = len(masked_conv_sparse._known)
    x = torch.randn(2, 4, 7, 7)
    mask = torch.rand(6, 4, 3, 3) < 0.5
    for _ in range(20):  # fresh weights: a parametrization, autocast
        ops.masked_conv2d(x, torch.randn(6, 4, 3, 3), mask)
    assert len(masked_conv_sparse._known) == before + 1
    known = masked_conv_sparse.known_mask(mask)
    for size in range(3, 60):  # images of many sizes
        ops.masked_conv2d(torch.randn(1, 4, size, 3), torch.randn(6, 4, 3, 3), mask)
    assert len(known._packed) <= masked_conv_sparse._GEOMETRIES
    for _ in range(20):  # fresh masks
        ops.masked_conv2d(x, torch.randn(6, 4, 3, 3), mask.clone())
    del mask
    gc.collect()
    assert len(masked_conv_sparse._known) == before


def test_views_of_one_mask_are_told_apart(packings: list[int]) -> None:
    masks = torch.rand(3, 6, 4, 3, 3) < 0.5
    x, weight = torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3)
    for _ in range(2):
        for mask in masks:
            torch.testing.assert_close(
                ops.masked_conv2d(x, weight, mask), F.conv2d(x, weight * mask)
            )
    assert len(packings) == 3


def test_number_of_masks_is_bounded(packings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_conv_sparse, "_MASKS", 4)
    x, weight = torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3)
    masks = [torch.rand(6, 4, 3, 3) < 0.5 for _ in range(10)]
    for mask in masks:
        ops.masked_conv2d(x, weight, mask)
        assert len(masked_conv_sparse._known) <= 4


def test_threads_at_once(layer: MaskedConv2d, packings: list[int]) -> None:
    layers = [layer, MaskedConv2d(4, 6, 3, padding=1, mask=layer.mask)]
    layers[1].mask = layer.mask  # two weights, one mask: values of one must not reach the other
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for i in range(60):
                x = torch.randn(1 + i % 3, 4, 7, 7, generator=generator)
                check(x, layers[seed % 2])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
