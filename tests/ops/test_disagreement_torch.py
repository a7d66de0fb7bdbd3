"""The operator `disagreement` inside torch: dispatch, gradients, compilation, threads, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastpie import _C, FastpieError, ops
from fastpie.ops.disagreement import SCORES

DIFFERENTIABLE = [i for i, name in enumerate(SCORES) if name not in ("spearman", "flip")]
UNSUPERVISED = [i for i in DIFFERENTIABLE if not SCORES[i].startswith(("loss", "damage"))]


def example(task: str, n: int = 4, classes: int = 5, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    dense, pruned = torch.randn(n, classes, **kwargs), torch.randn(2, n, classes, **kwargs)
    if task == "multiclass":
        return dense, pruned, torch.randint(0, classes, (n,))
    return dense, pruned, torch.randint(0, 2, (n, classes)).float()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("gradients", [False, True])
def test_operator_passes_torch_opcheck(gradients: bool, task: str) -> None:
    dense, pruned, labels = example(task)
    dense.requires_grad_(gradients)
    pruned.requires_grad_(gradients)
    # With labels and rows that are not constant no score is NaN, which opcheck cannot compare.
    arguments = (dense, pruned, labels, task)
    torch.library.opcheck(torch.ops.fastpie.disagreement.default, arguments)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("supervised", [False, True])
def test_gradients_are_the_numerical_ones(supervised: bool, task: str) -> None:
    dense, pruned, labels = example(task, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = DIFFERENTIABLE if supervised else UNSUPERVISED

    def function(d: Tensor, p: Tensor) -> Tensor:
        return ops.disagreement(d, p, labels if supervised else None, task)[rows]

    assert torch.autograd.gradcheck(function, (dense, pruned))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_kernel_are_those_of_plain_torch(dtype: torch.dtype, task: str) -> None:
    dense, pruned, _ = example(task, dtype=dtype, requires_grad=True)
    ops.disagreement(dense, pruned, None, task)[SCORES.index("kl")].sum().backward()
    assert dense.grad.dtype is dtype
    z, y = dense.detach().double().requires_grad_(), pruned.detach().double().requires_grad_()
    if task == "multiclass":
        log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        kl = sum(
            (
                torch.sigmoid(s * z)
                * (torch.log(torch.sigmoid(s * z)) - torch.log(torch.sigmoid(s * y)))
            ).mean(-1)
            for s in (1, -1)
        )
    kl.sum().backward()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(dense.grad.double(), z.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pruned.grad.double(), y.grad, rtol=tolerance, atol=tolerance)


def test_gradient_reaches_one_side_when_only_one_needs_it() -> None:
    dense, pruned, _ = example("multiclass")
    pruned.requires_grad_()
    ops.disagreement(dense, pruned)[0].sum().backward()
    assert dense.grad is None
    assert pruned.grad.abs().sum() > 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_nan_scores_of_missing_labels_leave_the_gradients_finite(task: str) -> None:
    dense, pruned, _ = example(task, requires_grad=True)
    score = ops.disagreement(dense, pruned, None, task)
    score.nansum().backward()
    assert dense.grad.isfinite().all()
    assert pruned.grad.isfinite().all()
    assert pruned.grad.abs().sum() > 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_constant_and_identical_rows_leave_the_gradients_finite(task: str) -> None:
    dense = torch.zeros(3, 4)
    dense[1] = torch.randn(4)
    pruned = dense.clone().unsqueeze(0).requires_grad_()
    dense.requires_grad_()
    ops.disagreement(dense, pruned, None, task)[0].sum().backward()
    assert dense.grad.isfinite().all()
    assert pruned.grad.isfinite().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_nan_row_leaves_the_gradients_of_other_rows_and_its_own_finite(task: str) -> None:
    dense, pruned, _ = example(task)
    dense[1, 2] = torch.nan
    pruned.requires_grad_()
    ops.disagreement(dense, pruned, None, task)[0].nansum().backward()
    assert pruned.grad[:, [0, 2, 3]].abs().sum() > 0
    assert pruned.grad.isfinite().all()
    assert not pruned.grad[:, 1].any()


def test_a_class_ruled_out_by_minus_infinity_gets_no_gradient_and_spoils_none() -> None:
    dense, pruned, _ = example("multiclass")
    want_dense, want_pruned = dense[:, :4].clone(), pruned[..., :4].clone()
    dense[:, 4], pruned[..., 4] = -torch.inf, -torch.inf
    for pair in ((dense, pruned), (want_dense, want_pruned)):
        for tensor in pair:
            tensor.requires_grad_()
        ops.disagreement(*pair)[0].sum().backward()
    torch.testing.assert_close(pruned.grad[..., :4], want_pruned.grad)
    torch.testing.assert_close(dense.grad[..., :4], want_dense.grad)
    assert not pruned.grad[..., 4].any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradients", [False, True])
def test_operator_compiles_into_one_graph(gradients: bool, backend: str) -> None:
    def function(dense: Tensor, pruned: Tensor, labels: Tensor) -> Tensor:
        return ops.disagreement(dense * 2, pruned, labels)[DIFFERENTIABLE].sum()

    results = []
    for compiled in (function, torch.compile(function, backend=backend, fullgraph=True)):
        torch.manual_seed(3)
        dense, pruned, labels = example("multiclass")
        dense.requires_grad_(gradients)
        value = compiled(dense, pruned, labels)
        if gradients:
            value.backward()
        results.append((value.detach(), dense.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    if gradients:
        torch.testing.assert_close(results[0][1], results[1][1])


def test_fake_tensors_take_the_shapes_and_dtypes_of_real_ones() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        dense, pruned, labels = example("multiclass", dtype=dtype)
        real = ops.disagreement(dense, pruned, labels)
        meta = ops.disagreement(dense.to("meta"), pruned.to("meta"), labels.to("meta"))
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.fixture
def hard_rows() -> Iterator[tuple[Tensor, Tensor]]:
    """1,003 rows (no multiple of a vector), ties, extremes, NaN and infinities among them."""
    dense, pruned = torch.randn(1003, 37) * 5, torch.randn(3, 1003, 37) * 5
    dense[::5], pruned[:, ::5] = dense[::5].round(), pruned[:, ::5].round()
    dense[::7], pruned[:, ::11] = dense[::7] * 1e30, pruned[:, ::11] * 300
    dense[13, 3], dense[14, 4], dense[15, 5] = torch.nan, torch.inf, -torch.inf
    pruned[:, 20:30] = dense[20:30]
    return dense, pruned


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("classes", [37, 150])
def test_same_bits_on_every_instruction_set_and_thread_count(
    classes: int,
    task: str,
    hard_rows: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    restore_threads: None,
) -> None:
    dense, pruned = (
        x.repeat(1, 5)[..., :classes].contiguous()
        if x.ndim == 2
        else x.repeat(1, 1, 5)[..., :classes].contiguous()
        for x in hard_rows
    )
    labels = (
        torch.arange(1003) % classes
        if task == "multiclass"
        else (torch.rand(1003, classes) > 0.5).float()
    )
    seen = {}
    for capability in _C.cpu_capabilities():
        monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
        assert _C.cpu_capability() == capability
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen[capability, threads] = ops.disagreement(dense, pruned, labels, task)
    first = seen["baseline", 1]
    for key, other in seen.items():
        # NaN may differ in sign and payload; every number may not.
        assert torch.equal(first.isnan(), other.isnan()), key
        assert torch.equal(
            first.nan_to_num(nan=0, posinf=7, neginf=-7).view(torch.int32),
            other.nan_to_num(nan=0, posinf=7, neginf=-7).view(torch.int32),
        ), key


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 100])
def test_a_row_scores_the_same_bits_whatever_rows_stand_beside_it(rows: int) -> None:
    dense, pruned, labels = example("multiclass", n=100, classes=23)
    whole = ops.disagreement(dense, pruned, labels)
    part = ops.disagreement(dense[-rows:], pruned[:, -rows:], labels[-rows:])
    assert torch.equal(whole[..., -rows:], part)


@pytest.mark.parametrize("value", ["sse9", "AVX512 ", "avx-512"])
def test_unknown_capability_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", value)
    with pytest.raises(FastpieError, match="FASTPIE_CPU_CAPABILITY"):
        ops.disagreement(torch.zeros(1, 2), torch.zeros(1, 1, 2))


def test_default_names_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", "default")
    assert _C.cpu_capability() == "baseline"


def test_capability_of_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"avx2", "avx512", "avx512_bf16"} - set(_C.cpu_capabilities())
    if not missing:
        pytest.skip("this processor has every instruction set that fastpie knows")
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", missing.pop())
    with pytest.raises(FastpieError, match="does not have"):
        ops.disagreement(torch.zeros(1, 2), torch.zeros(1, 1, 2))


Z, P = torch.zeros(2, 3), torch.zeros(1, 2, 3)
REFUSED = {
    "unknown_task": ((Z, P, None, "regression"), "task.*multiclass"),
    "dense_without_classes": ((torch.zeros(2, 0), torch.zeros(1, 2, 0)), r"\[N, C\].*\[2, 0\]"),
    "dense_of_one_dimension": ((torch.zeros(3), P), r"\[N, C\]"),
    "pruned_without_levels": ((Z, Z), r"\[L, 2, 3\]"),
    "pruned_of_other_rows": ((Z, torch.zeros(1, 4, 3)), r"\[1, 4, 3\]"),
    "pruned_of_other_classes": ((Z, torch.zeros(1, 2, 4)), r"\[1, 2, 4\]"),
    "integers": ((Z.long(), P.long()), "int64"),
    "mixed_dtypes": ((Z, P.double()), "float32 and torch.float64"),
    "mixed_devices": ((Z, P.to("meta")), "device"),
    "labels_on_another_device": ((Z, P, torch.zeros(2, dtype=torch.int64).to("meta")), "device"),
    "labels_of_other_rows": ((Z, P, torch.zeros(3, dtype=torch.int64)), r"int64 of shape \[2\]"),
    "float_class_labels": ((Z, P, torch.zeros(2)), "int64"),
    "integer_targets": ((Z, P, torch.zeros(2, 3, dtype=torch.int64), "multilabel"), "floating"),
    "targets_of_other_classes": ((Z, P, torch.zeros(2, 2), "multilabel"), r"\[2, 3\]"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.disagreement(*arguments)
