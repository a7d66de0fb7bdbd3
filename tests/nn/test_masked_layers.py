"""MaskedConv1d, 2d, 3d and MaskedLinear as drop-ins for torch's layers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastpie
from fastpie import FastpieError
from fastpie.nn import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear

LAYERS = [
    pytest.param(nn.Conv1d, MaskedConv1d, (4, 6, 3), (2, 4, 9), id="conv1d"),
    pytest.param(nn.Conv2d, MaskedConv2d, (4, 6, 3), (2, 4, 9, 8), id="conv2d"),
    pytest.param(nn.Conv3d, MaskedConv3d, (4, 6, 3), (2, 4, 5, 6, 7), id="conv3d"),
    pytest.param(nn.Linear, MaskedLinear, (4, 6), (2, 3, 4), id="linear"),
]


def masked_copy(dense: nn.Module, mask: torch.Tensor) -> nn.Module:
    """A dense layer whose weight is multiplied with the mask."""
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.weight.mul_(mask)
    return other


@pytest.mark.parametrize(("dense_type", "masked_type", "arguments", "shape"), LAYERS)
def test_constructor_and_forward_are_torchs(
    dense_type: Any, masked_type: Any, arguments: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    torch.manual_seed(1)
    dense = dense_type(*arguments)
    torch.manual_seed(1)
    masked = masked_type(*arguments)
    assert isinstance(masked, dense_type)
    assert masked.mask.all()
    assert torch.equal(masked(x), dense(x))
    mask = torch.rand(dense.weight.shape) < 0.5
    torch.manual_seed(1)
    masked = masked_type(*arguments, mask=mask)
    torch.testing.assert_close(masked(x), masked_copy(dense, mask)(x))
    masked(x).sum().backward()
    assert not masked.weight.grad[~mask].any()
    assert f"sparsity={1 - mask.double().mean().item():.4g}" in repr(masked)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_padding_modes(padding_mode: str, padding: Any) -> None:
    dense = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=padding_mode, bias=False)
    mask = torch.rand(dense.weight.shape) < 0.5
    x = torch.randn(2, 3, 8, 8)
    expected = masked_copy(dense, mask)(x)
    torch.testing.assert_close(MaskedConv2d.from_dense(dense, mask)(x), expected)


@pytest.mark.parametrize(("dense_type", "masked_type", "arguments", "shape"), LAYERS)
def test_from_dense_shares_the_parameters(
    dense_type: Any, masked_type: Any, arguments: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    dense = dense_type(*arguments).eval()
    seen: list[int] = []
    dense.register_forward_hook(lambda *_: seen.append(1))
    mask = torch.rand(dense.weight.shape) < 0.5
    masked = masked_type.from_dense(dense, mask)
    assert masked.weight is dense.weight
    assert masked.bias is dense.bias
    assert not masked.training
    assert type(dense) is dense_type
    assert "mask" not in dense.state_dict()
    x = torch.randn(shape)
    torch.testing.assert_close(masked(x), masked_copy(dense, mask)(x))
    assert len(seen) == 2
    masked.register_forward_hook(lambda *_: seen.append(1))
    dense(x)
    assert len(seen) == 3
    again = masked_type.from_dense(masked, ~mask)
    assert torch.equal(again.mask, ~masked.mask)
    masked.mask.zero_()
    assert mask.any()  # the layer has its own


def test_from_dense_refuses_what_it_would_change() -> None:
    mask = torch.ones(4, 3, 3, 3, dtype=torch.bool)

    class Other(nn.Conv2d):
        pass

    parametrized = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for module in (nn.Linear(3, 4), nn.LazyConv2d(4, 3), Other(3, 4, 3), parametrized):
        with pytest.raises(FastpieError, match="Expected a Conv2d"):
            MaskedConv2d.from_dense(module, mask)
    pruned = prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)
    with pytest.raises(FastpieError, match="be a parameter"):
        MaskedConv2d.from_dense(pruned, mask)
    for bad in (mask.float(), mask[:2], None, "mask"):
        if bad is not None:
            with pytest.raises(FastpieError, match="mask"):
                MaskedConv2d(3, 4, 3, mask=bad)
    with pytest.raises(FastpieError, match="mask"):
        MaskedConv2d.from_dense(nn.Conv2d(3, 4, 3), mask[:2])


def test_state_pickle_and_copies() -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.5
    layer = MaskedConv2d(3, 4, 3, mask=mask)
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = MaskedConv2d(3, 4, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mask, mask)
    assert torch.equal(other(x), expected)


def test_a_dense_checkpoint_leaves_the_mask() -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.5
    layer, dense = MaskedConv2d(3, 4, 3, mask=mask), nn.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match="mask"):
        layer.load_state_dict(dense.state_dict())
    result = layer.load_state_dict(dense.state_dict(), strict=False)
    assert result.missing_keys == ["mask"]
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, dense.weight)


def test_mask_stays_bool_and_follows_the_device() -> None:
    layer = MaskedConv2d(3, 4, 3, mask=torch.rand(4, 3, 3, 3) < 0.5)
    for change in (layer.double, layer.bfloat16, layer.half, layer.float):
        assert change().mask.dtype is torch.bool
    assert layer.to(torch.float64).mask.dtype is torch.bool
    on_meta = layer.to("meta")
    assert on_meta.mask.is_meta
    assert on_meta(torch.empty(2, 3, 6, 6, dtype=torch.float64, device="meta")).shape == (
        2,
        4,
        4,
        4,
    )
    assert "sparsity" not in repr(on_meta)
    assert MaskedConv2d(3, 4, 3, device="meta").mask.is_meta


def test_masks_of_a_pruned_model_fit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    masks = fastpie.prune(model, 0.8)
    x = torch.randn(2, 3, 6, 6)
    expected = fastpie.DualModel(model, masks)(x).pruned
    model[0] = fastpie.nn.MaskedConv2d.from_dense(model[0], masks["0.weight"])
    model[3] = fastpie.nn.MaskedLinear.from_dense(model[3], masks["3.weight"])
    torch.testing.assert_close(model(x), expected)


def test_compiles_into_one_graph() -> None:
    model = nn.Sequential(
        MaskedConv2d(3, 4, 3, mask=torch.rand(4, 3, 3, 3) < 0.5),
        nn.ReLU(),
        nn.Flatten(),
        MaskedLinear(4 * 16, 5, mask=torch.rand(5, 64) < 0.5),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), model(x))
