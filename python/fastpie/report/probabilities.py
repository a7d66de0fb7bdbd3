"""Probabilities of both models for the samples and classes that a report shows."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.report.columns import Columns

__all__ = ["Shown", "probabilities"]

Shown = list[tuple[int, list[float]]]
"""Classes of a sample, each with its probability in the dense model and at every level."""

_TOP = 3  # classes of each model
_MOST = 8  # classes of a sample
# Logits that are read whole; those of 1.28 million images of 1,000 classes would not fit a memory.
_MOST_LOGITS = 1 << 28


def probabilities(
    result: MiningResult, columns: Columns, rows: np.ndarray
) -> tuple[list[Shown] | None, str]:
    """Probabilities of some samples, the most interesting classes first.

    From kept logits, the mean over the models of a run of several: the labels and the three highest
    of each model. Without logits, the label's alone, which its loss tells.

    Args:
        result: the run.
        columns: of the run.
        rows: of the samples in `columns`.

    Returns:
        A list for each sample, or None where the run tells none; and what there is to say of it.
    """
    task = result.record["config"]["task"]
    if task not in ("multiclass", "multilabel") or not len(rows):
        return None, ""
    some = columns.rows(rows)
    members = result.members or [result]
    if all(m.record["config"].get("keep_logits") for m in members):
        if _too_many(members, len(columns.sparsities)):
            note = (
                "Probabilities of all classes are left out: the run's logits are too many, or too far "
                "away, to be read here."
            )
            return _of_losses(some, task), note
        values = np.mean([_of_logits(m, some, task) for m in members], axis=0)
        return _most_interesting(values, some), ""
    return _of_losses(some, task), (
        "Probabilities of all classes need a run with keep_logits=True."
    )


def _too_many(members: list[MiningResult], levels: int) -> bool:
    count = 0
    for member in members:
        try:
            part = next((member.path / "logits").glob("part-*.parquet"), None)
        except FastpieError:  # at a URL
            return True
        if part is not None:
            size = pq.read_schema(part).field("dense").type.list_size
            count = max(count, len(member) * size * (levels + 1))
    return count > _MOST_LOGITS


def _of_logits(member: MiningResult, some: Columns, task: str) -> np.ndarray:
    """fp64 [n, 1 + L, C]."""
    places = pc.index_in(some.table["sample_id"], member.table["sample_id"].combine_chunks())
    rows = places.to_numpy()
    dense, pruned = member.logits()
    values = torch.from_numpy(np.concatenate([dense[None, rows], pruned[:, rows]])).double()
    values = values.sigmoid() if task == "multilabel" else values.softmax(-1)
    result: np.ndarray = values.transpose(0, 1).numpy()
    return result


def _most_interesting(values: np.ndarray, some: Columns) -> list[Shown]:
    labels = some.numbers("label")
    several = some.multilabels()
    top = np.argsort(-values, axis=-1, kind="stable")[..., :_TOP]
    shown = []
    for row, of_sample in enumerate(values):
        classes: list[int] = []
        if labels is not None and np.isfinite(labels[row]):
            classes.append(int(labels[row]))
        if several is not None:
            classes += np.flatnonzero(several[row] == 1).tolist()[: _MOST - 2]
        # The first of each model before the second of either.
        classes += top[row][[0, -1]].T.ravel().tolist()
        classes = [c for c in dict.fromkeys(classes) if c < values.shape[-1]][:_MOST]
        shown.append([(c, of_sample[:, c].tolist()) for c in classes])
    return shown


def _of_losses(some: Columns, task: str) -> list[Shown] | None:
    """Of the label: cross-entropy is the negative logarithm of its probability."""
    labels, dense = some.numbers("label"), some.numbers("loss_dense")
    levels = some.at_levels("loss_pruned")
    if task != "multiclass" or labels is None or dense is None or not levels:
        return None
    values = np.exp(-np.stack([dense, *levels.values()], axis=1))
    return [
        [(int(label), of_sample.tolist())] if np.isfinite(label) else []
        for label, of_sample in zip(labels, values, strict=True)
    ]
