"""A step of self-damaging contrastive learning: ours, and the published one, on one backbone.

`python -m benchmarks.bench_sdclr`: ResNet-18 with the stem for small images, as published for CIFAR,
channels last, SGD with momentum; the same weights, masks and views for all. Choosing the masks, once an
epoch, is not part of a step.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import interleave, row, write_results
from benchmarks.published_sdclr import published_network, published_step
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.objectives.sdclr import SDCLR

TEMPERATURE = 0.2
PUBLISHED = "published step, eager"
COMPILED = "published step, torch.compile"


def backbone() -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no pooling behind it; seeded weights."""
    from monai.networks.nets import resnet18

    torch.manual_seed(7)
    network: nn.Module = resnet18(
        spatial_dims=2, n_input_channels=3, num_classes=10, conv1_t_size=3, conv1_t_stride=1,
        no_max_pool=True, bias_downsample=False,
    )  # fmt: skip
    return network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    # A rate of zero: the weights stay, and with them the work (sparsity, denormals), through all repeats.
    return torch.optim.SGD(module.parameters(), 0.0, momentum=0.9, weight_decay=1e-4)


def our_step(sdclr: SDCLR, views: Sequence[Tensor], compiled: bool = False) -> Callable[[], Any]:
    """One forward and one backward pass of both branches."""
    batch = TrainBatch(tuple(views), None, [""] * len(views[0]))
    forward: Any = torch.compile(sdclr) if compiled else sdclr
    optimizer = _optimizer(sdclr)

    def step() -> None:
        optimizer.zero_grad()
        forward(batch).mean().backward()
        optimizer.step()

    return step


def their_step(
    network: nn.Module, views: Sequence[Tensor], compiled: bool = False
) -> Callable[[], Any]:
    """Three forward and two backward passes."""
    optimizer = _optimizer(network)
    forward: Any = torch.compile(network) if compiled else None
    return lambda: published_step(network, *views, TEMPERATURE, optimizer, forward)


def measured(
    size: int, batch: int, sparsity: float, scope: str, compiled: bool, repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows of one case."""
    sdclr = SDCLR(backbone(), sparsity=sparsity, scope=scope, temperature=TEMPERATURE)
    views = [
        torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    network = published_network(sdclr.model, sdclr.projection, sdclr.masks)
    dense = copy.deepcopy(sdclr)
    dense.dual.sparse_kernels = False
    steps = {
        PUBLISHED: their_step(network, views),
        "fastpie SDCLR": our_step(sdclr, views),
        "fastpie SDCLR without sparse kernels": our_step(dense, views),
    }
    if compiled:
        steps[COMPILED] = their_step(copy.deepcopy(network), views, True)
        steps["fastpie SDCLR, torch.compile"] = our_step(copy.deepcopy(dense), views, True)
    timings = interleave(steps, repeats=repeats, seconds=seconds, warm_up=1)
    case = {
        "network": "resnet18, small stem", "batch": batch, "size": [3, size, size],
        "precision": "fp32", "sparsity": sparsity, "scope": scope,
    }  # fmt: skip
    rows = []
    for provider in steps:
        if provider.startswith("fastpie"):
            baseline = COMPILED if provider.endswith("torch.compile") else PUBLISHED
            of_time = timings[provider]["p50"] / timings[baseline]["p50"]
            rows.append({**row(case, timings, provider, baseline), "of_time": round(of_time, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.3])
    parser.add_argument("--scope", nargs="+", default=["global", "layer"])
    parser.add_argument("--compile", action="store_true", help="torch.compile of both as well.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=300.0, help="Of a case, at most.")
    options = parser.parse_args()
    rows = []
    for sparsity in options.sparsity:
        for scope in options.scope:
            found = measured(
                options.size, options.batch, sparsity, scope, options.compile, options.repeats,
                options.seconds,
            )  # fmt: skip
            print(json.dumps(found, indent=1), flush=True)
            rows += found
    print(write_results("sdclr", rows, packages=("monai",)))


if __name__ == "__main__":
    main()
