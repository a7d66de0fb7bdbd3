"""The operator `segmentation_disagreement`: the kernel of each device against the fp64 twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpie import _C, ops
from fastpie.ops import _native
from fastpie.ops.segmentation_disagreement import _kernel_arguments
from segmentation_cases import KINDS, assert_close_to_twin, logits

SENTINEL = -12345.0
on_a_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Kernel(NamedTuple):
    function: Callable[[Tensor, Tensor], Tensor]
    device: str

    def __call__(self, dense: Tensor, pruned: Tensor) -> Tensor:  # [2, L, N]
        scores = self.function(dense.to(self.device), pruned.to(self.device))
        assert scores.dtype is torch.float32
        assert scores.shape == (2, *pruned.shape[:2])
        return scores.cpu()


def _launch(dense: Tensor, pruned: Tensor, stream: int) -> Tensor:
    """The CUDA kernel on a poisoned output and a poisoned workspace."""
    out, arguments, alive = _kernel_arguments(dense, pruned)
    out.fill_(SENTINEL)
    alive[-1].fill_(0xEE)
    _native.call(_C.segmentation_disagreement_cuda, *arguments, stream)
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
    return _native.triton_kernels().segmentation_disagreement(dense, pruned)


@pytest.fixture(
    params=[
        pytest.param(Kernel(ops.segmentation_disagreement, "cpu"), id="cpu"),
        pytest.param(Kernel(_emulated, "cpu"), id="emulated", marks=pytest.mark.cuda_emulated),
        pytest.param(Kernel(_cuda, "cuda"), id="cuda", marks=on_a_gpu),
        pytest.param(Kernel(_triton, "cuda"), id="triton", marks=on_a_gpu),
    ]
)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
# Each form of the CUDA kernel, and of the CPU kernel, up to and above its limit.
@pytest.mark.parametrize("classes", [1, 2, 3, 8, 9, 21])
def test_kinds(kernel: Kernel, classes: int, kind: str) -> None:
    dense, pruned = logits(kind, 2, 5, classes, (17, 23), torch.float32)
    scores = kernel(dense, pruned)
    assert_close_to_twin(scores, dense, pruned)
    assert ((scores >= 0) & (scores <= 1) | scores.isnan()).all()


@pytest.mark.parametrize("kind", ["plain", "ties", "largest", "special", "-inf"])
@pytest.mark.parametrize("classes", [1, 2, 4, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel: Kernel, dtype: torch.dtype, classes: int, kind: str) -> None:
    dense, pruned = logits(kind, 2, 3, classes, (9, 31), dtype)
    assert_close_to_twin(kernel(dense, pruned), dense, pruned)


@pytest.mark.parametrize("classes", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "size", [(1,), (15,), (16,), (17,), (257,), (64, 64), (4097,), (5, 7, 11), (3, 2, 5, 4)]
)
def test_sizes(kernel: Kernel, size: tuple[int, ...], classes: int) -> None:
    dense, pruned = logits("plain", 1, 2, classes, size, torch.float32)
    assert_close_to_twin(kernel(dense, pruned), dense, pruned)


@pytest.mark.parametrize("levels", [1, 4, 5, 9])
@pytest.mark.parametrize("classes", [2, 5, 9])
def test_ladders(kernel: Kernel, classes: int, levels: int) -> None:
    dense, pruned = logits("plain", levels, 2, classes, (19, 3), torch.float32)
    scores = kernel(dense, pruned)
    assert_close_to_twin(scores, dense, pruned)
    for level in range(levels):
        assert torch.equal(kernel(dense, pruned[level : level + 1])[:, 0], scores[:, level])


@pytest.mark.parametrize("kind", ["plain", "ties", "faint", "background"])
@pytest.mark.parametrize("classes", [1, 2, 5, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_models_agree_exactly(
    kernel: Kernel, dtype: torch.dtype, classes: int, kind: str
) -> None:
    dense, _ = logits(kind, 1, 3, classes, (65, 67), dtype)
    assert (kernel(dense, dense.unsqueeze(0)) == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("classes", [1, 2, 4, 10])
def test_nan_or_positive_infinity_spoils_its_own_image_only(
    kernel: Kernel, classes: int, value: float
) -> None:
    dense, pruned = logits("plain", 2, 4, classes, (70, 70), torch.float32)
    clean = kernel(dense, pruned)
    dense[1, classes - 1, 69, 69] = value
    pruned[1, 2, 0, 69, 68] = value
    scores = kernel(dense, pruned)
    spoiled = torch.zeros(2, 4, dtype=torch.bool)
    spoiled[:, 1] = spoiled[1, 2] = True
    assert scores[:, spoiled].isnan().all()
    assert torch.equal(scores[:, ~spoiled], clean[:, ~spoiled])


@pytest.mark.parametrize("classes", [1, 2, 4, 10])
def test_a_pixel_without_any_class_spoils_its_image(kernel: Kernel, classes: int) -> None:
    dense, pruned = logits("plain", 1, 2, classes, (6, 6), torch.float32)
    pruned[0, 1, :, 3, 3] = -torch.inf
    scores = kernel(dense, pruned)
    assert scores[:, 0, 1].isnan().all() == (classes > 1)  # one class: a probability of 0
    assert not scores[:, 0, 0].isnan().any()


@pytest.mark.parametrize("classes", [1, 3])
def test_an_image_without_foreground_agrees_with_another(kernel: Kernel, classes: int) -> None:
    dense = torch.full((1, classes, 8, 8), -200.0)
    if classes > 1:
        dense[:, 0] = 0
    empty = dense.clone().unsqueeze(0) - torch.rand(8, 8)
    lesion = empty.clone()
    lesion[..., classes - 1, 2:4, 2:4] = 200
    scores = kernel(dense, torch.cat([empty, lesion]))
    assert scores[:, :, 0].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("levels", "images", "size"), [(0, 2, (4, 4)), (2, 0, (4, 4)), (0, 0, (4,)), (2, 3, (0, 5))]
)
@pytest.mark.parametrize("classes", [1, 3])
def test_nothing_to_score(
    kernel: Kernel, classes: int, levels: int, images: int, size: tuple[int, ...]
) -> None:
    dense, pruned = torch.zeros(images, classes, *size), torch.zeros(levels, images, classes, *size)
    scores = kernel(dense, pruned)
    assert (scores == 1).all()  # of no pixels


STRIDED = {
    "channels_last": lambda d, p: (
        d.contiguous(memory_format=torch.channels_last),
        p.movedim(2, -1).contiguous().movedim(-1, 2),
    ),
    "one_model_channels_last": lambda d, p: (d.contiguous(memory_format=torch.channels_last), p),
    "sliced_classes": lambda d, p: (d[:, 1:4], p[:, :, 2:5]),
    "sliced_columns": lambda d, p: (d[..., 3:20], p[..., 1:18]),
    "every_other_column": lambda d, p: (d[..., ::2], p[..., ::2]),
    "transposed": lambda d, p: (d.mT, p.mT),
    "levels_inside_images": lambda d, p: (d, p.transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded": lambda d, p: (d[:1].expand(d.shape), p[:1].expand(p.shape)),
    "one_pixel_everywhere": lambda d, p: (d[..., :1, :1].expand(d.shape), p),
    "every_other_image": lambda d, p: (d[::2], p[:, ::2]),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_logits_score_as_their_contiguous_copies(
    kernel: Kernel, view: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    dense, pruned = view(*logits("plain", 2, 3, 6, (21, 22), dtype))
    want = kernel(dense.contiguous(), pruned.contiguous())
    got = kernel(dense, pruned)
    assert torch.equal(got, want)
    assert_close_to_twin(got, dense, pruned)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("classes", [2, 6, 10])
def test_same_bits_every_time(
    kernel: Kernel, classes: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated threads of a block run in another order for each seed."""
    dense, pruned = logits("plain", 2, 2, classes, (97, 101), torch.float32)
    first = kernel(dense, pruned)
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    assert torch.equal(kernel(dense, pruned), first)
    # Nor do other images of the batch show.
    assert torch.equal(kernel(dense[1:], pruned[:, 1:]), first[:, :, 1:])


@pytest.mark.parametrize("classes", [1, 3])
def test_sums_of_large_images_lose_no_digits(kernel: Kernel, classes: int) -> None:
    # A running fp32 sum of 3 million equal terms is off by 1e-3 and more.
    pixels = 3_000_001 if kernel.function is not _emulated else 50_001
    dense, pruned = torch.zeros(1, classes, 1), torch.zeros(1, 1, classes, 1)
    dense[:, -1], pruned[:, :, -1] = -1.7, -2.3
    scores = kernel(dense.expand(1, classes, pixels), pruned.expand(1, 1, classes, pixels))
    want = ops.reference.segmentation_disagreement(dense.double(), pruned.double())
    torch.testing.assert_close(scores.double(), want, rtol=3e-7, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_runs_on_the_current_stream() -> None:
    dense, pruned = (x.cuda() for x in logits("plain", 1, 4, 3, (64, 64), torch.float32))
    ops.segmentation_disagreement(dense, pruned)  # compiled and loaded before the race begins
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream is early
        late = dense * 2
        scores = ops.segmentation_disagreement(late, pruned)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close_to_twin(scores, dense * 2, pruned)
