"""The least time that each layer of a network can take on an H200, both models: a Markdown table.

Counted, not measured: activations are read and written once, weights once for both models, products
are those of dense layers (which is what the kernels compute); residuals are left out. The rates are
those measured on such a card (KERNELS.md).

    python -m benchmarks.gpu_roofline --network resnet50 --batch 256
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

from benchmarks import networks
from benchmarks.bench_dual_gpu import BYTES_PER_SECOND, FLOPS_PER_SECOND

__all__ = ["Floor", "floors", "main"]

_ITEM = 2  # bytes of bf16


class Floor:
    """One layer of both models.

    Attributes:
        layer: as `networks.layers_of` gives it.
        bytes: moved, of both models.
        flops: of both models, two for a multiply-add.
    """

    def __init__(self, layer: networks.Layer, batch: int) -> None:
        """Count for a batch."""
        self.layer = layer
        taps = layer.weight[2:]
        pixels = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                layer.input[1:],
                taps,
                layer.stride or (),
                layer.padding or (),
                layer.dilation or (),
                strict=True,
            )
        ]
        outputs = batch * layer.weight[0] * math.prod(pixels)
        activations = 2 * (batch * math.prod(layer.input) + outputs)
        self.bytes = _ITEM * (activations + math.prod(layer.weight))
        self.flops = 2 * 2 * outputs * math.prod(layer.weight[1:])

    @property
    def seconds_of_bytes(self) -> float:
        """What the memory needs."""
        return self.bytes / BYTES_PER_SECOND

    @property
    def seconds_of_products(self) -> float:
        """What the tensor cores need."""
        return self.flops / FLOPS_PER_SECOND["bf16"]

    @property
    def seconds(self) -> float:
        """The larger of both."""
        return max(self.seconds_of_bytes, self.seconds_of_products)


def floors(network: str, batch: int) -> Iterator[Floor]:
    """Every distinct layer of a network."""
    for layer in networks.layers_of(network):
        yield Floor(layer, batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; the last row is the whole network, image by image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet50", choices=list(networks.NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    print("| layer | times | MB | GFLOP | us for the bytes | us for the products | binds |")
    print("|---|---|---|---|---|---|---|")
    total = 0.0
    for floor in floors(options.network, options.batch):
        of_bytes, of_products = floor.seconds_of_bytes, floor.seconds_of_products
        total += floor.seconds * floor.layer.count
        binds = "bytes" if of_bytes > of_products else "products"
        print(
            f"| {floor.layer} | {floor.layer.count} | {floor.bytes / 1e6:.1f} "
            f"| {floor.flops / 1e9:.1f} | {of_bytes * 1e6:.0f} | {of_products * 1e6:.0f} | {binds} |"
        )
    each = total / options.batch
    print(
        f"\nAll layers of both models at batch {options.batch}: {total * 1e3:.2f} ms, "
        f"{each * 1e6:.1f} us an image, {1 / each:,.0f} images a second."
    )


if __name__ == "__main__":
    main()
