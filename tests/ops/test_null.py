"""The operator `null`: the do-nothing tutorial must itself be right."""

from __future__ import annotations

import pytest
import torch

from fastpie import _C, FastpieError, ops
from fastpie.ops import _native, reference


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (7,), (5, 3, 2), (100_003,)])
def test_output_is_a_new_tensor_with_the_same_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = ops.null(x)
    assert torch.equal(y, x)
    assert torch.equal(y, reference.null(x))
    assert y.shape == x.shape
    if x.numel():
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::3], id="every_third_column"),
        pytest.param(lambda x: x[1:2].expand(8, -1), id="expanded"),
        pytest.param(lambda x: x[2:, 1:], id="offset"),
    ],
)
def test_strided_input_gives_a_contiguous_copy(view) -> None:
    x = view(torch.randn(6, 10))
    y = ops.null(x)
    assert torch.equal(y, x)
    assert y.is_contiguous()


def test_nan_and_infinities_keep_their_bits() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    assert torch.equal(ops.null(x).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(FastpieError, match=f"float32, but got {dtype}"):
        ops.null(torch.zeros(2, dtype=dtype))


def test_gradient_is_that_of_a_copy() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    weights = torch.randn(4, 3)
    (ops.null(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_operator_passes_torch_opcheck() -> None:
    for x in (torch.randn(3, 4), torch.randn(3, 4, requires_grad=True), torch.randn(4, 3).t()):
        torch.library.opcheck(torch.ops.fastpie.null.default, (x,))


def test_operator_compiles_into_one_graph() -> None:
    compiled = torch.compile(lambda x: ops.null(x + 1) * 2, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5)
    assert torch.equal(compiled(x), (x + 1) * 2)


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set_copies(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    assert _C.cpu_capability() == capability
    x = torch.randn(40_001)
    assert torch.equal(ops.null(x), x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu() -> None:
    x = torch.randn(7, 1001, device="cuda")
    assert torch.equal(ops.null(x), x)
    pytest.importorskip("triton", reason="the package triton is not installed")
    assert torch.equal(_native.triton_kernels().null(x), x)
