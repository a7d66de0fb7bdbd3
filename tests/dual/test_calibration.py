"""`DualModel.recalibrate`: statistics of the pruned model from data, and only where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastpie
from fastpie import DualModel, FastpieError
from networks import SMALL, Network, ResidualCNN, masked_copy

NORMS = ("bn0", "bn1", "bn2")


class TwoStage(nn.Module):
    """conv -> bn -> relu twice: pruning the first convolution reaches both BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.fc(functional.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def trained(network: nn.Module) -> nn.Module:
    """Eval mode, with running statistics that no data set here has."""
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, 8, 8) * 1.7 + 0.4)
    return network.eval()


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, 8, 8) + 0.2 * i for i, n in enumerate(sizes)]


def only(model: nn.Module, *names: str, sparsity: Any = 0.5) -> fastpie.Masks:
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return fastpie.prune(model, sparsity, exclude=[n for n in others if n not in names])


def pooled_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1)


def test_statistics_are_the_pooled_mean_and_unbiased_variance_over_all_batches() -> None:
    model = trained(TwoStage())
    batches = images(4, 7, 1)
    masks = only(model, "conv1")
    dual = DualModel(model, masks)
    assert dual.recalibrate(batches) is dual
    pruned = masked_copy(model, masks)
    mean, variance = pooled_statistics(pruned.conv1(torch.cat(batches)))
    own = dual.statistics(0)
    torch.testing.assert_close(own["bn1.running_mean"], mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own["bn1.running_var"], variance.float(), rtol=1e-5, atol=1e-6)
    # Behind bn1, which normalises each batch by that batch's own statistics meanwhile.
    inputs = []
    for batch in batches:
        x = pruned.conv1(batch)
        x = functional.batch_norm(x, None, None, model.bn1.weight, model.bn1.bias, training=True)
        inputs.append(pruned.conv2(functional.relu(x)))
    mean, variance = pooled_statistics(torch.cat(inputs))
    torch.testing.assert_close(own["bn2.running_mean"], mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own["bn2.running_var"], variance.float(), rtol=1e-4, atol=1e-5)


def test_batches_of_one_size_give_the_mean_that_update_bn_gives() -> None:
    model = trained(TwoStage())
    masks = only(model, "conv1")
    batches = images(6, 6, 6)
    dual = DualModel(model, masks).recalibrate(batches)
    theirs = masked_copy(model, masks)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for name in ("bn1", "bn2"):
        want = theirs.get_buffer(f"{name}.running_mean")
        torch.testing.assert_close(dual.statistics(0)[f"{name}.running_mean"], want)


def test_one_batch_is_what_the_pruned_model_sees_in_training_mode() -> None:
    model = trained(ResidualCNN())
    masks = fastpie.prune(model, 0.7)
    [x] = images(16)
    dual = DualModel(model, masks).recalibrate([x])
    theirs = masked_copy(model, masks)
    for name in NORMS:
        theirs.get_submodule(name).momentum = 1.0
    theirs.train()(x)
    for name in NORMS:
        for kind in ("running_mean", "running_var"):
            want = theirs.get_buffer(f"{name}.{kind}")
            torch.testing.assert_close(dual.statistics(0)[f"{name}.{kind}"], want)
    torch.testing.assert_close(dual(x).pruned, theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pruned", "affected"),
    [("stem", NORMS), ("conv1", ("bn1", "bn2")), ("conv2", ("bn2",)), ("fc", ())],
)
def test_layers_with_no_removed_weight_upstream_keep_the_dense_statistics_exactly(
    pruned: str, affected: tuple[str, ...]
) -> None:
    model = trained(ResidualCNN())
    dual = DualModel(model, only(model, pruned)).recalibrate(images(4, 4))
    for name, own in dual.statistics(0).items():
        layer, kind = name.split(".")
        same = torch.equal(own, model.get_buffer(name))
        assert same == (layer not in affected or kind == "num_batches_tracked"), name


def test_one_removed_weight_of_value_zero_counts_as_removed() -> None:
    model = trained(TwoStage())
    mask = torch.ones_like(model.conv2.weight, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    dual = DualModel(model, {"conv2.weight": mask}).recalibrate(images(4))
    assert torch.equal(dual.statistics(0)["bn1.running_mean"], model.bn1.running_mean)
    assert not torch.equal(dual.statistics(0)["bn2.running_mean"], model.bn2.running_mean)


@pytest.mark.parametrize("sparsity", [0.0, [0.0]])
def test_all_ones_masks_keep_everything_bit_for_bit(sparsity: Any) -> None:
    model = trained(ResidualCNN())
    dual = DualModel(model, fastpie.prune(model, sparsity)).recalibrate(images(4, 4))
    for name, own in dual.statistics(0).items():
        assert torch.equal(own, model.get_buffer(name)), name
    [x] = images(3)
    out = dual(x)
    assert torch.equal(out.pruned.reshape(out.dense.shape), out.dense)


def test_levels_of_a_ladder_are_recalibrated_as_each_alone() -> None:
    model, levels = trained(ResidualCNN()), [0.0, 0.4, 0.9]
    masks, batches = fastpie.prune(model, levels), images(5, 3)
    dual = DualModel(model, masks).recalibrate(batches)
    for index, level in enumerate(levels):
        alone = DualModel(model, masks.at(level)).recalibrate(batches)
        for name, own in alone.statistics(0).items():
            assert torch.equal(dual.statistics(index)[name], own), (level, name)


def as_dicts(batches: list[Tensor]) -> Iterator[Any]:
    return ({"image": x, "label": torch.zeros(len(x))} for x in batches)


def as_tuples(batches: list[Tensor]) -> Iterator[Any]:
    return ((x, torch.zeros(len(x)), ["id"] * len(x)) for x in batches)


def as_lists(batches: list[Tensor]) -> Iterator[Any]:
    return ([x, torch.zeros(len(x))] for x in batches)


def as_loader(batches: list[Tensor]) -> Any:
    items = torch.utils.data.TensorDataset(torch.cat(batches), torch.zeros(sum(map(len, batches))))
    return torch.utils.data.DataLoader(items, batch_size=len(batches[0]))


@pytest.mark.parametrize("form", [iter, as_dicts, as_tuples, as_lists, as_loader])
def test_batches_come_in_any_form_and_are_iterated_once(form: Any) -> None:
    model, batches = trained(ResidualCNN()), images(4, 4)
    masks = fastpie.prune(model, [0.3, 0.6])
    want = DualModel(model, masks).recalibrate(batches)
    got = DualModel(model, masks).recalibrate(form(batches))
    for level in range(2):
        for name, value in want.statistics(level).items():
            assert torch.equal(got.statistics(level)[name], value), name


class TwoImages(TwoStage):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(left - right)


def test_several_inputs_come_as_a_tuple_or_as_a_loader_collates_them() -> None:
    model = TwoImages()
    masks = fastpie.prune(model, 0.5)
    pairs = list(zip(images(4, 4), images(4, 4), strict=True))
    want = DualModel(model, masks).recalibrate((pair, torch.zeros(4)) for pair in pairs)
    items = [((a, b), 0) for left, right in pairs for a, b in zip(left, right, strict=True)]
    loader = torch.utils.data.DataLoader(items, batch_size=4)
    got = DualModel(model, masks).recalibrate(loader)
    for name, value in want.statistics(0).items():
        assert torch.equal(got.statistics(0)[name], value), name


def test_an_empty_batch_among_others_changes_nothing() -> None:
    model, batches = trained(ResidualCNN()), images(4, 5)
    masks = fastpie.prune(model, 0.5)
    want = DualModel(model, masks).recalibrate(batches).statistics(0)
    for position in range(3):
        padded = [*batches[:position], torch.zeros(0, 3, 8, 8), *batches[position:]]
        got = DualModel(model, masks).recalibrate(padded).statistics(0)
        assert all(torch.equal(got[name], value) for name, value in want.items()), position


def test_recalibrating_after_a_change_of_masks_is_as_recalibrating_afresh() -> None:
    model, batches = trained(ResidualCNN()), images(4, 4)
    everywhere = fastpie.prune(model, 0.5, method="random", seed=1)
    levels = {name: torch.ones_like(level) for name, level in everywhere.levels.items()}
    levels["conv2.weight"].view(-1)[::2] = 0
    behind = fastpie.Masks(  # removes from conv2 alone, so that bn0 and bn1 keep the dense values
        levels, everywhere.sparsities, is_ladder=False, fingerprint=everywhere.fingerprint
    )
    want = DualModel(model, behind).recalibrate(batches).statistics(0)
    dual = DualModel(model, everywhere).recalibrate(batches)
    dual.masks = behind
    got = dual.recalibrate(batches).statistics(0)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_reused_batch_norm_pools_all_its_calls() -> None:
    network: Network = next(n for n in SMALL if n.name == "reused")
    model, [x] = network.build(), network.inputs(6)
    masks = fastpie.prune(model, 0.5)
    pruned, seen = masked_copy(model, masks), []
    pruned.bn.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    pruned.bn.train()
    pruned(x)
    dual = DualModel(model, masks).recalibrate([x])
    mean, variance = pooled_statistics(torch.cat(seen))
    own = dual.statistics(0)
    torch.testing.assert_close(own["bn.running_mean"], mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own["bn.running_var"], variance.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv_1d", "conv_3d"])
def test_batch_norm_of_other_dimensions(name: str) -> None:
    network = next(n for n in SMALL if n.name == name)
    model, [x] = network.build(), network.inputs(6)
    masks = fastpie.prune(model, 0.5)
    dual = DualModel(model, masks).recalibrate([x[:2], x[2:]])
    mean, variance = pooled_statistics(masked_copy(model, masks)[0](x))
    torch.testing.assert_close(dual.statistics(0)["1.running_mean"], mean.float())
    torch.testing.assert_close(dual.statistics(0)["1.running_var"], variance.float())


def test_the_model_its_modes_and_the_random_state_are_left_as_they_were() -> None:
    model = trained(ResidualCNN()).train()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    model.bn1.eval()
    modes = {name: module.training for name, module in dual.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches, state = images(4, 4), torch.get_rng_state()
    dual.recalibrate(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in dual.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_that_are_not_finite_are_refused_and_change_nothing(
    value: float, position: int
) -> None:
    model = trained(ResidualCNN())
    dual = DualModel(model, fastpie.prune(model, [0.3, 0.6]))
    before = [{k: v.clone() for k, v in dual.statistics(i).items()} for i in range(2)]
    batches = images(4, 4)
    batches[position][1, 2, 3, 4] = value
    with pytest.raises(FastpieError, match=r"finite.*bn"):
        dual.recalibrate(batches)
    for level in range(2):
        assert all(torch.equal(dual.statistics(level)[k], v) for k, v in before[level].items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "batches"), ([{"x": torch.zeros(1)}], "image"), ([()], "empty"), ([[]], "empty")],
    ids=["none", "dict_without_image", "empty_tuple", "empty_list"],
)
def test_batches_without_images_are_refused_and_modes_restored(batches: Any, message: str) -> None:
    model = trained(ResidualCNN()).train()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    with pytest.raises(FastpieError, match=message):
        dual.recalibrate(batches)
    assert all(module.training for module in dual.modules())


def test_a_network_without_batch_norm_is_left_alone() -> None:
    network = next(n for n in SMALL if n.name == "plain")
    model, [x] = network.build(), network.inputs()
    dual = DualModel(model, fastpie.prune(model, 0.5))
    want = dual(x)
    assert torch.equal(dual.recalibrate([x])(x).pruned, want.pruned)
