"""How good a model is on samples it does not train on, by all processes together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpie.analysis.metrics import class_metrics
from fastpie.dual.inputs import as_arguments
from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Problem
from fastpie.training.objectives.objective import Objective, TrainBatch, entry_of
from fastpie.training.trainer.feed import Feed

__all__ = ["evaluate_model"]


def evaluate_model(
    objective: Objective,
    feed: Feed,
    ranks: Ranks,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> tuple[dict[str, float], list[Problem]]:
    """Metrics of `objective.model`, the same in every process.

    Args:
        objective: what is trained.
        feed: of the samples.
        ranks: the processes; each takes every so-manieth batch.
        device: of the model.
        autocast: context of a forward pass.

    Returns:
        The metrics, and the samples that could not be read. `loss`: cross-entropy in nats of the
        labels (multilabel: mean over the known classes), whatever the objective minimises, so that
        trainings compare. Labels of whole numbers: `accuracy` and `balanced_accuracy`; labels [n, C]
        of 0, 1 and NaN or -1 (unknown): `map` and `mauroc`, means over the classes that have both. Others: `loss`
        alone, by the criterion of a `Supervised` objective.

    Raises:
        FastpieError: for samples without labels, or labels that need another measure.
    """
    size, count = feed.batch_size, len(feed.dataset)
    cut = [range(i, min(i + size, count)) for i in range(0, count, size)]
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    sums, unreadable = np.zeros(2), []
    order, mine = np.arange(count), range(len(cut))[ranks.rank :: ranks.count]
    with evaluating(objective), torch.no_grad():
        fetched_all = feed.batches(order, (cut[i] for i in mine), (2,))
        for number, fetched in zip(mine, fetched_all, strict=True):
            unreadable += fetched.unreadable
            if fetched.images is None:
                continue
            batch = fetched.to(device)
            batch.images = feed.normalize(batch.images)
            with autocast:
                output = objective.model(*as_arguments(batch.images))
            logits = entry_of(output, getattr(objective, "output", None)).float()
            if _task(logits, batch.labels) is None:
                losses = _criterion(objective, logits, batch)
                sums += [float(losses.double().sum()), len(batch)]
            else:
                kept.append((number, logits.cpu().numpy(), batch.labels.cpu().numpy()))
    parts = sorted((part for of_one in ranks.all(kept) for part in of_one), key=lambda p: p[0])
    unreadable = [u for of_one in ranks.all(unreadable) for u in of_one]
    if parts:
        logits, labels = (torch.from_numpy(np.concatenate([p[i] for p in parts])) for i in (1, 2))
        return _metrics(logits, labels), unreadable
    total, samples = np.sum(ranks.all(sums), axis=0)
    return {"loss": float(total / samples) if samples else float("nan")}, unreadable


def _task(logits: Tensor, labels: Any) -> str | None:
    if not isinstance(labels, Tensor):
        raise FastpieError(
            "Expected labels to evaluate by, but got "
            f"{'none' if labels is None else type(labels).__name__}; give `evaluate` instead of `valid`."
        )
    if logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
        return "multiclass"
    return "multilabel" if logits.ndim == 2 and labels.shape == logits.shape else None


def _criterion(objective: Objective, logits: Tensor, batch: TrainBatch) -> Tensor:
    criterion = getattr(objective, "criterion", None)
    if criterion is None:
        raise FastpieError(
            f"Expected labels [n] or [n, C] beside logits [n, C], but got {list(batch.labels.shape)} "
            f"and {list(logits.shape)}; give `evaluate` instead of `valid`."
        )
    losses: Tensor = criterion(logits, batch.labels)
    return losses


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    if labels.ndim == 1:
        known = labels >= 0
        logits, labels = logits[known], labels[known]
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise FastpieError(
                f"Expected labels below {logits.shape[1]}, the classes of the model, but got "
                f"{int(labels.max())}."
            )
        loss = F.cross_entropy(logits.double(), labels.long())
        right = (logits.argmax(1) == labels).double()
        of_classes = [float(right[labels == c].mean()) for c in labels.unique()]
        return {
            "loss": float(loss),
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(of_classes)) if of_classes else float("nan"),
        }
    labels = labels.masked_fill(labels < 0, torch.nan)
    known = ~labels.isnan()
    targets = labels.nan_to_num().double()
    each = F.binary_cross_entropy_with_logits(logits.double(), targets, reduction="none")
    rows = known.any(1)
    loss = ((each * known).sum(1) / known.sum(1).clamp(min=1))[rows].mean()
    ap, auroc = class_metrics(logits.numpy().T, labels.numpy().T)
    told = ~np.isnan(ap)
    return {
        "loss": float(loss),
        "map": float(ap[told].mean()) if told.any() else float("nan"),
        "mauroc": float(auroc[told].mean()) if told.any() else float("nan"),
    }
