"""Gradual and iterative pruning while training, and what they rewind to."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpie
from fastpie import FastpieError
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning, IterativePruning, MaskingSchedule


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Any = ()
) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 1, 6, 6, generator=generator)
        labels = torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        for scheduler in after:
            scheduler.step()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


# ---------------------------------------------------------------------------- gradual


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_gradual_sparsity_is_the_published_formula(initial: float) -> None:
    begin, span, prunings, final = 40, 10, 7, 0.9
    schedule = GradualPruning(final, begin=begin, end=begin + span * prunings, every=span,
                              initial=initial)  # fmt: skip
    for k in range(prunings + 1):
        t = begin + k * span
        want = final + (initial - final) * (1 - (t - begin) / (prunings * span)) ** 3
        assert schedule.sparsity_at(t) == pytest.approx(want, abs=1e-12)
        last = t == schedule.end
        assert schedule.sparsity_at(t + (10**6 if last else span - 1)) == schedule.sparsity_at(t)
    assert schedule.sparsity_at(begin - 1) == 0
    assert schedule.sparsity_at(begin) == initial
    assert schedule.sparsity_at(schedule.end) == final


def test_gradual_pruning_ends_at_its_end_where_steps_do_not_divide_it() -> None:
    schedule = GradualPruning(0.8, begin=3, end=10, every=4)
    values = [schedule.sparsity_at(t) for t in range(12)]
    assert values == sorted(values)
    assert len(set(values)) == 3  # 0, once in between, and the final one
    assert (values[9] < 0.8, values[10]) == (True, 0.8)
    assert GradualPruning(0.5, begin=2, end=2).sparsity_at(2) == 0.5


@pytest.mark.parametrize("pruning", [{}, {"scope": "layer"}, {"method": "random", "seed": 1}])
def test_gradual_pruning_while_training(pruning: dict[str, Any]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    schedule = GradualPruning(0.8, begin=2, end=9, every=3, initial=0.2, **pruning)
    masked = MaskedTraining(model, schedule, optimizer)
    before = masked.masks
    for step in range(12):
        unpruned = masked.masks
        train(model, optimizer, range(step, step + 1))
        assert masked.step == step + 1
        wanted = schedule.sparsity_at(step + 1)
        assert masked.masks.sparsities == [wanted]
        counts = sum(masked.masks.removed()[0].values())
        assert abs(counts - wanted * masked.masks.total) <= 1
        assert masked.sparsity == counts / masked.masks.total
        assert (masked.masks != unpruned) == (step + 1 in (2, 5, 8, 9))
        for name, keep in masked.masks.items():
            assert not (keep & ~before[name]).any()
            weight = model.get_parameter(name)
            assert not weight[~keep].any()
            assert not optimizer.state[weight]["exp_avg"][~keep].any()
        before = masked.masks


def test_gradual_pruning_takes_the_smallest_of_the_moment() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    masked = MaskedTraining(model, GradualPruning(0.6, begin=3, end=3), optimizer)
    free = copy.deepcopy(model)
    train(free, torch.optim.SGD(free.parameters(), 0.5), range(3))
    train(model, optimizer, range(3))
    want = fastpie.prune(free, 0.6)
    assert masked.masks == want
    assert want != fastpie.prune(network(), 0.6)


def test_filters_go_gradually_and_excluded_layers_stay() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = GradualPruning(0.5, begin=0, end=4, every=2, method="filter", exclude="4")
    masked = MaskedTraining(model, schedule, optimizer)
    train(model, optimizer, range(5))
    assert list(masked.masks) == ["0.weight"]
    assert int(masked.masks["0.weight"].flatten(1).any(1).sum()) == 2
    assert model[4].weight.all()


class Halves(MaskingSchedule):
    def sparsity_at(self, step: int) -> float:
        return 1 - 0.5**step


def test_a_schedule_of_ones_own() -> None:
    model = network()
    masked = MaskedTraining(model, Halves(scope="layer"))
    for step in range(3):
        assert masked.sparsity == pytest.approx(1 - 0.5**step, abs=0.03)
        masked.after_step()


# ---------------------------------------------------------------------------- iterative


@pytest.mark.parametrize("rewind_to", [0, 3])
def test_a_round_begins_with_the_weights_and_the_optimizer_of_the_step(rewind_to: int) -> None:
    """Literally: prune the trained weights, put those of the step back, with all that goes along."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    schedule = IterativePruning(0.4, rewind_to=rewind_to)
    masked = MaskedTraining(model, schedule, optimizer, rewound=[scheduler])
    assert masked.sparsity == 0
    train(model, optimizer, range(rewind_to), [scheduler])
    early = tensors(model)
    states = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    for round_ in range(1, 4):
        train(model, optimizer, range(rewind_to, 7), [scheduler])
        assert masked.step == 7
        want = fastpie.prune(model, 1 - 0.6**round_, within=masked.masks)
        masked.next_round()
        assert masked.masks == want
        assert masked.sparsity == pytest.approx(1 - 0.6**round_, abs=0.01)
        assert (masked.round, masked.step) == (round_, rewind_to)
        for name, value in model.state_dict().items():
            expected = early[name] * want[name] if name in want else early[name]
            assert torch.equal(value, expected), name
        assert scheduler.state_dict() == states[1]
        assert optimizer.param_groups[0]["lr"] == states[0]["param_groups"][0]["lr"]
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.state_dict()["state"].keys() == states[0]["state"].keys()
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                expected = states[0]["state"][index][key]
                if names[index] in want and key != "step":
                    expected = expected * want[names[index]]
                assert torch.equal(value, expected), key


def test_rounds_are_those_of_networks_trained_from_scratch_with_the_masks() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masked = MaskedTraining(model, IterativePruning(0.5), optimizer)
    for _ in range(2):
        train(model, optimizer, range(6))
        masked.next_round()
    train(model, optimizer, range(6))
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
    MaskedTraining(alone, masked.masks, optimizer)
    train(alone, optimizer, range(6))
    assert all(torch.equal(tensors(alone)[k], v) for k, v in tensors(model).items())


def test_learning_rate_rewinding_and_fine_tuning_keep_the_weights() -> None:
    for rewind in ("learning_rate", None):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        masked = MaskedTraining(
            model,
            IterativePruning(0.3, rewind=rewind, rewind_to=2),
            optimizer,
            rewound=[scheduler] if rewind else [],
        )
        train(model, optimizer, range(5), [scheduler])
        trained = tensors(model)
        momentum = optimizer.state[model[1].weight]["momentum_buffer"].clone()
        masked.next_round()
        for name, value in model.state_dict().items():
            keep = masked.masks.get(name, torch.tensor(True))
            assert torch.equal(value, trained[name] * keep)
        assert torch.equal(optimizer.state[model[1].weight]["momentum_buffer"], momentum)
        steps = 2 if rewind else 5
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**steps)
        assert scheduler.last_epoch == masked.step == steps


def test_rounds_by_epochs() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masked = MaskedTraining(model, IterativePruning(0.2, every=2, rounds=2), optimizer)
    rounds = []
    for epoch in range(8):
        masked.begin_epoch(epoch)
        masked.begin_epoch(epoch)  # again, as after a resume: nothing happens
        rounds.append(masked.round)
        train(model, optimizer, range(2))
    assert rounds == [0, 0, 1, 1, 2, 2, 2, 2]
    assert masked.sparsity == pytest.approx(1 - 0.8**2, abs=0.01)


def test_swapped_layers_are_rewound() -> None:
    model = network()
    early = tensors(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masked = MaskedTraining(model, IterativePruning(0.8), optimizer)
    masked.swap_layers()
    for _ in range(2):
        train(model, optimizer, range(2))
        masked.next_round()
    assert torch.equal(model[4].mask, masked.masks["4.weight"])
    assert torch.equal(model[4].weight, early["4.weight"] * masked.masks["4.weight"])


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_state_goes_on_bit_for_bit(stop: int) -> None:
    """Stopped before, at and after the step to rewind to, and in a later round."""

    def begin() -> tuple[Any, ...]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        schedule = IterativePruning(0.5, rewind_to=3)
        masked = MaskedTraining(model, schedule, optimizer, rewound=[scheduler])
        return model, optimizer, scheduler, masked

    def go(parts: tuple[Any, ...], steps: range) -> None:
        model, optimizer, scheduler, masked = parts
        for step in steps:
            train(model, optimizer, range(step, step + 1), [scheduler])
            if step in (4, 8):
                masked.next_round()

    whole, first = begin(), begin()
    go(whole, range(12))
    go(first, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = begin()
    go(second, range(20, 26))
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(second, range(stop, 12))
    assert second[3].masks == whole[3].masks
    assert second[3].step == whole[3].step
    assert all(torch.equal(tensors(whole[0])[k], v) for k, v in tensors(second[0]).items())


def test_rewinding_needs_the_step_to_rewind_to() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masked = MaskedTraining(model, IterativePruning(rewind_to=4), optimizer)
    train(model, optimizer, range(4))
    with pytest.raises(FastpieError, match="more than 4"):
        masked.next_round()
    train(model, optimizer, range(1))
    masked.next_round()
    assert masked.round == 1


BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (GradualPruning, (1.0,), {"begin": 0, "end": 5}, "final"),
    (GradualPruning, (0.5,), {"begin": 0, "end": 5, "initial": 0.6}, "initial"),
    (GradualPruning, (float("nan"),), {"begin": 0, "end": 5}, "final"),
    (GradualPruning, (0.5,), {"begin": 6, "end": 5}, "end"),
    (GradualPruning, (0.5,), {"begin": -1, "end": 5}, "begin"),
    (GradualPruning, (0.5,), {"begin": 0, "end": 5.5}, "end"),
    (GradualPruning, (0.5,), {"begin": 0, "end": 5, "every": 0}, "every"),
    (GradualPruning, (0.5,), {"begin": 0, "end": 5, "method": "2:4"}, "2:4"),
    (GradualPruning, (0.5,), {"begin": 0, "end": 5, "within": None}, "within"),
    (IterativePruning, (0.0,), {}, "fraction"),
    (IterativePruning, (1.0,), {}, "fraction"),
    (IterativePruning, (), {"rewind": "bias"}, "rewind"),
    (IterativePruning, (), {"rewind_to": -1}, "rewind_to"),
    (IterativePruning, (), {"every": 0}, "every"),
    (IterativePruning, (), {"rounds": 1.5}, "rounds"),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "text"), BAD)
def test_bad_arguments_are_refused(
    kind: Any, arguments: tuple[Any, ...], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(FastpieError, match=text):
        kind(*arguments, **options)
