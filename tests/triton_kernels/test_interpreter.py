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

from fastpie.ops import reference
from fastpie.ops.disagreement import SCORES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from fastpie import triton_kernels

pytestmark = [
    pytest.mark.triton_interpreter,
    # NumPy warns about the branches that tl.where computes and drops; a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

KINDS = [
    "plain",
    "near",
    "identical",
    "ties",
    "constant",
    "1e4",
    "tiny",
    "largest",
    "special",
    "-inf",
]


def _logits(
    kind: str, levels: int, rows: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [N, C], [L, N, C]
    """Fresh random logits of one kind; the levels lie ever further from the dense model."""
    distance = torch.logspace(-2, 0.5, levels)[:, None, None]
    dense = 3 * torch.randn(rows, classes)
    pruned = dense + distance * torch.randn(levels, rows, classes)
    if kind == "near":
        pruned = dense + 1e-3 * torch.randn(levels, rows, classes)
    elif kind == "identical":
        pruned = dense.expand(levels, rows, classes).clone()
    elif kind == "ties":
        dense, pruned = dense.round(), pruned.round()
        pruned = torch.where(pruned == 0, -0.0, pruned)
    elif kind == "constant":
        dense = dense[:, :1].expand(rows, classes).clone()
    elif kind == "1e4":
        dense, pruned = 1e4 * dense, 1e4 * pruned
    elif kind == "tiny":
        dense, pruned = 1e-20 * dense, 1e-13 * pruned
    elif kind == "largest":
        # Not the largest float itself: a KL that rounds to it may as well round to infinity.
        values = torch.finfo(dtype).max * torch.tensor([0.97, -0.91, 0.62, -0.23, 0.0, 1e-38])
        dense = values[torch.randint(0, len(values), (rows, classes))]
        pruned = values[torch.randint(0, len(values), (levels, rows, classes))]
    elif kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for logits in (dense, pruned):
            hit = torch.rand(logits.shape) < 0.5 / classes
            logits[hit] = values[torch.randint(0, 3, (int(hit.sum()),))]
    elif kind == "-inf":
        for logits in (dense, pruned):
            logits[torch.rand(logits.shape) < 0.3] = -torch.inf
    return dense.to(dtype), pruned.to(dtype)


def _labels(task: str, rows: int, classes: int) -> Tensor:
    """Labels of which a fifth is wrong (multiclass) or unknown (multilabel)."""
    hit = torch.rand(rows) < 0.2
    if task == "multiclass":
        wrong = torch.tensor([-1, classes, -(2**63), 2**62])[torch.randint(0, 4, (rows,))]
        return torch.where(hit, wrong, torch.randint(0, classes, (rows,)))
    targets = (torch.rand(rows, classes) < 0.3).float()
    targets[torch.rand(rows, classes) < 0.2] = torch.nan
    targets[hit] = torch.tensor([torch.nan, 0.0, 1.0])[torch.randint(0, 3, (rows,))][hit, None]
    return targets


def _assert_close(
    scores: Tensor,  # [11, L, N]
    dense: Tensor,
    pruned: Tensor,
    labels: Tensor | None,
    task: str,
) -> None:
    """Against the fp64 twin: the same NaN and infinities, and fp32 accuracy elsewhere."""
    if labels is not None and task == "multilabel":
        labels = labels.double()
    expected = reference.disagreement(dense.double(), pruned.double(), labels, task).float()
    torch.testing.assert_close(scores.isnan(), expected.isnan(), rtol=0, atol=0)
    # (relative, absolute): KL and JS are sums of non-negative terms, and so accurate also where
    # tiny; the margins are exact; drift and damage are differences of rounded numbers.
    tolerance = dict.fromkeys(SCORES, (1e-5, 1e-6))
    tolerance |= dict.fromkeys(("js", "kl", "kl_reverse"), (2e-4, 1e-11))
    tolerance |= dict.fromkeys(("flip", "margin_dense", "margin_pruned"), (0.0, 0.0))
    losses = torch.cat([expected[8:10], torch.ones_like(expected[:1])]).nan_to_num(0, 0, 0)
    tolerance["damage"] = (1e-5, 1e-6 * float(losses.max()))
    for name, got, wanted in zip(SCORES, scores, expected, strict=True):
        relative, absolute = tolerance[name]
        torch.testing.assert_close(
            got,
            wanted,
            rtol=relative,
            atol=absolute,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def _check(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:  # [11, L, N]
    scores = triton_kernels.disagreement(dense, pruned, labels, task)
    assert scores.dtype is torch.float32
    assert scores.shape == (11, *pruned.shape[:2])
    _assert_close(scores, dense, pruned, labels, task)
    return scores


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 3, 20])
def test_few_classes(classes: int, kind: str, task: str) -> None:
    dense, pruned = _logits(kind, 2, 9, classes, torch.float32)
    _check(dense, pruned, _labels(task, 9, classes), task)


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
    dense, pruned = _logits(kind, levels, rows, classes, torch.float32)
    _check(dense, pruned, _labels(task, rows, classes), task)


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
    dense, pruned = _logits(kind, levels, 2, classes, torch.float32)
    _check(dense, pruned, _labels(task, 2, classes), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["plain", "ties", "largest", "special"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, kind: str, task: str) -> None:
    dense, pruned = _logits(kind, 2, 5, 14, dtype)
    _check(dense, pruned, _labels(task, 5, 14), task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [1, 14, 20])
def test_without_labels(classes: int, task: str) -> None:
    dense, pruned = _logits("plain", 2, 3, classes, torch.float32)
    scores = _check(dense, pruned, None, task)
    assert scores[8:].isnan().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [2, 14, 20])
def test_identical_rows_disagree_by_exactly_nothing(classes: int, task: str) -> None:
    dense, pruned = _logits("identical", 2, 3, classes, torch.float32)
    labels = torch.zeros(3, dtype=torch.int64) if task == "multiclass" else torch.ones(3, classes)
    scores = dict(zip(SCORES, _check(dense, pruned, labels, task), strict=True))
    for name in ("js", "kl", "kl_reverse", "flip", "drift", "damage"):
        assert (scores[name] == 0).all(), name
    assert (scores["spearman"] == 1).all()


def test_a_ladder_of_many_levels() -> None:
    dense, pruned = _logits("plain", 10, 7, 5, torch.float32)
    _check(dense, pruned, _labels("multiclass", 7, 5), "multiclass")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("classes", [5, 20])
def test_strided_inputs(classes: int) -> None:
    dense, pruned = _logits("plain", 2, 3, classes + 4, torch.float32)
    labels = _labels("multiclass", 3, classes)
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
