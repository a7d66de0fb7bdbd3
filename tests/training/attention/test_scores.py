"""Scores by name against formulas in plain PyTorch; functions; losses of segmentations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from attending import margin
from fastpie import FastpieError
from fastpie.dual.output import DualOutput
from fastpie.training.attention.scores import Scoring
from fastpie.training.attention.segmentation_loss import segmentation_loss


def scored(
    score: Any, task: str, dense: Tensor, pruned: Tensor, labels: Any, **options: Any
) -> np.ndarray:
    is_ladder = pruned.ndim > dense.ndim
    scoring = Scoring(
        score, task, is_ladder=is_ladder, labelled=labels is not None, output=None, **options
    )
    out = DualOutput(dense, pruned, None)
    return scoring(out, labels, lambda: (torch.zeros(len(dense)),)).hardness


@pytest.mark.parametrize("levels", [0, 3])
def test_scores_of_classes(levels: int) -> None:
    n, c = 17, 5
    dense, labels = torch.randn(n, c), torch.randint(c, (n,))
    pruned = torch.randn(levels, n, c) if levels else torch.randn(n, c)
    each = pruned if levels else pruned[None]

    def mean(of_level: Any) -> np.ndarray:
        return np.mean([np.asarray(of_level(q)) for q in each], 0)

    def js(q: Tensor) -> Tensor:
        p, q = dense.softmax(1), q.softmax(1)
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2

    expected = {
        "margin_pruned": mean(lambda q: -margin(q, labels)),
        "margin_dense": -margin(dense, labels).numpy(),
        "loss_pruned": mean(lambda q: functional.cross_entropy(q, labels, reduction="none")),
        "loss_dense": functional.cross_entropy(dense, labels, reduction="none").numpy(),
        "js": mean(js),
        "flip": mean(lambda q: (q.argmax(1) != dense.argmax(1)).float()),
        "spearman": mean(
            lambda q: [1 - spearmanr(a, b).statistic for a, b in zip(dense, q, strict=True)]
        ),
    }
    expected["damage"] = expected["loss_pruned"] - expected["loss_dense"]
    for name, value in expected.items():
        found = scored(name, "multiclass", dense, pruned, labels)
        np.testing.assert_allclose(found, value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_what_is_not_known_is_nan_and_the_rest_is_not() -> None:
    dense, pruned = torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([0, -1, 2, 4, 3, 1])
    dense[4, 0] = torch.nan
    assert np.isnan(scored("margin_pruned", "multiclass", dense, pruned, labels)).nonzero()[
        0
    ].tolist() == [1, 3, 4]
    for name in ("js", "flip", "random"):
        found = scored(name, "multiclass", dense, pruned, labels)
        assert np.isnan(found).nonzero()[0].tolist() == [4], name
    labels = torch.randint(2, (6, 4)).float()
    labels[1], labels[2, 3], labels[3, 0] = torch.nan, torch.nan, 7
    found = scored("loss_pruned", "multilabel", dense, pruned, labels)
    assert np.isnan(found).nonzero()[0].tolist() == [1, 4]


def test_margin_of_several_labels_is_that_of_the_class_least_spoken_for() -> None:
    dense = torch.randn(8, 5)
    labels = torch.randint(2, (8, 5)).float()
    labels[0, 2], labels[3] = torch.nan, torch.nan
    scoring = Scoring("js", "multilabel", is_ladder=False, labelled=True, output=None)
    pruned = torch.randn(8, 5)
    doubts = scoring(DualOutput(dense, pruned, None), labels, lambda: ()).doubts
    for name, logits in (("margin", dense), ("margin_pruned", pruned)):
        for i, found in enumerate(-doubts[name]):
            known = [
                float(logits[i, c] if labels[i, c] == 1 else -logits[i, c])
                for c in range(5)
                if not labels[i, c].isnan()
            ]
            assert found == pytest.approx(min(known)) if known else np.isnan(found)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("channels", [False, True])
def test_loss_of_a_segmentation(classes: int, channels: bool) -> None:
    logits = torch.randn(4, classes, 6, 5, dtype=torch.float64).float()
    index = torch.randint(max(classes, 2), (4, 6, 5))
    index[2] = 0  # no foreground
    index[1, :2] = -1
    index[3] = -1
    found = segmentation_loss(logits, index[:, None] if channels and classes == 1 else index)
    for i in range(3):
        known = index[i] >= 0
        t = index[i][known]
        z = logits[i][:, known].double()  # [C, P]
        if classes == 1:
            entropy = functional.binary_cross_entropy_with_logits(z[0], t.double())
            p, hot = z.sigmoid(), t[None].double()
        else:
            entropy = functional.cross_entropy(z.T, t)
            p, hot = z.softmax(0)[1:], functional.one_hot(t, classes).T[1:].double()
        dice = (2 * (p * hot).sum() + 1) / (p.sum() + hot.sum() + 1)
        assert found[i].item() == pytest.approx((entropy + 1 - dice).item(), rel=1e-4)
    assert found[3].isnan()
    if classes == 3 and channels:
        hot = functional.one_hot(index.clamp(min=0), 3).permute(0, 3, 1, 2).float()
        hot = torch.where((index < 0)[:, None], torch.nan, hot)
        np.testing.assert_allclose(segmentation_loss(logits, hot), found, rtol=1e-5)
    with pytest.raises(FastpieError, match="masks of shape"):
        segmentation_loss(logits, index[:, 1:])


def test_scores_of_segmentations() -> None:
    dense, pruned = torch.randn(3, 1, 8, 8), torch.randn(2, 3, 1, 8, 8)
    masks = torch.randint(2, (3, 8, 8))
    p, q = dense > 0, pruned > 0
    iou = (p & q).flatten(2).sum(2) / (p | q).flatten(2).sum(2)
    found = scored("iou", "segmentation", dense, pruned, None)
    np.testing.assert_allclose(found, 1 - iou.mean(0), rtol=1e-6)
    p, q = dense.sigmoid(), pruned.sigmoid()
    soft = torch.minimum(p, q).flatten(2).sum(2) / torch.maximum(p, q).flatten(2).sum(2)
    found = scored("iou_soft", "segmentation", dense, pruned, masks)
    np.testing.assert_allclose(found, 1 - soft.mean(0), rtol=1e-4)
    found = scored("loss_pruned", "segmentation", dense, pruned, masks)
    both = [segmentation_loss(level, masks) for level in pruned]
    np.testing.assert_allclose(found, (both[0] + both[1]) / 2, rtol=1e-5)
    damage = scored("damage", "segmentation", dense, pruned, masks)
    np.testing.assert_allclose(damage, found - segmentation_loss(dense, masks).numpy(), atol=1e-5)


def test_functions_get_outputs_labels_and_images() -> None:
    dense, pruned, labels = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
    given: list[Any] = []

    def two(out: DualOutput, labels: Tensor) -> Tensor:
        given.append((out, labels))
        return (out.dense - out.pruned).norm(dim=1)

    def three(out: DualOutput, labels: Tensor, images: Tensor) -> list[float]:
        given.append(images)
        return [float(x) for x in labels]

    found = scored(two, "embedding", dense, pruned, labels)
    np.testing.assert_allclose(found, (dense - pruned).norm(dim=1), rtol=1e-6)
    assert given[0][0].dense is dense
    assert given[0][1] is labels
    assert scored(three, "multiclass", dense, pruned, labels).tolist() == [0, 1, 2, 3]
    assert given[1].shape == (4,)
    with pytest.raises(FastpieError, match=r"one number a sample, \[n\], but got shape \[4, 3\]"):
        scored(lambda out, labels: out.dense, "multiclass", dense, pruned, labels)


def test_what_there_is_not_is_refused() -> None:
    dense = torch.randn(4, 3)
    for score, task, labels, message in (
        ("hardness", "multiclass", None, "`score` to be one of"),
        ("js", "regression", None, "`task` to be one of"),
        ("loss_pruned", "multiclass", None, "with labels for the score 'loss_pruned'"),
        ("js", "segmentation", None, "`score` to be one of"),
        ("js", "multiclass", torch.zeros(4, 3), r"multiclass labels of shape \[4\]"),
        ("js", "multilabel", torch.zeros(4), r"multilabel labels of shape \[4, 3\]"),
        ("js", "multiclass", ["a"] * 4, "labels that collate to a tensor"),
    ):
        with pytest.raises(FastpieError, match=message):
            scored(score, task, dense, dense, labels)
    with pytest.raises(FastpieError, match=r"\[N, C, H, ...\]"):
        scored("iou", "segmentation", dense, dense, None)
