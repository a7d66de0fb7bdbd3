"""Average precision of detected boxes at thresholds of IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpie.errors import FastpieError
from fastpie.scores.boxes import box_iou, check_boxes

__all__ = ["COCO_THRESHOLDS", "BoxPrecision", "box_average_precision"]

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""0.5, 0.55, ..., 0.95: over these COCO takes its mean."""


@dataclass(frozen=True, eq=False)
class BoxPrecision:
    """Average precision by IoU threshold and class.

    Attributes:
        ap: fp64 [T, C], in [0, 1]; NaN for a class without a true box.
        thresholds: the T of them.
        classes: int64 [C], those that any box has, ascending.
        true_boxes: int64 [C], how many the class has.
    """

    ap: np.ndarray
    thresholds: tuple[float, ...]
    classes: np.ndarray
    true_boxes: np.ndarray

    def at(self, threshold: float) -> float:
        """Mean over the classes at one threshold; NaN without a true box.

        Raises:
            FastpieError: if it is none of `thresholds`.
        """
        for row, value in zip(self.ap, self.thresholds, strict=True):
            if abs(value - threshold) <= 1e-9:
                return _mean(row)
        raise FastpieError(
            f"Expected `threshold` to be one of {self.thresholds}, but got {threshold}."
        )

    @property
    def mean(self) -> float:
        """Mean over classes and thresholds; NaN without a true box."""
        return _mean(self.ap)


def box_average_precision(
    predictions: Sequence[Mapping[str, Any]],
    truths: Sequence[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    points: int | None = None,
    max_detections: int | None = None,
) -> BoxPrecision:
    """Average precision of boxes found in images, as COCO and PASCAL VOC since 2010 define it.

    The boxes of a class are ranked by score over all images. Each in turn takes the true box of its
    image and class that it meets best among those not taken yet, if the IoU is high enough; else it
    is a false alarm (COCO's rule: VOC counts a box whose best true box is taken as false even if
    another one would do). AP is the area under precision over recall, precision made monotone from
    the right: `sum_i (R_i - R_{i-1}) max_{j >= i} P_j`.

    Sources: https://cocodataset.org/#detection-eval (Lin et al., arXiv 1405.0312); Everingham et
    al., VOC2010 development kit, section 3.4.1.

    Args:
        predictions: for each image "boxes" [D, 4] or [D, 6] (see `fastpie.scores.boxes`), "scores"
            [D] and, if there are several classes, integers "labels" [D]: NumPy arrays or tensors.
        truths: for each image "boxes" [G, ...] and "labels" [G], likewise.
        thresholds: of IoU, each in (0, 1].
        points: 101 takes the mean of the precision at so many evenly spaced recalls instead of the
            area, as COCO's own code does.
        max_detections: of a class in an image, the best so many count (COCO: 100); None: all.

    Raises:
        FastpieError: for entries that do not fit together, NaN, or numbers out of range.
    """
    wanted = tuple(float(threshold) for threshold in thresholds)
    if not wanted or not all(0 < threshold <= 1 for threshold in wanted):
        raise FastpieError(f"Expected `thresholds` in (0, 1], but got {list(thresholds)}.")
    if points is not None and points < 2:
        raise FastpieError(f"Expected at least 2 `points`, but got {points}.")
    if max_detections is not None and max_detections < 1:
        raise FastpieError(f"Expected `max_detections` of at least 1, but got {max_detections}.")
    if len(predictions) != len(truths):
        raise FastpieError(
            f"Expected as many `predictions` as `truths`, but got {len(predictions)} and "
            f"{len(truths)}."
        )
    found = [_image(entry, "predictions", scored=True) for entry in predictions]
    real = [_image(entry, "truths", scored=False) for entry in truths]
    ranked: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # by class: scores, hits
    counts: dict[int, int] = {}
    for boxes, truth in zip(found, real, strict=True):
        for klass in np.union1d(boxes.labels, truth.labels).tolist():
            of_class = boxes.of_class(klass).best(max_detections)
            true = truth.of_class(klass).boxes
            hits = _matches(of_class.boxes, true, wanted)
            ranked.setdefault(klass, []).append((of_class.scores, hits))
            counts[klass] = counts.get(klass, 0) + len(true)
    classes = sorted(ranked)
    ap = np.full((len(wanted), len(classes)), np.nan)
    for c, klass in enumerate(classes):
        if counts[klass]:
            scores, of_images = zip(*ranked[klass], strict=True)
            order = np.argsort(-np.concatenate(scores), kind="stable")
            hits = np.concatenate(of_images, 1)[:, order]
            ap[:, c] = [_area(row, counts[klass], points) for row in hits]
    true_boxes = np.array([counts[klass] for klass in classes], np.int64)
    return BoxPrecision(ap, wanted, np.array(classes, np.int64), true_boxes)


@dataclass(frozen=True, eq=False)
class _Boxes:
    boxes: Tensor  # fp64 [D, 2 n]
    scores: np.ndarray  # fp64 [D]
    labels: np.ndarray  # int64 [D]

    def of_class(self, klass: int) -> _Boxes:
        return self._take(np.flatnonzero(self.labels == klass))

    def best(self, count: int | None) -> _Boxes:
        """By falling score, the first of equals first."""
        return self._take(np.argsort(-self.scores, kind="stable")[:count])

    def _take(self, which: np.ndarray) -> _Boxes:
        return _Boxes(self.boxes[torch.from_numpy(which)], self.scores[which], self.labels[which])


def _image(entry: Mapping[str, Any], name: str, *, scored: bool) -> _Boxes:
    missing = [key for key in ("boxes", "scores")[: 1 + scored] if key not in entry]
    if missing:
        raise FastpieError(f"Expected {missing[0]!r} in each of `{name}`, but got {list(entry)}.")
    boxes = torch.as_tensor(entry["boxes"]).detach().double().cpu()
    if not boxes.numel():
        boxes = boxes.new_zeros(0, boxes.shape[-1] if boxes.ndim == 2 else 4)
    check_boxes(boxes, f"{name}[...]['boxes']")
    scores = torch.as_tensor(entry["scores"] if scored else np.zeros(len(boxes)))
    labels = torch.as_tensor(entry.get("labels", np.zeros(len(boxes), np.int64)))
    scores, labels = scores.detach().double().cpu().reshape(-1), labels.cpu().reshape(-1)
    if boxes.ndim != 2 or not len(boxes) == len(scores) == len(labels):
        raise FastpieError(
            f"Expected one score and one label for each box [D, 2 n] of `{name}`, but got boxes "
            f"{list(boxes.shape)}, {len(scores)} scores and {len(labels)} labels."
        )
    if boxes.isnan().any() or scores.isnan().any():
        raise FastpieError(f"Expected numbers in `{name}`, but got NaN.")
    if len(labels) and labels.is_floating_point():
        raise FastpieError(f"Expected integers as labels of `{name}`, but got {labels.dtype}.")
    return _Boxes(boxes, scores.numpy(), labels.long().numpy())


def _matches(
    boxes: Tensor,  # by falling score
    truth: Tensor,
    thresholds: tuple[float, ...],
) -> np.ndarray:  # bool [T, D]
    """Which boxes take a true one."""
    hits = np.zeros((len(thresholds), len(boxes)), bool)
    if not len(truth) or not len(boxes):
        return hits
    iou = box_iou(boxes[:, None], truth[None]).numpy()
    for t, threshold in enumerate(thresholds):
        left = np.ones(len(truth), bool)
        for d, row in enumerate(iou):
            free = np.where(left, row, -1.0)
            best = len(free) - 1 - int(free[::-1].argmax())  # of equals the last, as COCO's code
            if free[best] >= threshold:
                left[best] = False
                hits[t, d] = True
    return hits


def _area(
    hits: np.ndarray,  # bool [D], by falling score
    count: int,
    points: int | None,
) -> float:
    true = np.cumsum(hits)
    precision = true / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    if points is None:
        return float(precision[hits].sum()) / count
    at = np.searchsorted(true / count, np.linspace(0, 1, points), side="left")
    return float(np.append(precision, 0.0)[at].mean())


def _mean(values: np.ndarray) -> float:
    told = values[~np.isnan(values)]
    return float(told.mean()) if told.size else float("nan")
