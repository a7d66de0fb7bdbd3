"""What one pass over the training samples finds: how hard each is, and how doubtful its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastpie.dual.output import DualOutput
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.mining.reading import Batch, Problem
from fastpie.training.attention.scores import Scoring, per_sample, takes_images, unpacked
from fastpie.training.attention.strata import rarest_positive

__all__ = ["Findings", "Guard"]

_OF_CLASSES = ("margin", "margin_pruned", "probe")
_OF_MASKS = ("loss", "loss_pruned")


class Guard:
    """How labels are doubted; see `Attention`.

    Attributes:
        name: "margin", "margin_pruned", "probe", "loss", "loss_pruned", "function", "given" or None.
        by_class: whether doubt is compared within classes: a rare class has low margins altogether.
        needs_dense: whether the pruned model's outputs are not enough.
    """

    def __init__(
        self, guard: Any, scoring: Scoring, order: np.ndarray, label: list[int] | str | None
    ) -> None:
        """Check a guard.

        Args:
            guard: what the user gave.
            scoring: what the samples are scored by.
            order: index in the data set of each position.
            label: what the labels are like, `Kind.label`.

        Raises:
            FastpieError: for one that there is not, or that needs labels.
        """
        if isinstance(guard, str) and guard == "auto":
            guard = None
            if scoring.of_classes:
                guard = "margin" if scoring.needs_dense else "margin_pruned"
            elif scoring.of_masks and isinstance(label, list) and len(label) > 1:  # an image
                guard = "loss" if scoring.needs_dense else "loss_pruned"
        self.function: Callable[..., Any] | None = None
        self.given: np.ndarray | None = None
        if guard is None or isinstance(guard, str):
            self.name = guard
            names = ("auto", *_OF_CLASSES, *_OF_MASKS)
            if guard not in (None, *names):
                raise FastpieError(
                    f"Expected `guard` to be one of {names}, None, a function or an array, but got "
                    f"{guard!r}."
                )
            if guard in _OF_CLASSES and not scoring.of_classes:
                raise FastpieError(
                    f"Expected labels of classes for the guard {guard!r}, but there are none: pass a "
                    "function or an array of doubts, or None."
                )
            if guard in _OF_MASKS and not scoring.of_masks:
                raise FastpieError(
                    f"Expected task 'segmentation' and masks for the guard {guard!r}, but got "
                    f"{scoring.task!r} {'without' if label is None else 'with'} labels."
                )
        elif callable(guard):
            self.name, self.function = "function", guard
        else:
            self.name = "given"
            values = np.asarray(guard, np.float64)
            if values.shape != order.shape:
                raise FastpieError(
                    f"Expected `guard` of shape [{len(order)}], a doubt of each sample in the order of "
                    f"the data set, but got {list(values.shape)}."
                )
            self.given = values[order]
        self.by_class = self.name in _OF_CLASSES
        self.needs_dense = self.name not in ("margin_pruned", "loss_pruned", "given", None)
        if self.name in _OF_MASKS:
            scoring.watch_losses(self.name)
        self.takes_images = self.function is not None and takes_images(self.function)


class Findings:
    """Collected batch by batch, then shared by the processes. Arrays are by position.

    Attributes:
        hardness: fp64 [N], higher = harder; NaN where it is unknown.
        doubt: fp64 [N], higher = more doubtful; NaN where it is unknown.
        labels: int64 [N], -1 unknown, or fp32 [N, C], NaN unknown; None without labels of classes.
    """

    def __init__(self, count: int, scoring: Scoring, guard: Guard | None) -> None:
        """Nothing found yet of `count` samples; without a guard no doubts."""
        self.hardness = np.full(count, np.nan)
        self.doubt = np.full(count, np.nan)
        self.labels: np.ndarray | None = None
        self._scoring, self._guard = scoring, guard
        self._features: list[np.ndarray] = []
        self._places: list[int] = []

    def account(
        self, batch: Batch, out: DualOutput, images: Callable[[], tuple[Any, ...]]
    ) -> tuple[list[int], list[Problem]]:
        """Take a batch; the positions that have a score, and why others have none."""
        slots, positions = np.array(batch.slots), np.array(batch.positions)
        scores = self._scoring(out, batch.labels, images)
        hardness = _of_slots(scores.hardness, slots, "score")
        self.hardness[positions] = hardness
        known = np.ones(len(slots), bool)
        if scores.labels is not None:
            labels = scores.labels[slots]
            if self.labels is None:
                self.labels = _unknown_labels(len(self.hardness), labels)
            self.labels[positions] = labels
            known = labels >= 0 if labels.ndim == 1 else (labels >= 0).any(1)
        if self._guard is None:
            pass
        elif self._guard.name in scores.doubts:
            self.doubt[positions] = scores.doubts[self._guard.name][slots]
        elif self._guard.name == "probe":
            assert out.features is not None
            features = out.features.dense
            self._features.append(features.float().flatten(1).cpu().numpy()[slots])
            self._places += batch.positions
        elif self._guard.function is not None:
            arguments = [out, batch.labels]
            if self._guard.takes_images:
                arguments.append(unpacked(images()))
            doubt = per_sample(self._guard.function(*arguments), "guard").numpy()
            self.doubt[positions] = _of_slots(doubt, slots, "guard")
        scored = ~np.isnan(hardness)
        problems = [
            Problem(int(p), "score", "Expected a score, but it is NaN.")
            for p in positions[~scored & known]  # what has no label needs no excuse
        ]
        return positions[scored].tolist(), problems

    def share(self) -> tuple[Any, ...]:
        """What this process has found."""
        rows = np.flatnonzero(~np.isnan(self.hardness) | ~np.isnan(self.doubt))
        labels = None
        if self.labels is not None:
            known = self.labels >= 0
            labelled = np.flatnonzero(known if known.ndim == 1 else known.any(1))
            labels = labelled, self.labels[labelled]
        return rows, self.hardness[rows], self.doubt[rows], labels

    def merge(self, shares: Sequence[tuple[Any, ...]], ranks: Ranks) -> None:
        """Take what every process has found."""
        for rows, hardness, doubt, labels in shares:
            self.hardness[rows], self.doubt[rows] = hardness, doubt
            if labels is not None:
                if self.labels is None:
                    self.labels = _unknown_labels(len(self.hardness), labels[1])
                self.labels[labels[0]] = labels[1]
        if self._guard is None:
            return
        if self._guard.given is not None:
            self.doubt = self._guard.given
        elif self._guard.name == "probe":
            own = np.concatenate(self._features) if self._features else None
            parts = ranks.gather((np.array(self._places, np.int64), own))
            # On rank 0 alone: another machine may round otherwise, and weights must be the same.
            self.doubt = ranks.first(lambda: self._probed(parts))

    def classes(self) -> np.ndarray | None:  # int64 [N]
        """The class of each sample, of several the rarest positive one; -1 unknown or none."""
        if self.labels is None or self.labels.ndim == 1:
            return self.labels
        return rarest_positive(self.labels)

    def _probed(self, parts: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray:
        # Late: the analyses are not loaded with every training.
        from fastpie.analysis.probe import probe_margins

        doubt = np.full(len(self.hardness), np.nan)
        there = [(places, features) for places, features in parts if features is not None]
        if not there or self.labels is None:
            return doubt
        places = np.concatenate([places for places, _ in there])
        order = np.argsort(places)  # so that the number of processes changes no bit
        features = np.concatenate([features for _, features in there])[order]
        places = places[order]
        labels = self.labels[places]
        classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        margins = probe_margins(features, labels, classes)
        if margins.ndim == 2:
            lowest = np.where(np.isnan(margins), np.inf, margins).min(1)
            margins = np.where(np.isinf(lowest), np.nan, lowest)
        doubt[places] = -margins
        return doubt


def _of_slots(values: np.ndarray, slots: np.ndarray, what: str) -> np.ndarray:
    if len(slots) and len(values) <= slots.max():
        raise FastpieError(
            f"Expected the function `{what}` to return one number for each sample of the batch, but "
            f"got {len(values)}."
        )
    chosen: np.ndarray = values[slots]
    return chosen


def _unknown_labels(count: int, like: np.ndarray) -> np.ndarray:
    if like.ndim == 1:
        return np.full(count, -1, np.int64)
    return np.full((count, like.shape[1]), np.nan, np.float32)
