"""Columns that the packing for sparse tensor cores adds: counted, not timed, the same on any machine.

    python -m benchmarks.sparse24_growth

For each layer of ResNet-50 that has channels enough for a step of 32, with trained-like masks over
each layer and over all weights, and tiles of 64 and 128 filters. A layer's time on sparse tensor cores
is at best growth / 2 of its dense time, so below 2 there is something to gain. `mean` weighs the
layers by their multiply-adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import fastpie
from benchmarks import harness, networks
from fastpie.ops.sparse24 import pack_sparse24

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
KEPT = ("kept", "groups", "overfull", "spilled", "extra_columns", "growth", "growth_unpadded")


def reports(
    network: str, weights: dict[str, torch.Tensor], ladder: fastpie.Masks, tile: int
) -> Iterator[dict[str, Any]]:
    """One row a layer: lists over the sparsities."""
    for name in ladder:
        weight = weights[name].detach().bfloat16().movedim(1, -1)
        if weight.shape[-1] % 32:
            continue
        found = [
            pack_sparse24(weight, ladder.at(s)[name].movedim(1, -1), tile).report()
            for s in SPARSITIES
        ]
        yield {
            "network": network,
            "layer": name,
            "filters": weight.shape[0],
            "columns": weight[0].numel(),
            **{key: [round(report[key], 4) for report in found] for key in KEPT},
        }


def mean_growth(rows: list[dict[str, Any]], multiply_adds: dict[str, int]) -> list[float]:
    """Growth over the layers, weighted by their multiply-adds, at each sparsity."""
    work = torch.tensor([float(multiply_adds[r["layer"].removesuffix(".weight")]) for r in rows])
    growth = torch.tensor([r["growth"] for r in rows])
    return [round(float(value), 4) for value in work @ growth / work.sum()]


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet50", choices=sorted(networks.NETWORKS))
    parser.add_argument("--kind", default="trained-like", help="of mask: see networks.masks_for")
    options = parser.parse_args()
    multiply_adds = networks.multiply_adds_by_layer(options.network)
    model, _ = networks.build(options.network)
    weights = dict(model.named_parameters())
    rows: list[dict[str, Any]] = []
    for scope in ("layer", "global"):
        ladder = networks.masks_for(model, list(SPARSITIES), scope=scope, kind=options.kind)
        for tile in (64, 128):
            case = {"scope": scope, "kind": options.kind, "tile_rows": tile}
            layers = list(reports(options.network, weights, ladder, tile))
            mean = mean_growth(layers, multiply_adds)
            print(
                f"\n{options.network}, {options.kind} masks, scope {scope}, tiles of {tile} filters"
            )
            print(f"{'growth at sparsity':34}" + "".join(f"{s:>8}" for s in SPARSITIES))
            for row in layers:
                size = f"{row['layer'].removesuffix('.weight')} {row['filters']}x{row['columns']}"
                print(f"{size:34}" + "".join(f"{g:8.3f}" for g in row["growth"]))
            print(f"{'mean':34}" + "".join(f"{g:8.3f}" for g in mean), flush=True)
            layers.append({"network": options.network, "layer": "mean", "growth": mean})
            rows += [{**case, "sparsity": list(SPARSITIES), **row} for row in layers]
    print(harness.write_results("sparse24-growth", rows))


if __name__ == "__main__":
    main()
