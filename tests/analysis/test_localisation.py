"""Metrics of localisation, against MONAI's and against literal transcriptions of their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data import box_utils
from monai.metrics import compute_dice, compute_iou

import fastpie.scores.boxes
from fastpie.analysis.box_precision import COCO_THRESHOLDS, box_average_precision
from fastpie.analysis.localisation import (
    best_iou,
    boxes_of_masks,
    corloc,
    largest_component,
    mask_overlap,
    masks_of_maps,
    pointing_game,
)
from fastpie.errors import FastpieError
from fastpie.scores.boxes import box_giou, box_iou


def some_boxes(count: int, sides: int = 2, generator: Any = None) -> np.ndarray:
    rng = generator or np.random.default_rng(7)
    low = rng.uniform(0, 20, (count, sides))
    return np.concatenate([low, low + rng.uniform(1, 12, (count, sides))], 1)


class TestBoxes:
    @pytest.mark.parametrize("sides", [2, 3])
    def test_as_monai(self, sides: int) -> None:
        a = torch.from_numpy(some_boxes(40, sides)).float()
        b = torch.from_numpy(some_boxes(40, sides, np.random.default_rng(8))).float()
        pairs = box_iou(a[:, None], b[None])
        torch.testing.assert_close(pairs, box_utils.box_iou(a, b))
        assert (pairs > 0).sum() > 20
        torch.testing.assert_close(box_giou(a, b), box_utils.box_pair_giou(a, b))

    def test_edges(self) -> None:
        box = torch.tensor([0.0, 0.0, 2.0, 2.0])
        empty = torch.tensor([1.0, 1.0, 1.0, 1.0])
        crossed = torch.tensor([2.0, 2.0, 0.0, 0.0])
        assert box_iou(box, box) == 1
        assert box_iou(empty, empty) == 0
        assert box_iou(box, crossed) == 0
        assert box_giou(empty, empty) == 0
        assert box_iou(box, box * torch.nan).isnan()
        assert box_iou(box.bfloat16(), box.bfloat16()).dtype is torch.float32
        assert box_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
        for wrong in (torch.zeros(3), torch.zeros(2, 5), torch.zeros(2, 6), torch.tensor(1.0)):
            with pytest.raises(FastpieError, match="boxes"):
                box_iou(wrong, box)

    @pytest.mark.parametrize("sides", [2, 3])
    def test_gradients(self, sides: int) -> None:
        a = torch.from_numpy(some_boxes(9, sides)).requires_grad_()
        b = torch.from_numpy(some_boxes(9, sides, np.random.default_rng(8))).requires_grad_()
        assert torch.autograd.gradcheck(box_iou, (a, b))
        assert torch.autograd.gradcheck(box_giou, (a, b))


class TestMasks:
    @pytest.mark.parametrize("size", [(9, 7), (5, 4, 6)])
    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_as_monai(self, size: tuple[int, ...], kind: str) -> None:
        classes = 3
        a, b = torch.randint(0, classes, (2, 6, *size))
        hot = [torch.nn.functional.one_hot(x, classes).movedim(-1, 1) for x in (a, b)]
        given = (a, b) if kind == "torch" else (a.numpy().astype(np.uint16), b.numpy())
        overlap = mask_overlap(*given, classes=classes)
        np.testing.assert_allclose(overlap.iou, compute_iou(*hot).numpy(), rtol=1e-6)
        np.testing.assert_allclose(overlap.dice, compute_dice(*hot).numpy(), rtol=1e-6)
        np.testing.assert_allclose(overlap.mean_iou, compute_iou(*hot).numpy().mean(0), rtol=1e-6)
        binary = mask_overlap(*given)
        hot = [(x > 0)[:, None].long() for x in (a, b)]
        np.testing.assert_allclose(binary.dice, compute_dice(*hot).numpy()[:, 0], rtol=1e-6)
        assert binary.mean_dice == pytest.approx(binary.dice.mean())

    def test_of_nothing(self) -> None:
        nothing, something = np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)
        assert mask_overlap(nothing, nothing).iou == [1.0]
        assert mask_overlap(nothing, nothing).dice == [1.0]
        assert np.isnan(mask_overlap(nothing, nothing, empty=math.nan).mean_iou)
        assert mask_overlap(something, nothing).iou == [0.0]
        assert mask_overlap(nothing, something).dice == [0.0]
        none = mask_overlap(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))
        assert none.iou.shape == (0,)
        assert np.isnan(none.mean_iou)

    def test_what_is_unknown(self) -> None:
        predicted, true = torch.randint(0, 2, (2, 4, 8, 8)).float()
        true[0, :, :4] = torch.nan
        true[1] = torch.nan
        predicted[2, 0, 0] = torch.nan
        overlap = mask_overlap(predicted, true)
        half = mask_overlap(predicted[:1, :, 4:], true[:1, :, 4:])
        assert overlap.iou[0] == half.iou[0]
        assert np.isnan(overlap.iou).tolist() == [False, True, True, False]
        as_integers = true.nan_to_num(-1.0).long()
        np.testing.assert_array_equal(mask_overlap(predicted, as_integers).dice, overlap.dice)

    def test_refuses(self) -> None:
        with pytest.raises(FastpieError, match="fractions"):
            mask_overlap(torch.rand(2, 4, 4), torch.zeros(2, 4, 4))
        with pytest.raises(FastpieError, match="one shape"):
            mask_overlap(torch.zeros(2, 4, 4), torch.zeros(2, 4, 5))
        with pytest.raises(FastpieError, match="classes"):
            mask_overlap(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), classes=0)


class TestBoxesOfMasks:
    def test_literally(self) -> None:
        masks = np.random.default_rng(3).random((20, 9, 12)) > 0.97
        masks[4] = False
        boxes = boxes_of_masks(torch.from_numpy(masks))
        for mask, box in zip(masks, boxes, strict=True):
            rows, columns = np.nonzero(mask)
            if not len(rows):
                assert np.isnan(box).all()
                continue
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == expected

    def test_volumes_and_emptiness(self) -> None:
        volume = np.zeros((2, 5, 6, 7), bool)
        volume[0, 1:3, 2:6, 4] = True
        boxes = boxes_of_masks(volume)
        assert boxes[0].tolist() == [4, 2, 1, 5, 6, 3]
        assert np.isnan(boxes[1]).all()
        assert boxes_of_masks(np.zeros((0, 5, 6))).shape == (0, 4)
        assert boxes_of_masks(np.array([[0, 1, 1, 0]])).tolist() == [[1, 3]]
        scaled = fastpie.scores.boxes.boxes_of_masks(torch.from_numpy(volume), (50, 12, 7))
        assert scaled[0].tolist() == [4, 4, 10, 5, 12, 30]
        with pytest.raises(FastpieError, match="bool"):
            fastpie.scores.boxes.boxes_of_masks(torch.zeros(1, 3, 3))

    def test_largest_component(self) -> None:
        mask = np.zeros((1, 8, 8), bool)
        mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 2, 2] = True  # touch at corners
        mask[0, 6:, 6] = True
        kept = largest_component(mask)
        assert kept.sum() == 3
        assert kept[0, 1, 1]
        assert not largest_component(mask & False).any()

    def test_masks_of_maps(self) -> None:
        rows, columns = np.mgrid[:32, :32]
        heat = np.exp(-((rows - 10) ** 2 + (columns - 20) ** 2) / 18.0)
        heat += 0.5 * np.exp(-((rows - 28) ** 2 + (columns - 3) ** 2) / 4.0)
        maps = np.stack([heat, -heat, np.full_like(heat, np.nan)])
        masks = masks_of_maps(maps)
        radius = math.sqrt(18 * math.log(5))  # exp(-r^2/18) > .2
        inside = (rows - 10) ** 2 + (columns - 20) ** 2 < radius**2
        np.testing.assert_array_equal(masks[0], inside)
        assert not masks[1:].any()
        assert masks_of_maps(maps, largest=False)[0].sum() > inside.sum()
        assert boxes_of_masks(masks)[0].tolist() == [15, 5, 26, 16]
        with pytest.raises(FastpieError, match="fraction"):
            masks_of_maps(maps, fraction=1.0)


class TestCorLoc:
    def test_by_hand(self) -> None:
        boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [math.nan] * 4, [0, 0, 1, 1], [0, 0, 10, 10]]
        true = [
            np.array([[0, 0, 10, 4], [0, 0, 10, 6]]),  # .6
            np.array([[0, 5, 10, 15]]),  # 1/3
            np.array([[0, 0, 1, 1]]),  # nothing found
            np.zeros((0, 4)),  # nothing to find
            np.array([[math.nan] * 4, [0, 0, 10, 10]]),
        ]
        np.testing.assert_allclose(best_iou(boxes, true), [0.6, 1 / 3, 0, math.nan, 1])
        assert corloc(boxes, true) == 2 / 4
        assert corloc(boxes, true, threshold=0.3) == 3 / 4
        assert math.isnan(corloc(boxes[3:4], true[3:4]))

    def test_one_box_an_image(self) -> None:
        a, b = some_boxes(30), some_boxes(30, 2, np.random.default_rng(9))
        paired = box_utils.box_iou(a, b).diagonal()
        np.testing.assert_allclose(best_iou(torch.from_numpy(a), b), paired, atol=1e-6)

    def test_refuses(self) -> None:
        with pytest.raises(FastpieError, match="as many"):
            best_iou(np.zeros((2, 4)), [np.zeros((1, 4))])
        with pytest.raises(FastpieError, match="threshold"):
            corloc(np.zeros((1, 4)), np.zeros((1, 4)), threshold=0)


def test_pointing_game() -> None:
    maps = torch.zeros(4, 6, 6)
    maps[0, 2, 3] = maps[1, 0, 0] = 1
    masks = torch.zeros(4, 6, 6)
    masks[:3, 2:4, 3:5] = 1
    np.testing.assert_array_equal(pointing_game(maps, masks), [1, 0, 0, math.nan])
    np.testing.assert_array_equal(
        pointing_game(maps, masks, tolerance=13**0.5), [1, 1, 1, math.nan]
    )
    np.testing.assert_array_equal(pointing_game(maps, masks, tolerance=3.6), [1, 0, 0, math.nan])


def detections(images: int, classes: int, seed: int) -> tuple[list[Any], list[Any]]:
    """True boxes, each found or not, shifted, and false alarms among them; scores with ties."""
    rng = np.random.default_rng(seed)
    predictions, truths = [], []
    for _ in range(images):
        true = some_boxes(rng.integers(0, 5), 2, rng)
        labels = rng.integers(0, classes, len(true))
        again = rng.integers(0, max(len(true), 1), rng.integers(0, 8) if len(true) else 0)
        found = true[again] + np.tile(rng.normal(0, 1.5, (len(again), 2)), 2)
        alarms = some_boxes(rng.integers(0, 3), 2, rng)
        boxes = np.concatenate([found, alarms])
        of = np.concatenate([labels[again], rng.integers(0, classes, len(alarms))])
        scores = rng.integers(0, 20, len(boxes)) / 20
        predictions.append({"boxes": boxes, "scores": scores, "labels": of})
        truths.append({"boxes": true, "labels": labels})
    return predictions, truths


def literal_ap(predictions: list[Any], truths: list[Any], klass: int, threshold: float) -> float:
    """Ranking, greedy matching and the area, step by step."""
    ranked = [
        (-score, i, d)
        for i, entry in enumerate(predictions)
        for d, score in enumerate(entry["scores"])
        if entry["labels"][d] == klass
    ]
    total = sum(int((entry["labels"] == klass).sum()) for entry in truths)
    taken: set[tuple[int, int]] = set()
    precision, recall, true = [], [0.0], 0
    for rank, (_, i, d) in enumerate(sorted(ranked), 1):
        best, at = threshold, None
        x0, y0, x1, y1 = predictions[i]["boxes"][d]
        for g, (u0, v0, u1, v1) in enumerate(truths[i]["boxes"]):
            if truths[i]["labels"][g] != klass or (i, g) in taken:
                continue
            inter = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
            iou = inter / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inter)
            if iou >= best:
                best, at = iou, (i, g)
        if at is not None:
            taken.add(at)
            true += 1
        precision.append(true / rank)
        recall.append(true / total)
    return sum((recall[k + 1] - recall[k]) * max(precision[k:]) for k in range(len(precision)))


class TestBoxPrecision:
    def test_literally(self) -> None:
        predictions, truths = detections(30, 3, 5)
        thresholds = (0.3, 0.5, 0.75)
        result = box_average_precision(predictions, truths, thresholds=thresholds)
        assert result.classes.tolist() == [0, 1, 2]
        expected = [[literal_ap(predictions, truths, c, t) for c in range(3)] for t in thresholds]
        np.testing.assert_allclose(result.ap, expected, atol=1e-12)
        assert 0.05 < result.mean < 0.95
        assert result.at(0.5) == pytest.approx(np.mean(expected[1]))
        assert result.mean == pytest.approx(np.mean(expected))

    def test_as_monai(self) -> None:
        predictions, truths = detections(40, 2, 6)
        metric = COCOMetric(
            ["a", "b"], [0.3, 0.5, 0.75], (0.5, 0.95, 0.05), max_detection=[3], verbose=False
        )
        matched = matching_batch(
            box_utils.box_iou,
            metric.iou_thresholds,
            *([entry[key] for entry in predictions] for key in ("boxes", "labels", "scores")),
            *([entry[key] for entry in truths] for key in ("boxes", "labels")),
            max_detections=3,
        )
        values, _ = metric(matched)
        result = box_average_precision(
            predictions, truths, thresholds=(0.3, 0.5, 0.75), points=101, max_detections=3
        )
        for threshold in (0.3, 0.5, 0.75):
            expected = values[f"AP_IoU_{threshold:.2f}_MaxDet_3"]
            assert result.at(threshold) == pytest.approx(expected, abs=1e-6)
        assert result.ap[1, 1] == pytest.approx(values["b_AP_IoU_0.50_MaxDet_3"], abs=1e-6)
        coco = box_average_precision(predictions, truths, points=101, max_detections=3)
        assert coco.thresholds == COCO_THRESHOLDS
        expected = values["mAP_IoU_0.50_0.95_0.05_MaxDet_3"]
        assert coco.mean == pytest.approx(expected, abs=1e-6)

    def test_torch_volumes_and_no_labels(self) -> None:
        boxes = torch.from_numpy(some_boxes(3, 3))
        entry = {"boxes": boxes, "scores": torch.tensor([0.2, 0.9, 0.5])}
        nothing = {"boxes": torch.zeros(0), "scores": torch.zeros(0)}
        result = box_average_precision([entry, nothing], [{"boxes": boxes}] * 2)
        assert result.mean == 0.5  # all found in one image, none in the other
        assert result.true_boxes.tolist() == [6]

    def test_nothing_true(self) -> None:
        entry = {"boxes": some_boxes(2), "scores": [0.5, 0.6], "labels": [1, 4]}
        true = {"boxes": some_boxes(1), "labels": [1]}
        result = box_average_precision([entry], [true], thresholds=[0.5])
        assert result.classes.tolist() == [1, 4]
        assert np.isnan(result.ap).tolist() == [[False, True]]
        assert math.isnan(box_average_precision([], []).mean)
        with pytest.raises(FastpieError, match="threshold"):
            result.at(0.75)

    def test_refuses(self) -> None:
        entry, true = {"boxes": some_boxes(2), "scores": [0.5, math.nan]}, {"boxes": some_boxes(1)}
        with pytest.raises(FastpieError, match="NaN"):
            box_average_precision([entry], [true])
        with pytest.raises(FastpieError, match="as many"):
            box_average_precision([], [true])
        with pytest.raises(FastpieError, match="scores"):
            box_average_precision([true], [true])
        with pytest.raises(FastpieError, match="one score"):
            box_average_precision([{**entry, "scores": [0.1]}], [true])
        with pytest.raises(FastpieError, match="integers"):
            box_average_precision(
                [{"boxes": some_boxes(1), "scores": [1.0], "labels": [0.5]}], [true]
            )
        for options in ({"thresholds": [0]}, {"points": 1}, {"max_detections": 0}):
            with pytest.raises(FastpieError, match=next(iter(options))):
                box_average_precision([], [], **options)
