"""What a trained network is worth: of common and rare classes, of every group, and where it looks."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.nn import functional

from benchmarks.quality.imbalance import Imbalanced
from benchmarks.quality.training import forward
from fastpie.analysis.localisation import boxes_of_masks, corloc, mask_overlap, masks_of_maps

__all__ = ["outcome"]


def outcome(model: nn.Module, data: Imbalanced) -> dict[str, float]:
    """Figures of a test set, higher = better but for gaps.

    multiclass: `balanced accuracy` (mean recall of the classes, common images), `tail recall` (of the rarest
    third of the classes), `<group>` (balanced accuracy of the group over the classes it has), `worst group gap`
    (common less the worst group, each over the group's classes). With masks also `CAM IoU` and
    `CorLoc` of the true class's map, common images, and `CAM IoU, <group>`.

    multilabel: `mAP` over common images, of the commonest, middle and rarest third `mAP head`, `medium`, `tail`;
    `<group>` is the AUROC of the finding that the group has, against images without it, and the gap one of AUROCs.

    segmentation: `IoU` of common images, `IoU, <group>`, the gap.
    """
    logits = forward(model.eval(), torch.from_numpy(data.test_images))
    if data.task == "segmentation":
        return _of_masks(logits[:, 0].numpy() > 0, data)
    if data.task == "multilabel":
        return _of_findings(logits.numpy(), data)
    found = _of_classes(logits.numpy(), data)
    return found if data.test_masks is None else {**found, **_of_maps(model, data)}


def _of_classes(logits: np.ndarray, data: Imbalanced) -> dict[str, float]:
    right = logits.argmax(1) == data.test_labels

    def recall(group: int, classes: np.ndarray) -> float:
        here = data.test_group == group
        return float(np.mean([right[here & (data.test_labels == c)].mean() for c in classes]))

    everything = np.arange(data.classes)
    rarest = np.argsort(data.counts, kind="stable")[: data.classes // 3]
    found = {"balanced accuracy": recall(0, everything), "tail recall": recall(0, rarest)}
    gaps = []
    for place, name in enumerate(data.groups[1:], 1):
        classes = np.unique(data.test_labels[data.test_group == place])
        found[name] = recall(place, classes)
        gaps.append(recall(0, classes) - found[name])
    return {**found, "worst group gap": max(gaps)}


def _of_findings(logits: np.ndarray, data: Imbalanced) -> dict[str, float]:
    truth, common = data.test_labels, data.test_group == 0
    precision = np.array(
        [average_precision_score(truth[common, c], logits[common, c]) for c in range(data.classes)]
    )
    order = np.argsort(-data.counts, kind="stable")
    thirds = np.array_split(order, 3)
    found = {"mAP": float(precision.mean())}
    for name, third in zip(("head", "medium", "tail"), thirds, strict=True):
        found[f"mAP {name}"] = float(precision[third].mean())
    finding = next(c for c in order if truth[~common, c].all())  # the one that the group has
    areas = []
    for group in (0, 1):
        seen = (truth[:, finding] == 0) | (data.test_group == group)
        areas.append(float(roc_auc_score(truth[seen, finding], logits[seen, finding])))
    return {**found, data.groups[1]: areas[1], "worst group gap": areas[0] - areas[1]}


def _of_masks(masks: np.ndarray, data: Imbalanced, name: str = "IoU") -> dict[str, float]:
    overlap = mask_overlap(masks, data.test_masks).iou
    means = [float(overlap[data.test_group == g].mean()) for g in range(len(data.groups))]
    found = {name: means[0]}
    found.update(
        (f"{name}, {group}", m) for group, m in zip(data.groups[1:], means[1:], strict=True)
    )
    if name == "IoU":
        found["worst group gap"] = means[0] - min(means[1:])
    return found


@torch.inference_mode()
def _of_maps(model: nn.Module, data: Imbalanced) -> dict[str, float]:
    """Of the true class's activation map, as large as the image."""
    labels, parts = torch.from_numpy(data.test_labels), []
    for images, wanted in zip(
        torch.from_numpy(data.test_images).split(250), labels.split(250), strict=True
    ):
        features = model.stages(images)
        parts.append(torch.einsum("nkhw,nk->nhw", features, model.head.weight[wanted]))
    maps = functional.interpolate(
        torch.cat(parts)[:, None], data.test_images.shape[-2:], mode="bilinear", align_corners=False
    )[:, 0]
    masks = masks_of_maps(maps.numpy(), fraction=0.4)
    common = data.test_group == 0
    boxes, truth = boxes_of_masks(masks), boxes_of_masks(data.test_masks)
    found = _of_masks(masks, data, "CAM IoU")
    return {**found, "CorLoc": corloc(boxes[common], truth[common])}
