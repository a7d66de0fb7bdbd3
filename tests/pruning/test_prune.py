"""`fastpie.prune`: which weights go, exactly and the same everywhere."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import fastpie
from fastpie import FastpieError
from networks import SMALL, Network, PlainCNN, ReusedModule, TiedWeights

LADDER = [0.1, 0.3, 0.5, 0.7, 0.9, 0.95]


def removed(mask: Tensor) -> int:
    return int((~mask).sum())


def two_linear(first: list[float], second: list[float]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(len(first), 1, bias=False), nn.Linear(len(second), 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([first]))
        model[1].weight.copy_(torch.tensor([second]))
    return model


@pytest.mark.parametrize("method", ["l1", "random"])
@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_exactly_the_rounded_share_goes(sparsity: float, method: str) -> None:
    model = PlainCNN()
    total = sum(m.weight.numel() for m in (model.conv1, model.conv2, model.fc))
    masks = fastpie.prune(model, sparsity, method=method)
    assert sum(map(removed, masks.values())) == round(sparsity * total)
    masks = fastpie.prune(model, sparsity, method=method, scope="layer")
    for mask in masks.values():
        assert removed(mask) == round(sparsity * mask.numel())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-30]), min_size=1, max_size=12),
    st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=1, max_size=12),
    st.sets(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    st.sampled_from(["global", "layer"]),
)
def test_ties_go_in_order_of_modules_then_of_memory(
    first: list[float], second: list[float], levels: set[float], scope: str
) -> None:
    model = two_linear(first, second)
    sparsities = sorted(levels)
    masks = fastpie.prune(model, sparsities, scope=scope)
    groups = [first + second] if scope == "global" else [first, second]
    for sparsity in sparsities:
        want = []
        for group in groups:
            order = sorted(range(len(group)), key=lambda i: (abs(group[i]), i))
            gone = set(order[: round(sparsity * len(group))])
            want += [i not in gone for i in range(len(group))]
        level = masks.at(sparsity)
        assert level["0.weight"].tolist() == [want[: len(first)]]
        assert level["1.weight"].tolist() == [want[len(first) :]]


def test_equal_weights_everywhere_go_first_module_first() -> None:
    model = PlainCNN()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    flat = torch.cat([m.reshape(-1) for m in fastpie.prune(model, 0.4).values()])
    count = round(0.4 * flat.numel())
    assert list(fastpie.prune(model, 0.4)) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert not flat[:count].any()
    assert flat[count:].all()


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_each_level_of_a_ladder_removes_all_that_the_one_before_does(
    method: str, scope: str
) -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, LADDER, method=method, scope=scope, seed=3)
    assert masks.is_ladder
    assert masks.sparsities == LADDER
    for low, high in itertools.pairwise(LADDER):
        for name in masks:
            assert not (masks.at(high)[name] & ~masks.at(low)[name]).any()
    for sparsity in LADDER:
        alone = fastpie.prune(model, sparsity, method=method, scope=scope, seed=3)
        assert masks.at(sparsity) == alone


def test_a_number_is_no_ladder_and_a_list_is_one() -> None:
    model = nn.Linear(4, 4)
    for number in (0.5, 0, np.float64(0.5), np.float32(0.5), np.int64(0), np.array(0.5)):
        assert not fastpie.prune(model, number).is_ladder, repr(number)
    assert not fastpie.prune(model, torch.tensor(0.5)).is_ladder
    for levels in ([0.5], (0.5,), np.array([0.5]), torch.tensor([0.5])):
        assert fastpie.prune(model, levels).is_ladder, repr(levels)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_global_choice_is_that_of_torch_global_unstructured(sparsity: float) -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, sparsity)
    theirs = copy.deepcopy(model)
    torch_prune.global_unstructured(
        [(theirs.conv1, "weight"), (theirs.conv2, "weight"), (theirs.fc, "weight")],
        pruning_method=torch_prune.L1Unstructured,
        amount=sparsity,
    )
    for name in ("conv1", "conv2", "fc"):
        want = getattr(theirs, name).weight_mask.bool()
        assert torch.equal(masks[f"{name}.weight"], want)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_layer_choice_is_that_of_torch_l1_unstructured(sparsity: float) -> None:
    model = PlainCNN()
    masks = fastpie.prune(model, sparsity, scope="layer")
    for name in ("conv1", "conv2", "fc"):
        theirs = torch_prune.l1_unstructured(
            copy.deepcopy(getattr(model, name)), "weight", sparsity
        )
        assert torch.equal(masks[f"{name}.weight"], theirs.weight_mask.bool())


@pytest.mark.parametrize("network", SMALL, ids=lambda n: n.name)
def test_pruning_leaves_the_model_as_it_was(network: Network) -> None:
    model = network.build().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    masks = fastpie.prune(model, LADDER)
    assert list(model.state_dict()) == list(before)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert mask.dtype is torch.bool
        assert mask.shape == parameters[name].shape


def test_tied_weights_count_once() -> None:
    masks = fastpie.prune(TiedWeights(), 0.5)
    assert list(masks) == ["first.weight", "head.weight"]
    assert masks.total == 36 + 18
    assert sum(map(removed, masks.values())) == 27


def test_a_module_known_by_two_names_counts_once() -> None:
    masks = fastpie.prune(ReusedModule(), 0.5)
    assert list(masks) == ["conv.weight", "head.weight"]


def test_random_masks_follow_the_seed_and_nothing_else() -> None:
    model = PlainCNN()
    first = fastpie.prune(model, 0.5, method="random", seed=1)
    assert fastpie.prune(PlainCNN(), 0.5, method="random", seed=1) == first
    assert fastpie.prune(model, 0.5, method="random", seed=2) != first
    assert fastpie.prune(model, 0.5) != first


def test_random_masks_without_seed_follow_torch_manual_seed_and_differ_between_calls() -> None:
    model = PlainCNN()
    torch.manual_seed(5)
    first, second = (fastpie.prune(model, 0.5, method="random") for _ in range(2))
    torch.manual_seed(5)
    assert fastpie.prune(model, 0.5, method="random") == first
    assert first != second
    assert fastpie.prune(model, 0.5, method="random", seed=first.info["seed"]) == first


def test_excluded_modules_and_parameters_are_left_alone() -> None:
    model = nn.ModuleDict({"a": PlainCNN(), "ab": nn.Linear(3, 3)})
    everything = ["a.conv1.weight", "a.conv2.weight", "a.fc.weight", "ab.weight"]
    assert list(fastpie.prune(model, 0.5)) == everything
    assert list(fastpie.prune(model, 0.5, exclude=["a"])) == everything[3:]
    assert list(fastpie.prune(model, 0.5, exclude=("a.conv1", "ab.weight"))) == everything[1:3]
    assert list(fastpie.prune(model, 0.5, exclude="ab")) == everything[:3]
    assert list(fastpie.prune(model, 0.5, exclude=["ab.bias"])) == everything
    masks = fastpie.prune(model, 0.5, exclude=["a.fc"])
    assert sum(map(removed, masks.values())) == round(0.5 * masks.total)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_tied_weight_excluded_by_one_name_is_left_alone(name: str) -> None:
    assert list(fastpie.prune(TiedWeights(), 0.5, exclude=[name])) == ["head.weight"]


def test_modules_choose_the_classes_whose_weights_are_prunable() -> None:
    model = PlainCNN()
    assert list(fastpie.prune(model, 0.5, modules=(nn.Linear,))) == ["fc.weight"]
    assert list(fastpie.prune(model, 0.5, modules=(nn.Conv2d,))) == ["conv1.weight", "conv2.weight"]
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    assert list(fastpie.prune(embedding, 0.5, modules=(nn.Embedding,))) == ["0.weight"]


def test_biases_and_normalisation_are_never_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    assert list(fastpie.prune(model, 0.9)) == ["0.weight"]


def test_a_single_layer_is_a_model() -> None:
    assert list(fastpie.prune(nn.Linear(4, 2), 0.5)) == ["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_choice_follows_the_values_in_every_dtype(dtype: torch.dtype) -> None:
    model = PlainCNN().to(dtype)
    want = fastpie.prune(copy.deepcopy(model).double(), LADDER)
    assert fastpie.prune(model, LADDER) == want


def test_float64_weights_that_fp32_cannot_tell_apart_are_told_apart() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(
            torch.tensor([[1 + 3e-12, 1 + 1e-12, 1 + 2e-12, 1.0]], dtype=torch.float64)
        )
    assert fastpie.prune(model, 0.5)["weight"].tolist() == [[True, False, True, False]]


def test_memory_layout_does_not_change_the_choice() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3))
    with torch.no_grad():  # ties, so that the order of reading decides
        model[0].weight.copy_((model[0].weight * 20).round())
    want = fastpie.prune(model, LADDER)
    last = fastpie.prune(copy.deepcopy(model).to(memory_format=torch.channels_last), LADDER)
    assert last == want
    assert all(torch.equal(last[name], want[name]) for name in want)


def test_thread_count_does_not_change_the_choice(restore_threads: None) -> None:
    model = nn.Linear(300, 300)
    with torch.no_grad():
        model.weight.copy_((model.weight * 100).round())
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(fastpie.prune(model, LADDER))
    assert results[0] == results[1]


def test_as_many_levels_as_masks_can_hold() -> None:
    levels = np.linspace(0, 0.99, 255)
    masks = fastpie.prune(nn.Linear(30, 30), levels)
    assert [removed(masks.at(s)["weight"]) for s in levels] == [round(s * 900) for s in levels]


@pytest.mark.parametrize(
    "sparsity",
    [
        1.0,
        1,
        -0.1,
        2,
        float("nan"),
        float("inf"),
        True,
        [],
        [0.5, 0.5],
        [0.5, 0.3],
        [0.1, 1.0],
        [0.1, float("nan")],
        [[0.1, 0.2]],
        None,
        "half",
        "0.5",
        ["0.5"],
        [None],
        1j,
    ],
    ids=repr,
)
def test_sparsity_outside_its_range_is_refused(sparsity: object) -> None:
    with pytest.raises(FastpieError, match=r"(?i)sparsity|levels"):
        fastpie.prune(nn.Linear(3, 3), sparsity)


def test_more_levels_than_masks_can_hold_are_refused() -> None:
    with pytest.raises(FastpieError, match="255"):
        fastpie.prune(nn.Linear(30, 30), np.linspace(0, 0.99, 256))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_weights_that_are_not_finite_are_refused_by_name(method: str, value: float) -> None:
    model = PlainCNN()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = value
    with pytest.raises(FastpieError, match=r"conv2\.weight"):
        fastpie.prune(model, 0.5, method=method)
    assert "conv2.weight" not in fastpie.prune(model, 0.5, method=method, exclude=["conv2"])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.complex64)


REFUSED = {
    "no_prunable_weights": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), {}, "prunable"),
    "all_excluded": (PlainCNN, {"exclude": ["conv1", "conv2", "fc"]}, "prunable.*outside"),
    "unknown_exclude": (PlainCNN, {"exclude": ["conv1", "conv9"]}, "conv9"),
    "unknown_method": (PlainCNN, {"method": "l2"}, "l2"),
    "unknown_scope": (PlainCNN, {"scope": "block"}, "block"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), {}, "parametri"),
    "torch_pruned": (lambda: torch_prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), {},
                     "weight"),
    "lazy": (lambda: nn.LazyLinear(3), {}, "lazy|initialis"),
    "lazy_normalisation": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyBatchNorm2d()), {},
                           "lazy|initialis"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), {}, "meta"),
    "complex": (Complex, {}, "complex64"),
    "no_module": (lambda: torch.zeros(3), {}, "Module"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_models_and_arguments_that_cannot_be_pruned_are_refused(build, arguments, message) -> None:
    with pytest.raises(FastpieError, match=message):
        fastpie.prune(build(), 0.5, **arguments)


def test_excluding_a_parametrized_layer_lets_the_rest_be_pruned() -> None:
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
    assert list(fastpie.prune(model, 0.5, exclude=["1"])) == ["0.weight"]
