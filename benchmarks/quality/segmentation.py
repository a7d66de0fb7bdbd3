"""Does the disagreement of a dense and a pruned segmentation say where the dense one is wrong?

A U-Net finds the lesions of the generated skin set. Every score is label-free and of unseen images, so
that it can be held against the true error, 1 - IoU with the mask that was painted. Run:
`python -m benchmarks.quality.segmentation`, two minutes on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from benchmarks import harness
from benchmarks.quality.data import KINDS, make
from benchmarks.quality.metrics import auroc, interval
from benchmarks.quality.networks import UNet
from benchmarks.quality.training import BATCH, forward
from benchmarks.quality.trials import (
    CALIBRATION,
    COMMITTEE,
    LADDER,
    Trial,
    noisy_copy,
    pruned_copies,
)  # fmt: skip

__all__ = ["main", "rows"]

EPOCHS = 10
LEARNING_RATE = 0.003
SET = "skin lesion"
LEVELS = (0.3, 0.5, 0.7, 0.9)


def main(seeds: Sequence[int] = range(5), size: int | None = None) -> None:
    """Write `benchmarks/results/quality-segmentation-<machine>.json`."""
    torch.set_num_threads(1)
    packages = ("numpy", "scipy", "scikit-learn")
    print(harness.write_results("quality-segmentation", rows(seeds, size), packages=packages))


def rows(seeds: Sequence[int], size: int | None = None) -> list[dict[str, Any]]:
    """One row a score: its rank correlation with the true error, and its AUROC for the rare kind."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        trial = _run(seed, size)
        rare = trial["kind"] == KINDS.index("rare kind")
        for name, score in _scores(trial).items():
            rank = float(spearmanr(score, trial["error"]).statistic)
            found.setdefault(name, []).append((rank, auroc(score, rare)))
    return [
        {
            "data": SET, "network": "unet", "score": name, "needs": "checkpoint",
            "family": "fastpie" if name.startswith("pruned") else "control",
            "spearman_with_error": interval([rank for rank, _ in pairs]),
            "auroc_rare_kind": interval([area for _, area in pairs]),
        }
        for name, pairs in found.items()
    ]  # fmt: skip


def _run(seed: int, size: int | None) -> dict[str, np.ndarray]:
    """Train on one set and look at another one of the same seed's world, rare rings among both."""
    seen, unseen = make(SET, seed, size), make(SET, 1000 + seed, size)
    images, calibration = torch.from_numpy(seen.images), torch.from_numpy(seen.images[:CALIBRATION])
    truth = torch.from_numpy(seen.masks).float()[:, None]
    torch.manual_seed(seed)
    model = UNet(3).to(memory_format=torch.channels_last)
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * steps
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).tensor_split(steps):
            x = images[batch].contiguous(memory_format=torch.channels_last)
            loss = functional.binary_cross_entropy_with_logits(model(x), truth[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    new = torch.from_numpy(unseen.images)

    def probabilities(net: nn.Module) -> np.ndarray:  # fp16 [N, H, W]
        return forward(net, new)[:, 0].sigmoid().numpy().astype(np.float16)

    return {
        "kind": unseen.kind,
        "error": 1 - _iou(probabilities(model) > 0.5, unseen.masks),
        "dense": probabilities(model),
        "pruned": np.stack([probabilities(m) for m in pruned_copies(model, LEVELS, calibration)]),
        "raw": np.stack([probabilities(m) for m in pruned_copies(model, LEVELS, None)]),
        "random": np.stack(
            [probabilities(m) for m in pruned_copies(model, LADDER, calibration, method="random", seed=seed)]
        ),
        "noise": np.stack(
            [probabilities(noisy_copy(model, seed=k, calibration=calibration)) for k in range(COMMITTEE)]
        ),
    }  # fmt: skip


def _scores(trial: Trial) -> dict[str, np.ndarray]:
    dense = trial["dense"].astype(np.float32)
    levels = {level: trial["pruned"][i].astype(np.float32) for i, level in enumerate(LEVELS)}
    scores = {
        f"pruned, 1 - soft IoU at {level}": 1 - _soft(dense, p) for level, p in levels.items()
    }
    scores["pruned, 1 - IoU at 0.5"] = 1 - _iou(dense > 0.5, levels[0.5] > 0.5)
    scores["pruned, 1 - soft IoU, ladder 0.3 to 0.7"] = np.mean(
        [1 - _soft(dense, levels[level]) for level in (0.3, 0.5, 0.7)], axis=0
    )
    for i, level in enumerate(LEVELS):
        raw = trial["raw"][i].astype(np.float32)
        scores[f"pruned, 1 - soft IoU at {level}, not recalibrated"] = 1 - _soft(dense, raw)
    for name, members in (("random masks, ladder", "random"), ("weight noise", "noise")):
        copies = trial[members].astype(np.float32)
        scores[f"{name}, 1 - soft IoU"] = np.mean([1 - _soft(dense, c) for c in copies], axis=0)
    p = np.clip(dense, 1e-6, 1 - 1e-6)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum((1, 2))
    scores["entropy by area"] = entropy / (1 + p.sum((1, 2)))
    return scores


def _iou(
    a: np.ndarray, b: np.ndarray
) -> np.ndarray:  # bool [N, H, W] -> [N]; 1 where both are empty
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    ratio: np.ndarray = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return ratio


def _soft(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # [N, H, W] in [0, 1] -> [N]
    ratio: np.ndarray = np.minimum(a, b).sum((1, 2)) / np.maximum(a, b).sum((1, 2))
    return ratio


if __name__ == "__main__":
    main()
