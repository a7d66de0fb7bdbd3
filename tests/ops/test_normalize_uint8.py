"""`normalize_uint8`: every value that a byte can give, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastpie import _C, FastpieError, ops
from fastpie.ops import _native, reference
from fastpie.ops.normalize_uint8 import _kernel_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(shape: tuple[int, ...], layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(memory_format=layout)
    return images, torch.rand(shape[1]), torch.rand(shape[1]) + 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operator_computes_what_it_says_it_is_equivalent_to(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    images, mean, std = _case((2, 3, 5, 7), layout)
    x = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    for multiple, channels in ((1, 3), (2, 4), (8, 8)):
        want = functional.pad(x, (0, 0, 0, 0, 0, channels - 3)).to(dtype)
        got = ops.normalize_uint8(images, mean, std, dtype, multiple)
        assert got.dtype is dtype
        assert torch.equal(got, want)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_no_gradient_reaches_mean_and_std() -> None:
    images, mean, std = _case((1, 3, 2, 2), torch.contiguous_format)
    assert not ops.normalize_uint8(images, mean.requires_grad_(), std).requires_grad


def test_operator_passes_torch_opcheck() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype, multiple in ((torch.float32, 1), (torch.bfloat16, 8)):
            arguments = (*_case((2, 3, 4, 5), layout), dtype, multiple)
            torch.library.opcheck(torch.ops.fastpie.normalize_uint8.default, arguments)


def test_operator_compiles_into_one_graph() -> None:
    def stem(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return ops.normalize_uint8(images, mean, std, torch.bfloat16, 8) * 2

    case = _case((2, 3, 6, 6), torch.contiguous_format)
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*case), stem(*case))


IMAGES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES.float(), ONES, ONES), "uint8"),
        ((IMAGES[0], ONES, ONES), r"\[N, C, H, W\]"),
        ((IMAGES, ONES[:2], ONES), r"`mean` to be float32 of shape \[3\]"),
        ((IMAGES, ONES, ONES.double()), "`std` to be float32"),
        ((IMAGES, ONES, ONES.to("meta")), "one device"),
        ((IMAGES, ONES, ONES, torch.float64), "float64"),
        ((IMAGES, ONES, ONES, torch.float32, 0), "at least 1, but got 0"),
        ((IMAGES, ONES, ONES, torch.float32, 1.5), "1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.normalize_uint8(*arguments)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_emulated, id="emulated"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
            ],
            id="gpu",
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def _check(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, multiple: int, device: str
) -> None:
    on_device = [tensor.to(device) for tensor in case]
    output, arguments, _alive = _kernel_arguments(*on_device, dtype, multiple)
    output.fill_(-12345.0)
    _native.call(_C.normalize_uint8_cuda, *arguments, 0)
    assert torch.equal(output.cpu(), reference.normalize_uint8(*case, dtype, multiple))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 3, 8, 8), (2, 3, 5, 7), (5, 1, 3, 3), (2, 4, 33, 32), (1, 9, 1, 1), (0, 3, 4, 4),
              (2, 3, 0, 4)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_cuda_kernel(
    multiple: int,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    dtype: torch.dtype,
    device: str,
) -> None:
    _check(_case(shape, layout), dtype, multiple, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_kernel_on_every_byte(dtype: torch.dtype, device: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    # ImageNet's, and values that make subnormal and infinite results in fp16.
    for mean, std in (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ([0.5, 0.0, 1 / 3], [1e6, 1e-5, 3.0]),
    ):
        _check((images, torch.tensor(mean), torch.tensor(std)), dtype, 8, device)


def test_cuda_kernel_refuses_images_that_its_indices_do_not_reach(device: str) -> None:
    address = torch.zeros(16, device=device).data_ptr()
    arguments = (address, (1, 1, 1), address, address, address, 0, (1, 1, 2**31, 1), 0)
    with pytest.raises(FastpieError, match=r"fewer than 2\^31"):
        _native.call(_C.normalize_uint8_cuda, *arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operator_on_a_gpu(layout: torch.memory_format) -> None:
    case = _case((9, 3, 224, 225), layout)
    got = ops.normalize_uint8(*(tensor.cuda() for tensor in case), torch.bfloat16, 8)
    assert torch.equal(got.cpu(), reference.normalize_uint8(*case, torch.bfloat16, 8))
