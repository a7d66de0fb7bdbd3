"""`pack_mask`: masks as bits, every implementation against the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastpie
from fastpie import _C, FastpieError, ops
from fastpie.ops import _native, reference
from fastpie.ops.pack_mask import _kernel_arguments

SHAPES = [
    (1, 1), (5, 31), (3, 32), (7, 33), (64, 130), (2, 3, 7), (9, 40, 3, 3), (3, 65, 1, 1),
    (2, 33, 3, 3, 4), (4, 1, 7, 7), (0, 5), (5, 0), (0, 3, 3, 3),
]  # fmt: skip


def _codes(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_each_instruction_set_packs_as_the_twin_does(
    capability: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPIE_CPU_CAPABILITY", capability)
    codes = _codes(shape)
    for level in (0, 1, 127, 128, 254):
        words = ops.pack_mask(codes, level)
        assert words.dtype is torch.int32
        assert torch.equal(words, reference.pack_mask(codes > level))
    mask = codes > 99
    words = ops.pack_mask(mask)
    assert torch.equal(words, reference.pack_mask(mask))
    taps = words.shape[1]
    assert torch.equal(reference.unpack_mask(words, shape[1]), mask.view(*shape[:2], taps))


@pytest.mark.parametrize("threads", [1, 2])
def test_large_masks_are_packed_by_all_threads(threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    for shape in ((500, 700), (130, 129, 3, 3)):
        codes = _codes(shape)
        assert torch.equal(ops.pack_mask(codes, 60), reference.pack_mask(codes > 60))


def test_memory_layout_does_not_matter() -> None:
    codes = _codes((6, 40, 3, 3))
    want = ops.pack_mask(codes, 100)
    assert torch.equal(ops.pack_mask(codes.to(memory_format=torch.channels_last), 100), want)
    strided = _codes((80, 9)).t()[:, ::2]
    assert torch.equal(ops.pack_mask(strided, 3), reference.pack_mask(strided > 3))


def test_levels_of_a_ladder_give_its_masks() -> None:
    model = torch.nn.Conv2d(40, 6, 3)
    masks = fastpie.prune(model, [0.2, 0.5, 0.9])
    for level, sparsity in enumerate(masks.sparsities):
        want = ops.pack_mask(masks.at(sparsity)["weight"])
        assert torch.equal(ops.pack_mask(masks.levels["weight"], level), want)


def test_operator_passes_torch_opcheck() -> None:
    for mask in (_codes((3, 40, 3, 3)), _codes((3, 5)) > 9):
        torch.library.opcheck(torch.ops.fastpie.pack_mask.default, (mask, 0))


def test_operator_compiles_into_one_graph() -> None:
    compiled = torch.compile(lambda m: ops.pack_mask(m) + 1, backend="aot_eager", fullgraph=True)
    mask = _codes((4, 70, 3)) > 50
    assert torch.equal(compiled(mask), reference.pack_mask(mask) + 1)


@pytest.mark.parametrize(
    ("mask", "level", "message"),
    [
        (torch.ones(4, dtype=torch.bool), None, r"\[K, C, \*kernel\]"),
        (torch.ones(4, 3), None, "float32"),
        (torch.ones(4, 3, dtype=torch.bool), 0, "no `level`"),
        (torch.ones(4, 3, dtype=torch.uint8), None, "None"),
        (torch.ones(4, 3, dtype=torch.uint8), 255, "255"),
        (torch.ones(4, 3, dtype=torch.uint8), -1, "-1"),
        (torch.ones(4, 3, dtype=torch.uint8), True, "True"),
    ],
)
def test_bad_arguments_are_refused(mask: Tensor, level: int | None, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.pack_mask(mask, level)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.cuda_emulated, id="emulated"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
            ],
            id="gpu",
        ),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_cuda_kernel(
    seed: int, shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    codes = _codes(shape)
    for level in (0, 127, 254):
        words, arguments, _alive = _kernel_arguments(codes.to(device), level)
        words.fill_(0x5A5A5A5A)
        _native.call(_C.pack_mask_cuda, *arguments, 0)
        assert torch.equal(words.cpu(), reference.pack_mask(codes > level))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("shape", [(2048, 1024, 1, 1), (512, 500, 3, 3)])
def test_operator_on_a_gpu(shape: tuple[int, ...]) -> None:
    codes = _codes(shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        words = ops.pack_mask(codes.cuda().to(memory_format=layout), 70)
        assert torch.equal(words.cpu(), reference.pack_mask(codes > 70))
