"""The operator `embedding_disagreement`: the kernel of each device against the fp64 twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from embedding_cases import KINDS, assert_close_to_twin, embeddings
from fastpie import _C, FastpieError, ops
from fastpie.ops import _native
from fastpie.ops.embedding_disagreement import _kernel_arguments

SENTINEL = -12345.0
on_a_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Kernel(NamedTuple):
    function: Callable[[Tensor, Tensor], Tensor]
    device: str

    def __call__(self, dense: Tensor, pruned: Tensor) -> Tensor:  # [L, N]
        drift = self.function(dense.to(self.device), pruned.to(self.device))
        assert drift.dtype is torch.float32
        assert drift.shape == pruned.shape[:2]
        return drift.cpu()


def _launch(dense: Tensor, pruned: Tensor, stream: int) -> Tensor:
    """The CUDA kernel on a poisoned output."""
    out, arguments = _kernel_arguments(dense, pruned)
    out.fill_(SENTINEL)
    _native.call(_C.embedding_disagreement_cuda, *arguments, stream)
    assert (out != SENTINEL).all(), "not every element was written"
    return out


def _emulated(dense: Tensor, pruned: Tensor) -> Tensor:
    return _launch(dense, pruned, 0)


def _cuda(dense: Tensor, pruned: Tensor) -> Tensor:
    if (reason := _native.cuda_unusable_reason()) is not None:
        pytest.skip(reason)
    return _launch(dense, pruned, _native.cuda_stream(dense))


def _triton(dense: Tensor, pruned: Tensor) -> Tensor:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return _native.triton_kernels().embedding_disagreement(dense, pruned)


@pytest.fixture(
    params=[
        pytest.param(Kernel(ops.embedding_disagreement, "cpu"), id="cpu"),
        pytest.param(Kernel(_emulated, "cpu"), id="emulated", marks=pytest.mark.cuda_emulated),
        pytest.param(Kernel(_cuda, "cuda"), id="cuda", marks=on_a_gpu),
        pytest.param(Kernel(_triton, "cuda"), id="triton", marks=on_a_gpu),
    ]
)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 16, 33, 255, 700, 2100])
def test_kinds(kernel: Kernel, size: int, kind: str) -> None:
    dense, pruned = embeddings(kind, 2, 7, size, torch.float32)
    drift = kernel(dense, pruned)
    assert_close_to_twin(drift, dense, pruned)
    if kind == "identical":
        assert not drift.any()
    assert ((drift >= 0) & (drift <= 2 + 1e-6) | drift.isnan()).all()


@pytest.mark.parametrize("kind", ["plain", "identical", "largest", "special"])
@pytest.mark.parametrize("size", [5, 64, 515])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel: Kernel, dtype: torch.dtype, size: int, kind: str) -> None:
    dense, pruned = embeddings(kind, 3, 9, size, dtype)
    assert_close_to_twin(kernel(dense, pruned), dense, pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 32])
def test_every_half_precision_number_is_read_exactly(size: int, dtype: torch.dtype) -> None:
    """By vectors and one by one, subnormal numbers, infinities and NaN among them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    dense = torch.ones(2**16, size, dtype=dtype)
    dense[:, size // 2] = values
    pruned = torch.ones_like(dense).unsqueeze(0)
    assert_close_to_twin(ops.embedding_disagreement(dense, pruned), dense, pruned)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [3, 40])
def test_what_is_no_number_spoils_its_own_row_only(kernel: Kernel, size: int, value: float) -> None:
    dense, pruned = embeddings("plain", 2, 5, size, torch.float32)
    clean = kernel(dense, pruned)
    dense[1, size - 1] = pruned[1, 3, 0] = value
    drift = kernel(dense, pruned)
    spoiled = torch.zeros(2, 5, dtype=torch.bool)
    spoiled[:, 1] = spoiled[1, 3] = True
    assert drift[spoiled].isnan().all()
    assert torch.equal(drift[~spoiled], clean[~spoiled])


@pytest.mark.parametrize(("levels", "rows", "size"), [(0, 2, 4), (2, 0, 4), (0, 0, 0), (2, 3, 0)])
def test_nothing_to_score(kernel: Kernel, levels: int, rows: int, size: int) -> None:
    assert not kernel(torch.zeros(rows, size), torch.zeros(levels, rows, size)).any()


STRIDED = {
    "sliced": lambda d, p: (d[:, 3:20], p[..., 1:18]),
    "every_other": lambda d, p: (d[:, ::2], p[..., ::2]),
    "transposed": lambda d, p: (d.t().contiguous().t(), p.mT.contiguous().mT),
    "levels_inside_rows": lambda d, p: (d, p.transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded": lambda d, p: (d[:1].expand(d.shape), p[:1].expand(p.shape)),
    "one_value": lambda d, p: (d[:, :1].expand(d.shape), p),
    "every_other_row": lambda d, p: (d[::2], p[:, ::2]),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_rows_score_as_their_contiguous_copies(
    kernel: Kernel, view: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    dense, pruned = view(*embeddings("plain", 2, 6, 41, dtype))
    drift = kernel(dense, pruned)
    assert torch.equal(drift, kernel(dense.contiguous(), pruned.contiguous()))
    assert_close_to_twin(drift, dense, pruned)


@pytest.mark.parametrize("seed", [0, 1])
def test_same_bits_every_time_and_beside_other_rows(
    kernel: Kernel, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned = embeddings("plain", 2, 5, 777, torch.float32)
    first = kernel(dense, pruned)
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    assert torch.equal(kernel(dense, pruned), first)
    assert torch.equal(kernel(dense[3:], pruned[1:, 3:]), first[1:, 3:])


def test_more_rows_than_a_grid_has_blocks(kernel: Kernel) -> None:
    if kernel.function is _emulated:
        pytest.skip("the emulator is slow")
    dense, pruned = embeddings("plain", 1, 70_001, 3, torch.float32)
    assert_close_to_twin(kernel(dense, pruned), dense, pruned)


# ---------------------------------------------------------------------------- inside torch


def test_drift_is_numpys() -> None:
    dense, pruned = (x.double().numpy() for x in embeddings("plain", 2, 6, 20, torch.float32))
    z, y = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (dense, pruned))
    got = ops.embedding_disagreement(torch.tensor(dense).float(), torch.tensor(pruned).float())
    np.testing.assert_allclose(got, np.linalg.norm(z - y, axis=-1), rtol=1e-6)


def test_fp64_rows_give_fp64() -> None:
    dense, pruned = embeddings("plain", 2, 3, 8, torch.float64)
    drift = ops.embedding_disagreement(dense, pruned)
    assert drift.dtype is torch.float64
    assert torch.equal(drift, ops.reference.embedding_disagreement(dense, pruned))


@pytest.mark.parametrize("gradients", [False, True])
def test_operator_passes_torch_opcheck(gradients: bool) -> None:
    arguments = tuple(
        x.requires_grad_(gradients) for x in embeddings("plain", 2, 3, 5, torch.float32)
    )
    torch.library.opcheck(torch.ops.fastpie.embedding_disagreement.default, arguments)


def test_gradients_are_the_numerical_ones() -> None:
    arguments = [x.requires_grad_() for x in embeddings("plain", 2, 2, 4, torch.float64)]
    assert torch.autograd.gradcheck(ops.embedding_disagreement, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_kernel_are_those_of_plain_torch(dtype: torch.dtype) -> None:
    dense, pruned = (x.requires_grad_() for x in embeddings("plain", 2, 3, 6, dtype))
    ops.embedding_disagreement(dense, pruned).sum().backward()
    z, y = (x.detach().double().requires_grad_() for x in (dense, pruned))
    difference = functional.normalize(z, dim=-1) - functional.normalize(y, dim=-1)
    torch.linalg.vector_norm(difference, dim=-1).sum().backward()
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    for got, want in ((dense.grad, z.grad), (pruned.grad, y.grad)):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_equal_rows_and_rows_of_zeros_leave_the_gradients_finite() -> None:
    dense, pruned = embeddings("identical", 2, 3, 4, torch.float32)
    dense[1], pruned[0, 2] = 0, 0
    dense.requires_grad_()
    pruned.requires_grad_()
    ops.embedding_disagreement(dense, pruned).sum().backward()
    assert dense.grad.isfinite().all()
    assert pruned.grad.isfinite().all()


def test_rows_without_a_drift_leave_the_gradients_finite_and_take_no_part() -> None:
    dense, pruned = embeddings("plain", 2, 3, 4, torch.float32)
    dense[0, 1], pruned[1, 2, 0] = torch.nan, -torch.inf
    alone = [dense[1:2].clone().requires_grad_(), pruned[:, 1:2].clone().requires_grad_()]
    dense.requires_grad_()
    pruned.requires_grad_()
    ops.embedding_disagreement(dense, pruned).sum().backward()
    ops.embedding_disagreement(*alone).sum().backward()
    for grad in (dense.grad, pruned.grad):
        assert grad.isfinite().all()
    assert not dense.grad[0].any()
    assert not pruned.grad[:, 0].any()
    assert not pruned.grad[1, 2].any()
    assert pruned.grad[0, 2].any()
    torch.testing.assert_close(dense.grad[1:2], alone[0].grad)
    torch.testing.assert_close(pruned.grad[:, 1:2], alone[1].grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradients", [False, True])
def test_operator_compiles_into_one_graph(gradients: bool, backend: str) -> None:
    def function(dense: Tensor, pruned: Tensor) -> Tensor:
        return ops.embedding_disagreement(dense * 2, pruned).sum()

    results = []
    for compiled in (function, torch.compile(function, backend=backend, fullgraph=True)):
        torch.manual_seed(3)
        dense, pruned = embeddings("plain", 2, 3, 6, torch.float32)
        dense.requires_grad_(gradients)
        value = compiled(dense, pruned)
        if gradients:
            value.backward()
        results.append((value.detach(), dense.grad))
    torch.testing.assert_close(results[0], results[1])


def test_fake_tensors_take_the_shapes_and_dtypes_of_real_ones() -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        dense, pruned = embeddings("plain", 2, 3, 6, dtype)
        real = ops.embedding_disagreement(dense, pruned)
        meta = ops.embedding_disagreement(dense.to("meta"), pruned.to("meta"))
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("size", [1, 9, 130, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_on_every_instruction_set_and_thread_count(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, restore_threads: None
) -> None:
    both = [embeddings(kind, 2, 40, size, dtype) for kind in KINDS]
    dense, pruned = torch.cat([d for d, _ in both]), torch.cat([p for _, p in both], 1)
    seen = {}
    for capability in _C.cpu_capabilities():
        monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen[capability, threads] = ops.embedding_disagreement(dense, pruned)
    first = seen["baseline", 1].numpy()
    for key, other in seen.items():
        np.testing.assert_array_equal(other.numpy(), first, err_msg=str(key))


Z, P = torch.zeros(2, 3), torch.zeros(1, 2, 3)
REFUSED = {
    "dense_of_one_dimension": ((torch.zeros(3), P), r"\[N, D\].*\[3\]"),
    "dense_of_three_dimensions": ((P, torch.zeros(1, 1, 2, 3)), r"\[N, D\].*\[1, 2, 3\]"),
    "pruned_without_levels": ((Z, Z), r"\[L, 2, 3\].*\[2, 3\]"),
    "pruned_of_other_rows": ((Z, torch.zeros(1, 4, 3)), r"\[1, 4, 3\]"),
    "integers": ((Z.long(), P.long()), "int64"),
    "mixed_dtypes": ((Z, P.double()), "float32 and torch.float64"),
    "mixed_devices": ((Z, P.to("meta")), "device.*cpu and meta"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.embedding_disagreement(*arguments)
