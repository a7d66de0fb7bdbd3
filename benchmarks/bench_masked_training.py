"""Training steps with masks in force: zeros in plain layers against layers with sparse gradients.

`python -m benchmarks.bench_masked_training`: forward, backward (to the input as well, as inside of a
network) and a step of SGD with momentum, of single layers and of whole networks, as

- `plain`: no masks;
- `zeros`: `MaskedTraining`, layers as they are;
- `masked layers`: `MaskedTraining` and `swap_layers()`.

`ratio` is the time of `zeros` over that of the provider: above 1, swapping pays. Run it alone on the
machine.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastpie
from benchmarks import harness, networks
from fastpie.training.masking.masked import MaskedTraining

LAYERS = [  # in and out channels, kernel, pixels a side, batch: layers of a ResNet
    (64, 64, 3, 28, 8),
    (128, 128, 3, 28, 8),
    (256, 256, 3, 14, 8),
    (512, 512, 3, 7, 8),
    (256, 64, 1, 28, 8),
    (256, 1024, 1, 14, 8),
]
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
# Of the input's gradient, relative L2. Swapping gives .001 to .004 on ResNet-50 in training mode, whose
# ReLUs and BatchNorm make .003 to .005 of an input changed by 1e-7; of a layer 1e-6.
TOLERANCE = 0.02


def steps(
    model: nn.Module, inputs: Tensor, sparsity: float, scope: str
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """A training step of each provider, and the layers that were swapped."""
    masks = fastpie.prune(model, sparsity, scope=scope)
    providers: dict[str, Callable[[], object]] = {}
    gradients, swapped = {}, []
    for name in ("plain", "zeros", "masked layers"):
        own = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(own.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
        if name != "plain":
            masked = MaskedTraining(own, masks, optimizer)
            if name == "masked layers":
                swapped = masked.swap_layers()

        def step(
            own: nn.Module = own, optimizer: torch.optim.Optimizer = optimizer, x: Tensor = inputs
        ) -> Tensor:
            optimizer.zero_grad()
            own(x).square().mean().backward()
            optimizer.step()
            gradient = x.grad
            x.grad = None
            assert gradient is not None
            return gradient

        gradients[name] = step()
        providers[name] = step
    difference = (gradients["zeros"] - gradients["masked layers"]).norm()
    assert difference <= TOLERANCE * gradients["zeros"].norm(), float(difference)
    return providers, swapped


def measured(
    case: dict[str, Any], model: nn.Module, inputs: Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one layer or network at every sparsity."""
    rows = []
    for sparsity in options.sparsities:
        providers, swapped = steps(model, inputs, sparsity, case.get("scope", "layer"))
        timings = harness.interleave(providers, repeats=options.repeats, seconds=options.seconds)
        at = {**case, "precision": "fp32", "sparsity": sparsity, "swapped": len(swapped)}
        for provider in ("plain", "masked layers"):
            rows.append(harness.row(at, timings, provider, "zeros"))
        print(
            *case.values(),
            sparsity,
            *(f"{name} {t['p50'] * 1e3:.2f} ms" for name, t in timings.items()),
            f"zeros / masked layers {rows[-1]['ratio']}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument(
        "--networks", nargs="*", default=["resnet50"], help="Of benchmarks.networks."
    )
    parser.add_argument("--batch", type=int, default=8, help="Of networks.")
    parser.add_argument("--size", type=int, default=224, help="Of networks.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="At most, of a case, about.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-write", action="store_true", help="Print alone.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for channels, filters, kernel, side, batch in LAYERS:
        layer = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False)
        x = torch.randn(batch, channels, side, side, requires_grad=True)
        name = f"conv {channels}-{filters} {kernel}x{kernel}"
        case = {"network": name, "batch": batch, "size": [channels, side, side]}
        rows += measured(case, layer, x, options)
    for name in options.networks:
        model, (channels, *_) = networks.build(name)
        x = torch.randn(options.batch, channels, options.size, options.size, requires_grad=True)
        case = {"network": name, "batch": options.batch, "size": list(x.shape[1:])}
        rows += measured({**case, "scope": "global"}, model, x, options)
    if not options.no_write:
        print(harness.write_results("masked-training", rows))


if __name__ == "__main__":
    main()
