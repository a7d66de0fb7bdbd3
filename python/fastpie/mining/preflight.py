"""A look at a few labelled samples before a long run: does the model do what it was trained for?"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpie.dual import DualModel
from fastpie.dual.calibration import statistics_of
from fastpie.errors import FastpieError
from fastpie.mining.reading import Kind, Reader, Sample, label_kind

__all__ = ["mean_auroc", "preflight"]

_MOST_BYTES = 2**28  # of images, read at most


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
    found = _read(Reader(data), samples)
    if not found:
        return None
    device = next(dual.parameters()).device
    labels = torch.stack([torch.as_tensor(sample.label) for sample in found])
    batches = [
        torch.stack([torch.as_tensor(sample.image) for sample in found[i : i + 64]]).to(device)
        for i in range(0, len(found), 64)
    ]
    private = copy.deepcopy(dual).eval().requires_grad_(False)
    try:
        if recalibrate and statistics_of(private.model):
            private.recalibrate(batches)
        with torch.no_grad():
            outputs = [private(batch) for batch in batches]
    except FastpieError:
        raise
    except Exception as error:
        raise FastpieError(
            f"Expected the model to take images of shape {list(batches[0].shape[1:])}, but it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(outputs[0].dense, Tensor) or outputs[0].dense.ndim != 2:
        return None
    dense = torch.cat([o.dense for o in outputs]).cpu()
    pruned = torch.cat([o.pruned for o in outputs], 1 if dual.is_ladder else 0).cpu()
    pruned = pruned if dual.is_ladder else pruned.unsqueeze(0)
    classes = dense.shape[1]
    if task == "multilabel":
        metric, chance, bar = mean_auroc, 0.5, 0.55
        if labels.shape != dense.shape:
            return None  # mine() says what is wrong with them
    else:
        metric, chance = _balanced_accuracy, 1 / classes
        bar = 1.5 * chance if classes > 2 else 0.55
    values = {"dense": metric(dense, labels)}
    for sparsity, logits in zip(dual.sparsities, pruned, strict=True):
        values[f"pruned at {sparsity:.12g}"] = metric(logits, labels)
    if all(math.isnan(value) for value in values.values()):
        return None  # no label among them that can be right
    return {
        "metric": "mean AUROC" if task == "multilabel" else "balanced accuracy",
        "samples": len(found),
        "values": {name: round(value, 4) for name, value in values.items()},
        "chance": round(chance, 4),
        "near_chance": [name for name, value in values.items() if not value >= bar],
    }


def _read(reader: Reader, samples: int) -> list[Sample]:
    """Up to `samples` labelled ones, spread over the data set, of the commonest image and label."""
    count = len(reader.dataset)
    found: list[Sample] = []
    held = 0
    for index in np.unique(np.linspace(0, count - 1, min(count, samples)).astype(int)):
        sample = reader.read_one(int(index))
        if not isinstance(sample, Sample) or sample.label is None:
            continue
        if not isinstance(sample.image, Tensor | np.ndarray):
            continue
        found.append(sample)
        held += sample.image.nbytes
        if held > _MOST_BYTES:
            break
    if not found:
        return []
    kind = Kind.of_most(found, labelled=True, batch_size=len(found) + 1)
    return [
        sample
        for sample in found
        if [list(sample.image.shape)] == kind.image and label_kind(sample.label) == kind.label
        if isinstance(kind.label, list)
    ]


def _balanced_accuracy(logits: Tensor, labels: Tensor) -> float:  # [N, C], [N] or [N, 1]
    """Mean recall over the classes that occur; labels that are no class do not count."""
    labels = labels.reshape(len(labels), -1)[:, 0]
    right = logits.argmax(1) == labels
    occurring = [c for c in labels.unique() if 0 <= c < logits.shape[1]]
    recalls = [right[labels == c].double().mean() for c in occurring]
    return float(torch.stack(recalls).mean()) if recalls else math.nan


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
