"""The CUDA and the Triton kernel on a GPU, each against the fp64 twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpie.ops
from disagreement_cases import KINDS, assert_close_to_twin, labels_of, logits
from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.disagreement import SCORES, _kernel_arguments

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SENTINEL = -12345.0
Kernel = Callable[[Tensor, Tensor, "Tensor | None", str], Tensor]


def _cuda(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:
    """The CUDA kernel on a poisoned output."""
    if (reason := _native.cuda_unusable_reason()) is not None:
        pytest.skip(reason)
    out, arguments, _alive = _kernel_arguments(dense, pruned, labels, task)
    out.fill_(SENTINEL)
    _native.call(_C.disagreement_cuda, *arguments, _native.cuda_stream(dense))
    assert (out != SENTINEL).all(), "not every element was written"
    return out


def _triton(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return _native.triton_kernels().disagreement(dense, pruned, labels, task)


@pytest.fixture(params=[_cuda, _triton], ids=["cuda", "triton"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def _check(
    kernel: Kernel, dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str
) -> Tensor:  # [11, L, N]
    dense, pruned = dense.cuda(), pruned.cuda()
    labels = None if labels is None else labels.cuda()
    scores = kernel(dense, pruned, labels, task)
    assert scores.shape == (11, *pruned.shape[:2])
    assert_close_to_twin(scores, dense, pruned, labels, task)
    return scores


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", KINDS)
# Each size of group, a little below, at and above its limit, then the blocks.
@pytest.mark.parametrize(
    "classes", [1, 2, 3, 8, 9, 17, 20, 25, 33, 64, 65, 127, 128, 129, 257, 1000]
)
def test_kinds(kernel: Kernel, classes: int, kind: str, task: str) -> None:
    dense, pruned = logits(kind, 3, 37, classes, torch.float32)
    _check(kernel, dense, pruned, labels_of(task, 37, classes), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["plain", "ties", "largest", "special"])
@pytest.mark.parametrize("classes", [14, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    kernel: Kernel, dtype: torch.dtype, classes: int, kind: str, task: str
) -> None:
    dense, pruned = logits(kind, 2, 65, classes, dtype)
    _check(kernel, dense, pruned, labels_of(task, 65, classes), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["plain", "ties", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10_000, 16_384, 16_385])
def test_large_classes(
    kernel: Kernel, classes: int, dtype: torch.dtype, kind: str, task: str
) -> None:
    dense, pruned = logits(kind, 2, 5, classes, dtype)
    labels = labels_of(task, 5, classes)
    if kernel is _cuda and classes > _C.cuda_max_classes:
        with pytest.raises(FastpieError, match="16384 classes"):
            _check(kernel, dense, pruned, labels, task)
        return
    _check(kernel, dense, pruned, labels, task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("classes", [1, 20, 600])
def test_withoutlabels_of(kernel: Kernel, classes: int, task: str) -> None:
    dense, pruned = logits("plain", 2, 33, classes, torch.float32)
    assert _check(kernel, dense, pruned, None, task)[8:].isnan().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("classes", [2, 20, 100, 1000])
def test_identical_rows_disagree_by_exactly_nothing(
    kernel: Kernel, classes: int, task: str
) -> None:
    dense, pruned = logits("identical", 3, 129, classes, torch.float32)
    zeros = torch.zeros(129, dtype=torch.int64)
    labels = zeros if task == "multiclass" else torch.ones(129, classes)
    scores = dict(zip(SCORES, _check(kernel, dense, pruned, labels, task), strict=True))
    for name in ("js", "kl", "kl_reverse", "flip", "drift", "damage"):
        assert (scores[name] == 0).all(), name
    assert (scores["spearman"] == 1).all()


@pytest.mark.parametrize("classes", [3, 20, 200])
def test_more_rows_than_one_wave_of_blocks(kernel: Kernel, classes: int) -> None:
    rows = 70_001 if classes == 200 else 2_200_003  # the grid is capped at 65,535 blocks
    dense = torch.randn(rows, classes, device="cuda")
    pruned = dense + 0.3 * torch.randn(1, rows, classes, device="cuda")
    labels = torch.randint(0, classes, (rows,), device="cuda")
    scores = kernel(dense, pruned, labels, "multiclass")
    for part in (slice(0, 999), slice(rows - 999, rows)):
        assert_close_to_twin(
            scores[:, :, part], dense[part], pruned[:, part], labels[part], "multiclass"
        )
    assert not scores.isnan().any()


@pytest.mark.parametrize("classes", [5, 300])
def test_strided_inputs(kernel: Kernel, classes: int) -> None:
    dense, pruned = logits("plain", 2, 9, classes + 4, torch.bfloat16)
    labels = labels_of("multiclass", 9, classes)
    # Odd offsets: nothing may load more than one element at a time without looking.
    _check(
        kernel,
        dense.cuda()[:, 1 : 1 + classes],
        pruned.cuda()[:, :, 3 : 3 + classes],
        labels,
        "multiclass",
    )
    expanded = dense.cuda()[:1, :classes].expand(9, classes)
    _check(kernel, expanded, expanded.expand(2, 9, classes), labels, "multiclass")


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 700)])
def test_empty(kernel: Kernel, shape: tuple[int, int, int]) -> None:
    levels, rows, classes = shape
    dense = torch.empty(rows, classes, device="cuda")
    pruned = torch.empty(levels, rows, classes, device="cuda")
    assert kernel(dense, pruned, None, "multiclass").shape == (11, levels, rows)


@pytest.mark.parametrize("classes", [20, 1000])
def test_runs_on_the_current_stream(kernel: Kernel, classes: int) -> None:
    dense, pruned = (t.cuda() for t in logits("plain", 1, 512, classes, torch.float32))
    kernel(dense, pruned, None, "multiclass")  # compiled and loaded before the race begins
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream is early
        late = dense * 2
        scores = kernel(late, pruned, None, "multiclass")
    torch.cuda.current_stream().wait_stream(stream)
    assert_close_to_twin(scores, dense * 2, pruned, None, "multiclass")


@pytest.mark.parametrize("classes", [20, 1000])
def test_same_bits_every_time(kernel: Kernel, classes: int) -> None:
    dense, pruned = (t.cuda() for t in logits("ties", 2, 700, classes, torch.float32))
    labels = torch.randint(0, classes, (700,), device="cuda")
    first = kernel(dense, pruned, labels, "multiclass")
    for _ in range(20):
        again = kernel(dense, pruned, labels, "multiclass")
        torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor's advice on matmuls; there are none
def test_operator_under_torch_compile() -> None:
    dense, pruned = (t.cuda() for t in logits("plain", 2, 33, 20, torch.float32))
    labels = torch.randint(0, 20, (33,), device="cuda")

    @torch.compile(fullgraph=True)
    def hardness(dense: Tensor, pruned: Tensor, labels: Tensor) -> Tensor:
        return torch.ops.fastpie.disagreement(dense, pruned, labels, "multiclass") * 2

    expected = fastpie.ops.disagreement(dense, pruned, labels) * 2
    torch.testing.assert_close(hardness(dense, pruned, labels), expected, equal_nan=True)
