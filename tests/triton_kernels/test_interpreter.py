"""The Triton kernels under Triton's interpreter, on the CPU, against the fp64 twins.

TRITON_INTERPRET is read when a kernel is defined, so these run in a process of their own:
`TRITON_INTERPRET=1 pytest -m triton_interpreter`.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

from fastpie.ops.disagreement import SCORES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

import embedding_cases
import segmentation_cases
import top_k_cases
from disagreement_cases import KINDS, assert_close_to_twin, labels_of, logits
from fastpie import triton_kernels

pytestmark = [
    pytest.mark.triton_interpreter,
    # NumPy warns about the branches that tl.where computes and drops; a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def _check(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:  # [11, L, N]
    scores = triton_kernels.disagreement(dense, pruned, labels, task)
    assert scores.dtype is torch.float32
    assert scores.shape == (11, *pruned.shape[:2])
    assert_close_to_twin(scores, dense, pruned, labels, task)
    return scores


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 3, 20])
def test_few_classes(classes: int, kind: str, task: str) -> None:
    dense, pruned = logits(kind, 2, 9, classes, torch.float32)
    _check(dense, pruned, labels_of(task, 9, classes), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize(
    ("classes", "rows", "levels", "kind"),
    [
        (127, 2, 1, "plain"),
        (130, 2, 1, "ties"),
        (130, 3, 1, "special"),
        (512, 1, 1, "plain"),  # the largest row that is kept in registers
        (1000, 1, 1, "ties"),
    ],
)
def test_many_classes(classes: int, rows: int, levels: int, kind: str, task: str) -> None:
    dense, pruned = logits(kind, levels, rows, classes, torch.float32)
    _check(dense, pruned, labels_of(task, rows, classes), task)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 16 classes take the kernel for many: the interpreter is slow."""
    module = importlib.import_module("fastpie.triton_kernels.disagreement")
    monkeypatch.setattr(module, "TILE_CLASSES", 16)
    monkeypatch.setattr(module, "CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize(
    ("classes", "levels", "kind"), [*((33, 1, kind) for kind in KINDS), (17, 2, "plain")]
)
def test_chunks(classes: int, levels: int, kind: str, task: str) -> None:
    dense, pruned = logits(kind, levels, 2, classes, torch.float32)
    _check(dense, pruned, labels_of(task, 2, classes), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["plain", "ties", "largest", "special"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, kind: str, task: str) -> None:
    dense, pruned = logits(kind, 2, 5, 14, dtype)
    _check(dense, pruned, labels_of(task, 5, 14), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [1, 14, 20])
def test_withoutlabels_of(classes: int, task: str) -> None:
    dense, pruned = logits("plain", 2, 3, classes, torch.float32)
    scores = _check(dense, pruned, None, task)
    assert scores[8:].isnan().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [2, 14, 20])
def test_identical_rows_disagree_by_exactly_nothing(classes: int, task: str) -> None:
    dense, pruned = logits("identical", 2, 3, classes, torch.float32)
    labels = torch.zeros(3, dtype=torch.int64) if task == "multiclass" else torch.ones(3, classes)
    scores = dict(zip(SCORES, _check(dense, pruned, labels, task), strict=True))
    for name in ("js", "kl", "kl_reverse", "flip", "drift", "damage"):
        assert (scores[name] == 0).all(), name
    assert (scores["spearman"] == 1).all()


def test_a_ladder_of_many_levels() -> None:
    dense, pruned = logits("plain", 10, 7, 5, torch.float32)
    _check(dense, pruned, labels_of("multiclass", 7, 5), "multiclass")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [5, 20])
def test_strided_inputs(classes: int) -> None:
    dense, pruned = logits("plain", 2, 3, classes + 4, torch.float32)
    labels = labels_of("multiclass", 3, classes)
    _check(dense[:, 2 : 2 + classes], pruned[:, :, 1 : 1 + classes], labels, "multiclass")
    _check(dense[:, :classes].t().contiguous().t(), pruned[..., :classes], labels, "multiclass")
    expanded = dense[:1, :classes].expand(3, classes)
    _check(expanded, expanded.expand(2, 3, classes), labels, "multiclass")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 700)])
def test_empty(shape: tuple[int, int, int]) -> None:
    levels, rows, classes = shape
    scores = triton_kernels.disagreement(
        torch.empty(rows, classes), torch.empty(levels, rows, classes), None, "multiclass"
    )
    assert scores.shape == (11, levels, rows)


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 13), (1025,)])
def test_null(shape: tuple[int, ...]) -> None:
    input = torch.randn(shape)
    output = triton_kernels.null(input)
    assert output.data_ptr() != input.data_ptr() or input.numel() == 0
    torch.testing.assert_close(output, input, rtol=0, atol=0)


@pytest.mark.parametrize("kind", segmentation_cases.KINDS)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_segmentation_disagreement(classes: int, kind: str) -> None:
    dense, pruned = segmentation_cases.logits(kind, 2, 2, classes, (11, 13), torch.float32)
    scores = triton_kernels.segmentation_disagreement(dense, pruned)
    segmentation_cases.assert_close_to_twin(scores, dense, pruned)
    if kind == "identical":
        assert (scores == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(0,), (1024,), (1025,), (40, 41), (5, 4, 3)])
def test_segmentation_disagreement_of_sizes_and_strides(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense, pruned = segmentation_cases.logits("plain", 2, 2, 3, size, dtype)
    turned = pruned.movedim(2, -1).contiguous().movedim(-1, 2)
    scores = triton_kernels.segmentation_disagreement(dense, turned)
    segmentation_cases.assert_close_to_twin(scores, dense, pruned)


@pytest.mark.parametrize("kind", embedding_cases.KINDS)
@pytest.mark.parametrize("size", [1, 33, 1100])
def test_embedding_disagreement(size: int, kind: str) -> None:
    dense, pruned = embedding_cases.embeddings(kind, 2, 3, size, torch.float32)
    drift = triton_kernels.embedding_disagreement(dense, pruned)
    embedding_cases.assert_close_to_twin(drift, dense, pruned)
    if kind == "identical":
        assert not drift.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_disagreement_of_strided_rows(dtype: torch.dtype) -> None:
    dense, pruned = embedding_cases.embeddings("plain", 2, 3, 40, dtype)
    dense, pruned = dense.t().contiguous().t(), pruned[..., ::2].repeat(1, 1, 2)[..., 1:]
    dense = dense[:, 1:]
    drift = triton_kernels.embedding_disagreement(dense, pruned)
    embedding_cases.assert_close_to_twin(drift, dense, pruned)


@pytest.mark.parametrize(("levels", "count", "size"), [(0, 2, 4), (2, 0, 4), (2, 3, 0)])
def test_scores_of_nothing(levels: int, count: int, size: int) -> None:
    drift = triton_kernels.embedding_disagreement(
        torch.zeros(count, size), torch.zeros(levels, count, size)
    )
    assert torch.equal(drift, torch.zeros(levels, count))
    scores = triton_kernels.segmentation_disagreement(
        torch.zeros(count, 2, size), torch.zeros(levels, count, 2, size)
    )
    assert torch.equal(scores, torch.ones(2, levels, count))


@pytest.mark.parametrize("kind", top_k_cases.KINDS)
@pytest.mark.parametrize("k", [1, 70, 600])
def test_top_k_of_a_stream(k: int, kind: str) -> None:
    scores = top_k_cases.scores_of(kind, 1, 700)
    top_k_cases.check_stream(triton_kernels.top_k_update, k, scores, None, [100, 228, 300])


@pytest.mark.parametrize("kind", ["shuffled", "repeated", "extreme"])
@pytest.mark.parametrize("k", [40, 4096])
def test_top_k_of_many_ids(k: int, kind: str) -> None:
    scores, ids = top_k_cases.scores_of("ties", 3, 300), top_k_cases.ids_of(kind, 300)
    top_k_cases.check_stream(triton_kernels.top_k_update, k, scores, ids, [130])


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("k", [1, 65, 1000])
def test_top_k_against_the_twin(k: int, n: int) -> None:
    for kind in ("ties", "special"):
        spaced = torch.empty(2, 2 * n)[:, ::2].copy_(top_k_cases.scores_of(kind, 2, n))
        top_k_cases.check_against_twin(triton_kernels.top_k_update, k, spaced, None)
