"""`fastpie.prune` by filters, by patterns N:M, and further within masks that exist."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import fastpie
from fastpie import FastpieError
from fastpie.ops.sparse24 import pack_sparse24
from networks import SMALL, Network, PlainCNN, TiedWeights


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def pattern_by_hand(weight: Tensor, kept: int, size: int) -> Tensor:
    """The keys of each group sorted in Python: magnitude, then index."""
    taps = weight[0, 0].numel() if weight.ndim > 2 else 1
    rows = weight.reshape(len(weight), -1, taps).transpose(1, 2).reshape(len(weight), -1)
    keep = torch.ones_like(rows, dtype=torch.bool)
    for row, begin in itertools.product(range(len(rows)), range(0, rows.shape[1], size)):
        group = list(range(begin, min(begin + size, rows.shape[1])))
        group.sort(key=lambda i: (abs(rows[row, i].item()), i))
        for i in group[: max(0, len(group) - kept)]:
            keep[row, i] = False
    return keep.view(len(weight), taps, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(3, 5, 3),  # groups run across taps, the last one is short
        nn.Conv2d(8, 8, 3, groups=8),  # one channel: taps alone
        nn.Conv1d(7, 4, 5),
        nn.Conv3d(5, 4, (1, 2, 3)),
        nn.Linear(16, 3),
        nn.Linear(3, 2),
        nn.Conv2d(8, 4, 1, dtype=torch.float64),
        nn.Conv2d(8, 4, 3).to(torch.bfloat16),
        nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last),
    ],
    ids=repr,
)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "1:2", "4:5"])
def test_a_pattern_keeps_the_largest_of_each_group(layer: nn.Module, pattern: str) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape).mul(3).round().div(3))  # with ties
    kept, size = map(int, pattern.split(":"))
    masks = fastpie.prune(layer, method=pattern)
    assert torch.equal(masks["weight"], pattern_by_hand(layer.weight.detach(), kept, size))
    assert masks.sparsities == [1 - kept / size]
    assert not masks.is_ladder


@pytest.mark.parametrize("channels", [32, 20, 3])
def test_two_of_four_fits_sparse_tensor_cores_without_growth(channels: int) -> None:
    conv = nn.Conv2d(channels, 64, 3)
    keep = fastpie.prune(conv, method="2:4")["weight"]
    packed = pack_sparse24(conv.weight.detach().movedim(1, -1), keep.movedim(1, -1))
    assert packed.report()["overfull"] == 0
    assert packed.report()["extra_columns"] == 0
    assert torch.equal(packed.unpack().movedim(-1, 1), conv.weight * keep)


def test_two_of_four_keeps_the_larger_two() -> None:
    linear = nn.Linear(64, 32)
    keep = fastpie.prune(linear, method="2:4")["weight"]
    assert (keep.view(-1, 4).sum(1) == 2).all()
    kept = linear.weight.detach().abs()[keep].view(-1, 2).amin(1)
    gone = linear.weight.detach().abs()[~keep].view(-1, 2).amax(1)
    assert (kept >= gone).all()


def test_the_sparsity_of_a_pattern_may_be_said() -> None:
    model = network()
    masks = fastpie.prune(model, method="2:4")
    assert fastpie.prune(model, 0.5, method="2:4") == masks
    assert fastpie.prune(model, [0.5], method="2:4").is_ladder
    assert fastpie.prune(model, 0.5, method="2:4", scope="layer") == masks
    assert fastpie.prune(model, 2 / 3, method="1:3").sparsities == [2 / 3]


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6])
def test_filters_of_a_layer_go_as_in_torch(sparsity: float, norm: int) -> None:
    model = network()
    masks = fastpie.prune(model, sparsity, method="filter", scope="layer", norm=norm)
    for name in ("0", "2", "5"):
        layer = model.get_submodule(name)
        count = round(sparsity * len(layer.weight))
        gone = (~masks[f"{name}.weight"]).flatten(1)
        assert torch.equal(gone.any(1), gone.all(1))
        assert int(gone.all(1).sum()) == count
        if count:
            torch_prune.ln_structured(layer, "weight", count, n=norm, dim=0)
            assert torch.equal(layer.weight_mask.bool(), masks[f"{name}.weight"])


@pytest.mark.parametrize("norm", [1, 2])
def test_filters_of_all_layers_go_by_norm_per_weight(norm: int) -> None:
    model = network()
    masks = fastpie.prune(model, 0.4, method="filter", norm=norm, exclude="5")
    filters = [
        (np.linalg.norm(row, norm) / len(row) ** (1 / norm), name, i)
        for name in ("0.weight", "2.weight")
        for i, row in enumerate(model.get_parameter(name).detach().flatten(1).double().numpy())
    ]
    gone = {(name, i) for _, name, i in sorted(filters)[: round(0.4 * 20)]}
    found = {(n, i) for n, m in masks.items() for i in range(len(m)) if not m[i].any()}
    assert found == gone
    assert masks.info["norm"] == norm


def test_equal_filters_go_in_order() -> None:
    model = PlainCNN()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    masks = fastpie.prune(model, 0.5, method="filter")  # 6 + 8 + 5 filters
    assert [int(m.flatten(1).any(1).sum()) for m in masks.values()] == [0, 4, 5]
    assert not masks["conv2.weight"][:4].any()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_ladder_of_filters_is_nested_and_each_level_the_choice_alone(scope: str) -> None:
    model, levels = network(), [0.1, 0.4, 0.8]
    masks = fastpie.prune(model, levels, method="filter", scope=scope)
    for level in levels:
        assert masks.at(level) == fastpie.prune(model, level, method="filter", scope=scope)
    for low, high in itertools.pairwise(levels):
        assert not any((masks.at(high)[n] & ~masks.at(low)[n]).any() for n in masks)


@pytest.mark.parametrize(
    "arguments", [{"method": "2:4"}, {"sparsity": [0.2, 0.5], "method": "filter"}]
)
def test_structured_masks_are_stored_and_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = network().eval()
    masks = fastpie.prune(model, **arguments)
    masks.save(tmp_path / "masks.safetensors")
    assert fastpie.Masks.load(tmp_path / "masks.safetensors") == masks
    assert fastpie.Masks.from_bytes(masks.to_bytes()) == masks
    x = torch.randn(2, 3, 9, 9)
    pruned = fastpie.DualModel(model, masks).eval()(x).pruned
    masks.apply_(model)
    torch.testing.assert_close(pruned[-1] if masks.is_ladder else pruned, model(x))


@pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)
@pytest.mark.parametrize("method", ["2:4", "filter"])
def test_any_network(network: Network, method: str) -> None:
    model = network.build()
    masks = fastpie.prune(model, 0.5, method=method)
    assert list(masks) == list(fastpie.prune(model, 0.5))
    assert 0 < sum(masks.removed()[0].values()) < masks.total


def test_a_tied_weight_counts_once() -> None:
    model = TiedWeights()
    assert list(fastpie.prune(model, 0.5, method="filter")) == ["first.weight", "head.weight"]
    assert list(fastpie.prune(model, method="1:2")) == ["first.weight", "head.weight"]


# ---------------------------------------------------------------------------- within


@pytest.mark.parametrize("method", ["l1", "random", "filter"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_removed_stays_removed(method: str, scope: str) -> None:
    model = network()
    options: dict[str, Any] = {"method": method, "scope": scope}
    before = fastpie.prune(model, 0.3, **options, seed=1)
    with torch.no_grad():  # weights move, removed ones may even be the largest
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    after = fastpie.prune(model, 0.6, **options, seed=2, within=before)
    assert not any((after[n] & ~before[n]).any() for n in after)
    alone = fastpie.prune(model, 0.6, **options, seed=2)
    if method == "filter":
        counts = [
            sum(int((~m.flatten(1).any(1)).sum()) for m in x.values()) for x in (after, alone)
        ]
    else:
        counts = [sum(x.removed()[0].values()) for x in (after, alone)]
    assert counts[0] == counts[1]
    assert fastpie.prune(model, 0.3, **options, seed=2, within=before) == before


def test_within_zeros_are_told_from_removed_weights() -> None:
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 3.0, 2.0, 1.0]]))
    within = fastpie.Masks.from_tensors(
        {"weight": torch.tensor([[True, True, True, False]])}, linear
    )
    masks = fastpie.prune(linear, 0.25, within=within)
    assert masks["weight"].tolist() == [[True, True, True, False]]
    assert fastpie.prune(linear, 0.5, within=within)["weight"].tolist() == [
        [False, True, True, False]
    ]
    assert linear.weight[0, 3] == 1  # the model is not changed


BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "nothing goes": (network, {"method": "4:4"}, "below M"),
    "more than all": (network, {"method": "5:4"}, "below M"),
    "none kept": (network, {"method": "0:4"}, "pattern"),
    "other sparsity": (network, {"method": "2:4", "sparsity": 0.9}, "0.5"),
    "ladder": (network, {"method": "2:4", "sparsity": [0.5, 0.75]}, "0.5"),
    "no sparsity": (network, {"method": "filter"}, "None"),
    "norm": (network, {"method": "filter", "sparsity": 0.5, "norm": 3}, "norm"),
    "method": (network, {"method": 3, "sparsity": 0.5}, "method"),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        {"method": "filter", "sparsity": 0.5, "modules": (nn.ConvTranspose2d,)},
        "second",
    ),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), {"method": "2:4"}, "real"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), {"method": "2:4"}, "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    build, arguments, text = BAD[name]
    with pytest.raises(FastpieError, match=text):
        fastpie.prune(build(), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["2:4", "filter"])
def test_weights_that_are_not_finite_are_refused(method: str, value: float) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = value
    with pytest.raises(FastpieError, match=r"2\.weight"):
        fastpie.prune(model, 0.5, method=method)


def test_bad_within_is_refused() -> None:
    model = network()
    masks = fastpie.prune(model, 0.5)
    with pytest.raises(FastpieError, match="come back"):
        fastpie.prune(model, 0.4, within=masks)
    with pytest.raises(FastpieError, match="come back"):
        fastpie.prune(model, 0.5, within=masks, scope="layer")
    with pytest.raises(FastpieError, match="filters"):
        fastpie.prune(model, 0.6, within=masks, method="filter")
    with pytest.raises(FastpieError, match="pattern"):
        fastpie.prune(model, within=masks, method="2:4")
    with pytest.raises(FastpieError, match="made for"):
        fastpie.prune(PlainCNN(), 0.6, within=masks)
    with pytest.raises(FastpieError, match="choose from"):
        fastpie.prune(model, 0.6, within=masks, exclude="0")


def test_damaged_bytes_are_refused() -> None:
    data = fastpie.prune(network(), 0.5).to_bytes()
    for bad in (b"", data[:-1], data.replace(b"fastpie-masks-1", b"fastpie-masks-9"), b"x" * 99):
        with pytest.raises(FastpieError):
            fastpie.Masks.from_bytes(bad)
