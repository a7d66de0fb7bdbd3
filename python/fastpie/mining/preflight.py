"""A look at a few labelled samples before a long run: does the model do what it was trained for?"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpie.dual import DualModel
from fastpie.dual.calibration import statistics_of
from fastpie.mining.reading import Reader, Sample

__all__ = ["mean_auroc", "preflight"]


def preflight(
    dual: DualModel,
    data: Dataset[Any] | DataLoader[Any],
    *,
    task: str,
    samples: int = 512,
    recalibrate: bool = True,
) -> dict[str, Any] | None:
    """Accuracy (mean AUROC for multilabel) of the dense and pruned models on a few samples.

    The samples are spread evenly over the data set. A value near chance means wrong preprocessing,
    labels in another order than the model's outputs, or a mask that has destroyed the network.

    Args:
        dual: the dual model; it is not changed.
        data: as for `mine`.
        task: "multiclass" or "multilabel"; others give None.
        samples: how many to look at.
        recalibrate: as for `mine`, on the same few samples.

    Returns:
        `metric`, `samples`, `values` (by model), `chance`, `near_chance` (the models below 1.5
        times chance, for AUROC and two classes below .55), or None where there are no labels.
    """
    if task not in ("multiclass", "multilabel"):
        return None
    reader = Reader(data)
    count = len(reader.dataset)
    indices = np.unique(np.linspace(0, count - 1, min(count, samples)).astype(int))
    found = [s for s in (reader.read_one(int(i)) for i in indices) if isinstance(s, Sample)]
    found = [s for s in found if s.label is not None and isinstance(s.image, Tensor)]
    if not found or len({s.image.shape for s in found}) != 1:
        return None
    device = next(dual.parameters()).device
    images = torch.stack([s.image for s in found]).to(device)
    labels = torch.stack([torch.as_tensor(s.label) for s in found])
    batches = images.split(64)
    private = copy.deepcopy(dual).eval().requires_grad_(False)
    if recalibrate and statistics_of(private.model):
        private.recalibrate(batches)
    with torch.no_grad():
        outputs = [private(x) for x in batches]
    if not isinstance(outputs[0].dense, Tensor) or outputs[0].dense.ndim != 2:
        return None
    dense = torch.cat([o.dense for o in outputs]).cpu()
    level_dim = 1 if dual.is_ladder else 0
    pruned = torch.cat([o.pruned for o in outputs], level_dim).cpu()
    pruned = pruned if dual.is_ladder else pruned.unsqueeze(0)
    classes = dense.shape[1]
    if task == "multilabel":
        metric, chance, bar = mean_auroc, 0.5, 0.55
    else:
        metric, chance = _balanced_accuracy, 1 / classes
        bar = 1.5 * chance if classes > 2 else 0.55
    values = {"dense": metric(dense, labels)}
    for sparsity, logits in zip(dual.sparsities, pruned, strict=True):
        values[f"pruned at {sparsity:g}"] = metric(logits, labels)
    return {
        "metric": "mean AUROC" if task == "multilabel" else "balanced accuracy",
        "samples": len(found),
        "values": {name: round(value, 4) for name, value in values.items()},
        "chance": round(chance, 4),
        "near_chance": [name for name, value in values.items() if not value >= bar],
    }


def _balanced_accuracy(logits: Tensor, labels: Tensor) -> float:  # [N, C], [N] or [N, 1]
    """Mean recall over the classes that occur."""
    labels = labels.reshape(-1)
    right = logits.argmax(1) == labels
    recalls = [right[labels == c].double().mean() for c in labels.unique()]
    return float(torch.stack(recalls).mean())


def mean_auroc(logits: Tensor, labels: Tensor) -> float:  # [N, C], [N, C] of 1, 0, NaN
    """Area under the ROC curve (Mann-Whitney), mean over the classes with both outcomes."""
    areas = []
    for score, label in zip(logits.T.numpy(), labels.T.numpy(), strict=True):
        positive, negative = score[label == 1], score[label == 0]
        if len(positive) and len(negative):
            negative = np.sort(negative)
            below = np.searchsorted(negative, positive, "left")
            not_above = np.searchsorted(negative, positive, "right")
            areas.append((below + not_above).mean() / (2 * len(negative)))
    return float(np.mean(areas)) if areas else float("nan")
