"""The consistency of hard samples: the distance, its gradient, and the objective."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fastpie
from fastpie import FastpieError
from fastpie.training.objectives.consistency import Consistency, consistency
from fastpie.training.objectives.objective import TrainBatch
from recording import Small
from training_runs import start

CASES = [
    ("multiclass", "kl"),
    ("multiclass", "js"),
    ("multiclass", "mse"),
    ("multilabel", "kl"),
    ("multilabel", "js"),
    ("multilabel", "mse"),
    ("segmentation", "mse"),
]


def expected(dense: Tensor, pruned: Tensor, task: str, distance: str) -> Tensor:
    """The formulas, one sample at a time."""
    losses = []
    for z, y in zip(dense, pruned.detach(), strict=True):
        if task == "segmentation":
            one = len(z) == 1
            p, q = (z.sigmoid(), y.sigmoid()) if one else (z.softmax(0), y.softmax(0))
            losses.append(((p - q) ** 2).mean())
        elif distance == "mse":
            losses.append(((z - y) ** 2).mean())
        else:
            p, q = z.softmax(0)[None], y.softmax(0)[None]  # [1, C]
            if task == "multilabel":
                p, q = (torch.stack([x.sigmoid(), 1 - x.sigmoid()], 1) for x in (z, y))  # [C, 2]
            m = (p + q) / 2
            kl = (q * (q / p).log()).sum(1).mean()
            js = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
            losses.append(kl if distance == "kl" else js)
    return torch.stack(losses)


def outputs(task: str, channels: int = 3) -> tuple[Tensor, Tensor]:
    shape = (5, channels, 4, 3) if task == "segmentation" else (5, channels)
    return torch.randn(2, *shape, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize(("task", "distance"), CASES)
def test_distances_are_their_formulas_and_have_their_gradients(task: str, distance: str) -> None:
    for channels in (1, 3) if task == "segmentation" else (3,):
        dense, pruned = outputs(task, channels)
        dense.requires_grad_()
        pruned.requires_grad_()
        found = consistency(dense, pruned, distance=distance, task=task)
        torch.testing.assert_close(found, expected(dense, pruned, task, distance))
        assert torch.autograd.gradcheck(
            lambda z, y=pruned: consistency(z, y, distance=distance, task=task), (dense,)
        )
        found.sum().backward()
        assert pruned.grad is None
        low = consistency(
            dense.detach().bfloat16(), pruned.bfloat16(), distance=distance, task=task
        )
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), found.detach(), rtol=0.1, atol=0.02)
        assert consistency(dense[:0], pruned[:0], distance=distance, task=task).shape == (0,)


@pytest.mark.parametrize("sparsity", [0.5, [0.3, 0.7]])
@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_objective_is_the_criterion_and_the_distance_of_hard_samples(
    sparsity: Any, distance: str
) -> None:
    """Against a copy of the model, pruned by hand; dropout and batch statistics as in training."""

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")

    model = Small().train()
    twin = copy.deepcopy(model)
    objective = Consistency(model, criterion, sparsity=sparsity, strength=2.5, distance=distance)
    x, y, hard = torch.randn(12, 1, 8, 8), torch.randint(3, (12,)), torch.arange(12) % 3 == 0
    batch = TrainBatch(x, y, [str(i) for i in range(12)], hard)
    state = torch.get_rng_state()
    losses = objective(batch)
    losses.sum().backward()
    after = torch.rand(1)

    torch.set_rng_state(state)
    dense = twin(x)
    plain_after = torch.rand(1)
    assert torch.equal(after, plain_after)  # random numbers go on as without the pruned model
    masks = fastpie.prune(twin, sparsity)
    d: Any = 0
    levels = masks.sparsities
    for level in levels:
        of_level = masks.at(level)
        weights = {
            name: p.detach() * of_level[name] if name in of_level else p.detach()
            for name, p in twin.named_parameters()
        }
        torch.set_rng_state(state)
        buffers = {name: b.clone() for name, b in twin.named_buffers()}
        pruned = functional_call(twin, {**weights, **buffers}, (x,))
        d = d + expected(dense, pruned, "multiclass", distance) / len(levels)
    total = criterion(dense, y) + 2.5 * hard * d
    torch.testing.assert_close(losses, total, rtol=1e-4, atol=1e-5)
    total.sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)
    for name, buffer in model.named_buffers():  # the dense model's own, once
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_without_hard_samples_it_is_the_criterion() -> None:
    objective = Consistency(
        Small(), lambda z, y: functional.cross_entropy(z, y, reduction="none"), sparsity=0.5
    ).eval()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for hard in (None, torch.zeros(4, dtype=torch.bool)):
        losses = objective(TrainBatch(x, y, ["a"] * 4, hard))
        plain = functional.cross_entropy(objective.model(x), y, reduction="none")
        assert torch.equal(losses, plain)


class Synchronised(nn.SyncBatchNorm):
    """Waits for the other processes, as SyncBatchNorm does on a GPU, but on the CPU as well."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            dist.all_reduce(torch.ones(1))
        return functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


def of_rank(rank: int, folder: Path) -> None:
    """A process that has a hard sample in its second batch if it is the first one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(4, 8), Synchronised(8), nn.Linear(8, 3))
    objective = Consistency(
        net, lambda z, y: functional.cross_entropy(z, y, reduction="none"), strength=3.0
    )
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    plain = functional.cross_entropy(net(x), y, reduction="none")
    for number in range(3):
        hard = torch.tensor([False, number == 1 and rank == 0, False, False, False])
        losses = objective(TrainBatch(x, y, ["a"] * 5, hard))
        losses.sum().backward()
        assert torch.equal(losses > plain, hard)
        assert torch.equal(losses[~hard], plain[~hard])
    dist.destroy_process_group()


def test_processes_that_share_statistics_run_the_pruned_model_together(tmp_path: Path) -> None:
    started = [start(of_rank, rank, tmp_path) for rank in range(2)]
    for process in started:
        process.join(60)
        assert process.exitcode == 0


def test_masks_are_those_of_the_weights_of_the_epoch() -> None:
    model = Small()
    rule = {"scope": "layer", "exclude": ["fc"]}
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5, **rule))
    objective = Consistency(dual, lambda z, y: z.sum(1))
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randn_like(model.conv1.weight))
    fresh = fastpie.prune(model, 0.5, **rule)
    assert not torch.equal(objective.dual.masks["conv1.weight"], fresh["conv1.weight"])
    objective.begin_epoch(1)
    assert set(objective.dual.masks) == {"conv1.weight", "conv2.weight"}
    for name in fresh:
        assert torch.equal(objective.dual.masks[name], fresh[name])
    again = Consistency(Small(), lambda z, y: z.sum(1))
    assert objective.model is model
    trained = {id(p) for p in objective.parameters()}
    assert trained == {id(p) for p in model.parameters()}
    again = Consistency(
        fastpie.DualModel(again.model, fastpie.prune(again.model, 0.5, **rule)), lambda z, y: z
    )
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.dual.masks["conv1.weight"], fresh["conv1.weight"])


def test_what_there_is_not_is_refused() -> None:
    z = torch.randn(2, 3)
    with pytest.raises(FastpieError, match="`task` to be one of"):
        consistency(z, z, task="boxes")
    with pytest.raises(FastpieError, match=r"`distance` to be one of \('mse',\)"):
        Consistency(Small(), lambda z, y: z, task="segmentation", distance="kl")
    with pytest.raises(FastpieError, match="of one shape"):
        consistency(z, z[:1])
    with pytest.raises(FastpieError, match="`strength` of at least 0"):
        Consistency(Small(), lambda z, y: z, strength=-1)
