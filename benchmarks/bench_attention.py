"""What attention costs a training: one re-mining against the epochs from one to the next.

`python -m benchmarks.bench_attention`: MONAI's ResNet-18 on random 64x64 images in memory, batches of 32, AdamW,
channels last, as it is written in plain PyTorch (eager); then the same with `Attention.step` after every fifth epoch.
Epochs and minings take turns; the time of five epochs is five times that of one. `share` is the time of the mining over
that of the five epochs; `copy`, `recalibrate`, `refresh` and `sweep` are parts of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import interleave, merge_results
from fastpie.dual import DualModel
from fastpie.mining.follower import Follower
from fastpie.training.attention.attention import Attention

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "guard of the dense model": {"guard": "margin"},
    "probe": {"guard": "probe"},
    "ladder": {"sparsity": [0.1, 0.3, 0.5, 0.7]},
    "bf16": {"precision": "bf16"},
    "reference": {"backend": "reference"},
}


class Images(Dataset[Any]):
    """In memory, as a data set that is decoded in time is; what reading costs is another matter."""

    def __init__(self, samples: int, side: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(samples, 3, side, side, generator=generator)
        self.labels = torch.randint(classes, (samples,), generator=generator)
        self.sample_ids = [f"{i:08d}" for i in range(samples)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        return self.images[index], self.labels[index], self.sample_ids[index]


class Training:
    """Plain PyTorch, with a weight for every sample as attention needs it."""

    def __init__(self, data: Images, classes: int, batch: int) -> None:
        from monai.networks.nets import resnet18

        torch.manual_seed(0)
        model = resnet18(spatial_dims=2, n_input_channels=3, num_classes=classes)
        self.model = model.to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.loader = DataLoader(data, batch, shuffle=True, drop_last=True)

    def epoch(self, weights: Callable[[Any], Tensor]) -> None:
        for images, labels, ids in self.loader:
            self.optimizer.zero_grad(set_to_none=True)
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
            losses = functional.cross_entropy(logits, labels, reduction="none")
            (losses * weights(ids)).mean().backward()
            self.optimizer.step()


class Clock:
    """Seconds in the parts of a mining, by wrapping what they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"follow": [], "recalibrate": [], "refresh": []}
        for owner, method, name in (
            (Follower, "follow", "follow"),
            (DualModel, "recalibrate", "recalibrate"),
            (Follower, "refresh", "refresh"),
        ):
            self._wrap(owner, method, self.seconds[name])

    def _wrap(self, owner: type, method: str, into: list[float]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                into.append(time.perf_counter() - start)

        setattr(owner, method, timed)

    def medians(self) -> dict[str, float]:
        """Without the first mining, which compiles, and the one that warms up; then none."""
        found = {name: float(np.median(values[2:])) for name, values in self.seconds.items()}
        for values in self.seconds.values():
            values.clear()
        found["copy"] = found.pop("follow") - found["recalibrate"]
        return found


def measured(
    name: str, training: Training, data: Images, options: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """One row: the share of the training time."""
    attention = Attention(
        training.model, data, warmup=1, every=1, batch_size=options.mining_batch, **VARIANTS[name]
    )
    start = time.perf_counter()
    attention.step(0)
    first = time.perf_counter() - start
    epoch = 0

    def mine() -> None:
        nonlocal epoch
        epoch += 1
        assert attention.step(epoch)

    timings = interleave(
        {"epoch": lambda: training.epoch(attention.weights), "mining": mine},
        repeats=options.repeats,
        seconds=options.seconds,
        warm_up=1,
    )
    parts = clock.medians()
    mining, five = timings["mining"]["p50"], options.every * timings["epoch"]["p50"]
    return {
        "network": "monai resnet18",
        "size": [3, options.side, options.side],
        "samples": options.samples,
        "batch": options.batch,
        "mining_batch": options.mining_batch,
        "threads": torch.get_num_threads(),
        "provider": f"Attention, {name}",
        "seconds": timings["mining"],
        "parts": {**parts, "sweep": mining - sum(parts.values()), "first_step": first},
        "baseline": f"{options.every} epochs of plain training",
        "baseline_seconds": {key: options.every * timings["epoch"][key] for key in ("p20", "p50", "p80")},
        "ratio": round(five / mining, 2),
        "share": round(mining / five, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mining-batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1800.0, help="Stop a variant after that.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--no-results", action="store_true", help="Write no results file.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Images(options.samples, options.side, options.classes)
    training = Training(data, options.classes, options.batch)
    clock = Clock()
    rows = []
    for name in options.variants:
        rows.append(measured(name, training, data, options, clock))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if not options.no_results:
        same = ("network", "size", "samples", "batch", "mining_batch", "threads", "provider")
        print(
            merge_results(
                "attention", rows, lambda row: [row[key] for key in same], packages=("monai",)
            )
        )


if __name__ == "__main__":
    main()
