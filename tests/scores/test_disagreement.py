"""`fastpie.disagreement`: names, shapes, what it refuses; segmentation and embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpie
from fastpie import FastpieError
from fastpie.ops.disagreement import SCORES

ALWAYS = {
    *("js", "kl", "kl_reverse", "spearman", "flip", "margin_dense", "margin_pruned", "drift"),
}
WITH_LABELS = {"loss_dense", "loss_pruned", "damage"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_keys_shapes_and_dtypes(task: str, levels: int | None, dtype: torch.dtype) -> None:
    dense = torch.randn(6, 4).to(dtype)
    pruned = torch.randn(*([] if levels is None else [levels]), 6, 4).to(dtype)
    labels = torch.arange(6) % 4 if task == "multiclass" else torch.ones(6, 4)
    shape = (6,) if levels is None else (levels, 6)
    for given, names in ((None, ALWAYS), (labels, ALWAYS | WITH_LABELS)):
        got = fastpie.disagreement(dense, pruned, given, task)
        assert set(got) == names
        for name, score in got.items():
            assert score.shape == shape, name
            wanted = torch.float64 if dtype is torch.float64 else torch.float32
            assert score.dtype is (torch.bool if name == "flip" else wanted), name


def test_ladder_scores_are_those_of_each_level_alone() -> None:
    dense, pruned, labels = torch.randn(9, 5), torch.randn(3, 9, 5), torch.arange(9) % 5
    together = fastpie.disagreement(dense, pruned, labels)
    for level in range(3):
        alone = fastpie.disagreement(dense, pruned[level], labels)
        for name in alone:
            assert torch.equal(alone[name], together[name][level]), name


def test_values_are_those_of_the_operator_by_name() -> None:
    dense, pruned, labels = torch.randn(9, 5), torch.randn(2, 9, 5), torch.arange(9) % 5
    packed = fastpie.ops.disagreement(dense, pruned, labels)
    got = fastpie.disagreement(dense, pruned, labels)
    for name, want in zip(SCORES, packed, strict=True):
        assert torch.equal(got[name], want > 0 if name == "flip" else want), name


def test_flip_is_false_and_the_rest_nan_on_a_nan_row() -> None:
    dense, pruned = torch.randn(3, 4), torch.randn(3, 4)
    dense[1, 0] = torch.nan
    got = fastpie.disagreement(dense, pruned, torch.tensor([0, 1, 2]))
    assert not got.pop("flip")[1]
    assert all(score[1].isnan() and score[[0, 2]].isfinite().all() for score in got.values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_labels_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    dense, pruned, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    want = fastpie.disagreement(dense, pruned, labels)["loss_pruned"]
    got = fastpie.disagreement(dense, pruned, labels.to(dtype))["loss_pruned"]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64]
)
def test_targets_of_any_real_type_are_taken(dtype: torch.dtype) -> None:
    dense, pruned = torch.randn(4, 3), torch.randn(4, 3)
    targets = torch.randint(0, 2, (4, 3))
    want = fastpie.disagreement(dense, pruned, targets.float(), "multilabel")["damage"]
    got = fastpie.disagreement(dense, pruned, targets.to(dtype), "multilabel")["damage"]
    assert torch.equal(got, want)


Z = torch.zeros(2, 3)
IMAGE = torch.zeros(2, 3, 4, 4)
REFUSED = {
    "unknown_task": ((Z, Z, None, "regression"), "task.*regression"),
    "dense_of_one_dimension": ((Z[0], Z[0]), r"\[N, C\].*\[3\]"),
    "dense_of_three_dimensions": ((IMAGE[0], IMAGE[0]), r"\[N, C\]"),
    "no_classes": ((Z[:, :0], Z[:, :0]), "C >= 1"),
    "pruned_of_other_rows": ((Z, torch.zeros(3, 3)), r"\[3, 3\]"),
    "pruned_of_other_classes": ((Z, torch.zeros(2, 4)), r"\[2, 4\]"),
    "ladder_of_other_rows": ((Z, torch.zeros(5, 3, 3)), r"\[5, 3, 3\]"),
    "two_level_dimensions": ((Z, torch.zeros(1, 1, 2, 3)), r"\[1, 1, 2, 3\]"),
    "mixed_dtypes": ((Z, Z.double()), "float64"),
    "integer_outputs": ((Z.long(), Z.long()), "int64"),
    "complex_outputs": ((Z.cfloat(), Z.cfloat()), "complex64"),
    "mixed_devices": ((Z, Z.to("meta")), "device"),
    "labels_of_other_rows": ((Z, Z, torch.zeros(3, dtype=torch.int64)), r"\[2\].*\[3\]"),
    "one_hot_class_labels": ((Z, Z, torch.zeros(2, 3, dtype=torch.int64)), r"\[2\].*\[2, 3\]"),
    "float_class_labels": ((Z, Z, torch.zeros(2)), "integers.*float32"),
    "bool_class_labels": ((Z, Z, torch.zeros(2, dtype=torch.bool)), "integers.*bool"),
    "label_too_large": ((Z, Z, torch.tensor([0, 3])), r"\[0, 3\).*3 in row 1"),
    "label_negative": ((Z, Z, torch.tensor([-1, 0])), r"-1 in row 0"),
    "class_labels_as_targets": ((Z, Z, torch.tensor([0, 1]), "multilabel"), r"\[2, 3\].*\[2\]"),
    "targets_of_other_values": (
        (Z, Z, torch.full((2, 3), 0.5), "multilabel"),
        r"0, 1 or NaN.*0\.5",
    ),
    "infinite_targets": ((Z, Z, torch.full((2, 3), torch.inf), "multilabel"), "0, 1 or NaN"),
    "list_for_labels": ((Z, Z, [0, 1]), "labels"),
    "array_for_outputs": ((Z.numpy(), Z), "dense"),
    "segmentation_of_vectors": ((Z, Z, None, "segmentation"), r"\[N, C, H, \.\.\.\]"),
    "segmentation_of_integers": ((IMAGE.long(), IMAGE.long(), None, "segmentation"), "int64"),
    "segmentation_of_mixed_dtypes": ((IMAGE, IMAGE.double(), None, "segmentation"), "float64"),
    "embedding_of_images": ((IMAGE, IMAGE, None, "embedding"), r"\[N, C\]"),
    "embedding_of_mixed_dtypes": ((Z, Z.half(), None, "embedding"), "float16"),
    "embedding_of_integers": ((Z.long(), Z.long(), None, "embedding"), "int64"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        fastpie.disagreement(*arguments)


def test_scores_are_differentiable_through_the_public_function() -> None:
    dense, pruned = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    scores = fastpie.disagreement(dense, pruned, torch.tensor([0, 1, 2]))
    (scores["js"] + scores["loss_pruned"]).sum().backward()
    p, q = dense.double().softmax(-1), pruned.detach().double().requires_grad_()
    log_q = q.log_softmax(-1)
    log_m = ((p + log_q.exp()) / 2).log()
    js = (p * (p.log() - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
    (js - log_q[[0, 1, 2], [0, 1, 2]]).sum().backward()
    torch.testing.assert_close(pruned.grad.double(), q.grad, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- segmentation


def logits_of(classes: Tensor, count: int) -> Tensor:
    """[N, ...] class maps to [N, C, ...] logits that predict them with near certainty."""
    return torch.nn.functional.one_hot(classes, count).movedim(-1, 1).float() * 50


def test_hard_iou_counts_the_foreground_pixels_of_each_image() -> None:
    dense = torch.tensor([[[1, 1], [2, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]])
    pruned = torch.tensor([[[1, 2], [2, 0]], [[0, 0], [0, 0]], [[2, 2], [2, 2]]])
    got = fastpie.disagreement(logits_of(dense, 3), logits_of(pruned, 3), task="segmentation")
    # Image 0: pixels (0,0) and (1,0) agree; class 1 covers {0,1} and {0}, class 2 {2} and {1,2}.
    torch.testing.assert_close(got["iou"], torch.tensor([2 / 4, 1.0, 0.0]))
    torch.testing.assert_close(got["iou_soft"], torch.tensor([2 / 4, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_one_class_is_foreground_at_probability_one_half() -> None:
    dense = torch.tensor([[[[3.0, -1.0], [0.5, -2.0]]]])
    pruned = torch.tensor([[[[2.0, 1.0], [-0.5, -2.0]]]])
    got = fastpie.disagreement(dense, pruned, task="segmentation")
    p, q = dense.sigmoid(), pruned.sigmoid()
    assert got["iou"].item() == pytest.approx(1 / 3)
    soft = torch.minimum(p, q).sum() / torch.maximum(p, q).sum()
    assert got["iou_soft"].item() == pytest.approx(soft.item())


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("size", [(7,), (6, 5), (4, 3, 5)])
def test_identical_segmentations_agree_exactly(size: tuple[int, ...], classes: int) -> None:
    logits = torch.randn(3, classes, *size)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        got = fastpie.disagreement(logits.to(dtype), logits.to(dtype), task="segmentation")
        assert set(got) == {"iou", "iou_soft"}
        for score in got.values():
            assert torch.equal(score, torch.ones(3, dtype=score.dtype))
            assert score.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_segmentation_on_a_ladder_is_that_of_each_level() -> None:
    dense, pruned = torch.randn(4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    together = fastpie.disagreement(dense, pruned, task="segmentation")
    for level in range(2):
        alone = fastpie.disagreement(dense, pruned[level], task="segmentation")
        for name in ("iou", "iou_soft"):
            assert together[name].shape == (2, 4)
            assert torch.equal(together[name][level], alone[name])
            assert ((alone[name] >= 0) & (alone[name] <= 1)).all()


def test_nan_pixel_spoils_its_own_image_only() -> None:
    dense, pruned = torch.randn(3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    dense[0, 1, 2, 3] = torch.nan
    pruned[1, 2, 0, 0, 0] = torch.inf
    for score in fastpie.disagreement(dense, pruned, task="segmentation").values():
        assert score.isnan().tolist() == [[True, False, False], [True, False, True]]


# ---------------------------------------------------------------------------- embeddings


def test_embedding_drift_is_the_distance_of_directions() -> None:
    dense = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    pruned = torch.tensor([[0.0, 3.0], [5.0, 5.0], [-1.0, 0.0]])
    got = fastpie.disagreement(dense, pruned, task="embedding")
    assert set(got) == {"drift"}
    torch.testing.assert_close(got["drift"], torch.tensor([math.sqrt(2), 0.0, 2.0]))


def test_embedding_drift_of_identical_rows_is_exactly_zero_and_nan_stays_in_its_row() -> None:
    dense = torch.randn(5, 33)
    dense[0], dense[3, 2] = 0, torch.nan
    drift = fastpie.disagreement(dense, dense.expand(2, 5, 33), task="embedding")["drift"]
    assert drift.shape == (2, 5)
    assert drift.isnan().tolist() == [[False, False, False, True, False]] * 2
    assert not drift.nan_to_num().any()


def test_empty_batches_give_empty_scores() -> None:
    assert fastpie.disagreement(Z[:0], Z[:0])["js"].shape == (0,)
    empty = torch.zeros(0, 3, 4, 4)
    assert fastpie.disagreement(empty, empty, task="segmentation")["iou"].shape == (0,)
    assert fastpie.disagreement(Z[:0], Z[:0], task="embedding")["drift"].shape == (0,)
