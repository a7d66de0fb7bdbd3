"""`MaskedTraining`: removed weights are zero after every step, all others as without masks."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastpie
from fastpie import FastpieError, Masks
from fastpie.nn import MaskedConv2d, MaskedLinear
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning, IterativePruning
from networks import TiedWeights

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw_maximize": lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 1, 6, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        images, labels = batch(number)

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def check_zero(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None) -> None:
    """Removed weights and their state are zero; that they are finite says they could have moved."""
    for name, keep in masks.items():
        weight = model.get_parameter(name)
        assert weight.isfinite().all()
        assert not weight[~keep].any(), name
        for key, value in (optimizer.state.get(weight, {}) if optimizer else {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not value[~keep].any(), (name, key)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_exactly_zero_after_a_thousand_steps(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = OPTIMIZERS[name](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.8), optimizer)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1000))
    check_zero(model, masked.masks, optimizer)
    assert masked.step == 1000
    for key, keep in masked.masks.items():
        assert (model.get_parameter(key) != before[key])[keep].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    masks = fastpie.prune(model, 0.7)
    train(model, optimizer, range(3))  # there is momentum everywhere
    MaskedTraining(model, masks, optimizer)
    check_zero(model, masks, optimizer)
    for number in range(5):
        train(model, optimizer, range(number, number + 1))
        check_zero(model, masks, optimizer)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"adafactor", "lbfgs"}))
def test_kept_weights_are_updated_as_without_masks(name: str) -> None:
    """A step from the same weights, state and gradients, to the bit."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.7), optimizer)
    train(model, optimizer, range(3))
    free = copy.deepcopy(model)
    free_optimizer = OPTIMIZERS[name](free.parameters())
    free_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 4))
    train(free, free_optimizer, range(3, 4))
    moved = False
    for (key, ours), theirs in zip(model.named_parameters(), free.parameters(), strict=True):
        keep = masked.masks.get(key, torch.ones_like(ours, dtype=torch.bool))
        assert torch.equal(ours[keep], theirs[keep])
        moved = moved or bool(theirs[~keep].any())
        for field, value in optimizer.state[ours].items():
            other = free_optimizer.state[theirs][field]
            if isinstance(value, Tensor) and value.shape == ours.shape:
                value, other = value[keep], other[keep]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), field
    assert moved  # without masks they would not have stayed zero


class OfMaskedLayers(nn.Sequential):
    """`network` of masked layers."""

    def __init__(self, model: nn.Sequential, masks: Masks) -> None:
        super().__init__(*copy.deepcopy(model))
        self[0] = MaskedConv2d.from_dense(self[0], masks["0.weight"])
        self[3] = MaskedConv2d.from_dense(self[3], masks["3.weight"])
        self[7] = MaskedLinear.from_dense(self[7], masks["7.weight"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("swapped", [False, True])
def test_trains_as_masked_layers_do(name: str, swapped: bool) -> None:
    model = network()
    masks = fastpie.prune(model, 0.6)
    layers = OfMaskedLayers(model, masks)
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (model, layers)]
    masked = MaskedTraining(model, masks, optimizers[0])
    if swapped:
        assert masked.swap_layers(density=1.0) == ["0", "3", "7"]
    train(model, optimizers[0], range(20))
    train(layers, optimizers[1], range(20))
    x = batch(99)[0]
    torch.testing.assert_close(model.eval()(x), layers.eval()(x), rtol=1e-3, atol=1e-4)


def test_sparse_kernels_train_as_zeros_do() -> None:
    """Layers large and sparse enough for the kernels of the CPU."""
    plain = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3))
    swapped = copy.deepcopy(plain)
    masks = fastpie.prune(plain, 0.95)
    x = torch.randn(8, 32, 14, 14)
    for model in (plain, swapped):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        masked = MaskedTraining(model, masks, optimizer)
        if model is swapped:
            assert masked.swap_layers() == ["0", "2"]
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        check_zero(model, masks, optimizer)
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(
        not p.grad[~m].any() for p, m in ((swapped[i].weight, masks[f"{i}.weight"]) for i in (0, 2))
    )


def test_a_loop_may_call_after_step_instead_of_hooks_or_beside_them() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.5))
    train(model, optimizer, range(2))
    masked.after_step()
    check_zero(model, masked.masks, None)
    assert masked.step == 1
    masked.remove()
    hooked = MaskedTraining(model, masked.masks, optimizer)
    train(model, optimizer, range(2))
    hooked.after_step()  # counts no step
    check_zero(model, masked.masks, optimizer)
    assert (masked.step, hooked.step) == (1, 2)
    hooked.remove()
    train(model, optimizer, range(1))
    hooked.after_step()
    assert hooked.step == 2
    with pytest.raises(AssertionError):
        check_zero(model, masked.masks, optimizer)


def test_a_ladder_masks_by_its_highest_level() -> None:
    model = network()
    masks = fastpie.prune(model, [0.2, 0.6])
    masked = MaskedTraining(model, masks)
    assert masked.masks == masks.at(0.6)
    assert masked.sparsity == pytest.approx(0.6, abs=0.01)
    check_zero(model, masks, None)


@pytest.mark.parametrize("method", ["2:4", "filter"])
def test_structured_masks(method: str) -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks = fastpie.prune(model, 0.5, method=method, exclude="7")
    masked = MaskedTraining(model, masks, optimizer)
    train(model, optimizer, range(5))
    check_zero(model, masks, optimizer)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert masked.sparsity == pytest.approx(gone / masks.total)


def test_tied_weights() -> None:
    model = TiedWeights()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    masks = fastpie.prune(model, 0.5)
    MaskedTraining(model, masks, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    check_zero(model, masks, optimizer)
    assert model.second.weight is model.first.weight


def test_gradients_that_accumulate_and_scaled_steps_that_are_skipped() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.5), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(6):
        images, labels = batch(number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        scaler.scale(loss * (float("inf") if number == 3 else 1)).backward()
        if number % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert masked.step == 2
    check_zero(model, masked.masks, optimizer)


def test_other_dtypes_layouts_and_frozen_weights() -> None:
    model = network().to(torch.bfloat16).to(memory_format=torch.channels_last)
    model[3].double()
    model[7].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = fastpie.prune(model, 0.5)
    MaskedTraining(model, masks, optimizer)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    check_zero(model, masks, optimizer)


def test_clipping_sees_kept_gradients_alone_once_gradients_are_masked() -> None:
    model = network()
    masks = fastpie.prune(model, 0.7)
    layers = OfMaskedLayers(model, masks)
    masked = MaskedTraining(model, masks)
    x, y = batch(0)
    for m in (model, layers):
        nn.functional.cross_entropy(m(x), y).backward()
    before = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    masked.mask_gradients()
    norms = [nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in (model, layers)]
    torch.testing.assert_close(norms[0], norms[1])
    assert norms[0] < before


def test_a_moving_average_and_another_copy() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.3), optimizer)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, range(3))
    ema.update_parameters(model)
    check_zero(ema.module, masked.masks, None)
    masked.set_masks(fastpie.prune(model, 0.6, within=masked.masks))
    ema.update_parameters(model)
    with pytest.raises(AssertionError):
        check_zero(ema.module, masked.masks, None)
    masked.apply_to(ema)
    check_zero(ema.module, masked.masks, None)
    with pytest.raises(FastpieError, match="made for"):
        masked.apply_to(TiedWeights())


def test_weights_that_come_back_start_clean() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masked = MaskedTraining(model, fastpie.prune(model, 0.6), optimizer)
    train(model, optimizer, range(4))
    gone = {n: ~m for n, m in masked.masks.items()}
    masked.set_masks(fastpie.prune(model, 0.0))
    for name, place in gone.items():
        weight = model.get_parameter(name)
        assert not weight[place].any()
        assert not optimizer.state[weight]["exp_avg"][place].any()
        assert not optimizer.state[weight]["exp_avg_sq"][place].any()
    train(model, optimizer, range(4, 6))
    # Not all: some filters may be dead.
    assert all(model.get_parameter(n)[place].any() for n, place in gone.items())


def test_a_compiled_model() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["sgd"](compiled.parameters())
    masked = MaskedTraining(compiled, fastpie.prune(model, 0.9), optimizer)
    train(compiled, optimizer, range(2))
    swapped = masked.swap_layers()
    assert "3" in swapped
    train(compiled, optimizer, range(2, 4))
    check_zero(model, masked.masks, optimizer)
    assert masked.restore_layers() == swapped
    train(compiled, optimizer, range(4, 5))
    check_zero(model, masked.masks, optimizer)


def test_layers_are_swapped_as_sparsity_grows() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = GradualPruning(0.9, begin=1, end=5, every=2, scope="layer")
    masked = MaskedTraining(model, schedule, optimizer)
    assert masked.swap_layers() == []
    train(model, optimizer, range(5))
    assert all(type(model[i]) in (MaskedConv2d, MaskedLinear) for i in (0, 3, 7))
    assert torch.equal(model[3].mask, masked.masks["3.weight"])
    check_zero(model, masked.masks, optimizer)


def test_a_state_goes_on_bit_for_bit() -> None:
    schedule = GradualPruning(0.9, begin=2, end=12, every=3, initial=0.2)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, MaskedTraining]:
        torch.manual_seed(5)
        model = network()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, MaskedTraining(model, schedule, optimizer)

    whole, optimizer, masked = begin()
    train(whole, optimizer, range(15))
    part, optimizer, first = begin()
    train(part, optimizer, range(7))
    file = io.BytesIO()
    torch.save([first.state_dict(), part.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    ours, of_model, of_optimizer = torch.load(file, weights_only=True)
    other, optimizer, second = begin()
    train(other, optimizer, range(20, 23))  # it may have gone elsewhere
    other.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)
    second.load_state_dict(ours)
    assert (second.step, second.masks) == (7, first.masks)
    train(other, optimizer, range(7, 15))
    assert second.masks == masked.masks
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_bad_arguments_are_refused() -> None:
    model = network()
    masks = fastpie.prune(model, 0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for arguments, text in (
        ((model, 0.5, optimizer), "Masks or a schedule"),
        ((3, masks, optimizer), "nn.Module"),
        ((TiedWeights(), masks), "made for"),
        ((model, masks, "sgd"), "Optimizer"),
        ((model, masks, OPTIMIZERS["sgd"](network().parameters())), "holds none"),
        ((model, IterativePruning()), "optimizer to rewind"),
    ):
        with pytest.raises(FastpieError, match=text):
            MaskedTraining(*arguments)
    with pytest.raises(FastpieError, match="rewinds"):
        MaskedTraining(model, masks, optimizer, rewound=[optimizer])
    masked = MaskedTraining(model, masks, optimizer)
    with pytest.raises(FastpieError, match="IterativePruning"):
        masked.next_round()
    with pytest.raises(FastpieError, match="step"):
        masked.load_state_dict({})
    with pytest.raises(FastpieError, match="rewinding"):
        masked.load_state_dict({**masked.state_dict(), "rewind_point": {"groups": []}})


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
import fastpie
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # until DDP broadcasts, weights differ
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                      nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
for method in ("l1", "random"):
    schedule = GradualPruning(0.8, begin=0, end=6, every=2, initial=0.1, method=method)
    masked = MaskedTraining(model, schedule, optimizer)
    if method == "random":  # DDP then broadcasts the masks as buffers
        masked.swap_layers(density=1.0)
    ddp = nn.parallel.DistributedDataParallel(model)
    MaskedTraining(ddp, fastpie.prune(model, 0.1, method=method), optimizer).remove()
    for step in range(8):
        if step == 4:
            masked.swap_layers(density=1.0)
        optimizer.zero_grad()
        ddp(torch.randn(4, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    both = [None, None]
    dist.all_gather_object(both, [masked.masks, masked.sparsity, model.state_dict()])
    assert both[0][:2] == both[1][:2]
    assert abs(masked.sparsity - 0.8) < 0.01
    for name, value in both[0][2].items():
        if name != "1.num_batches_tracked" and "running" not in name:
            assert torch.equal(value, both[1][2][name]), name
    for name, mask in masked.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    masked.restore_layers()
    masked.remove()
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


def test_processes_have_the_masks_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2
