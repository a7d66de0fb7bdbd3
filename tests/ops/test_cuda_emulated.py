"""The CUDA kernels on the CPU, and that their emulator finds what it is there to find."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from disagreement_cases import KINDS, assert_close_to_twin, labels_of, logits
from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.disagreement import _kernel_arguments

pytestmark = pytest.mark.cuda_emulated

SENTINEL = -12345.0


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The threads of a block run in another order for each seed."""
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(request.param))
    return request.param


def test_no_operator_uses_an_emulated_kernel_in_earnest() -> None:
    assert "emulated" in _C.cuda_unusable_reason()
    assert _native.cuda_unusable_reason() is not None


@pytest.mark.parametrize("count", [0, 1, 255, 256, 1001])
def test_null(seed: int, count: int) -> None:
    x = torch.randn(count)
    y = torch.full_like(x, SENTINEL)
    _native.call(_C.null_cuda, x.data_ptr(), y.data_ptr(), count, 0)
    assert torch.equal(x, y)


def _disagreement(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> None:
    out, arguments, _alive = _kernel_arguments(dense, pruned, labels, task)
    out.fill_(SENTINEL)
    _native.call(_C.disagreement_cuda, *arguments, 0)
    assert (out != SENTINEL).all(), "not every element was written"
    assert_close_to_twin(out, dense, pruned, labels, task)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 3, 17, 64, 129, 300])
def test_disagreement(classes: int, kind: str, task: str) -> None:
    dense, pruned = logits(kind, 2, 5, classes, torch.float32)
    _disagreement(dense, pruned, labels_of(task, 5, classes), task)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [14, 600, 16_384])
def test_disagreement_in_half_precision(seed: int, classes: int, dtype: torch.dtype) -> None:
    dense, pruned = logits("ties", 1, 2, classes, dtype)
    _disagreement(dense, pruned, labels_of("multiclass", 2, classes), "multiclass")


# ---------------------------------------------------------------------------- the emulator


def _reverse(kind: str, mistaken: bool, words: int = 128) -> bool:
    """Whether a kernel of tests/csrc/cuda_emulator/faults.cu reversed its blocks of words."""
    x = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32)
    y = torch.zeros_like(x)
    _native.call(_C.cuda_fault, kind, mistaken, x.data_ptr(), y.data_ptr(), words)
    return torch.equal(y.view(-1, 128), x.view(-1, 128).flip(1))


WRONG_RESULT = [
    *("missing_barrier", "missing_warp_barrier", "missing_wait", "early_copy"),
    *("wgmma_no_wait", "wgmma_early_fragment", "wgmma_early_operand"),
]
SANITIZER = ["global_overflow", "static_overflow", "dynamic_overflow"]
REPORTED = {
    "divergence": r"no thread can go on.*wait at __s.*wait at __s",
    "not_in_mask": r"block \(\d, 0, 0\), thread \d+: the lane is not in the mask",
    "wgmma_no_fence": r"wgmma without wgmma\.fence",
    "wgmma_no_proxy_fence": r"wgmma of a copy that no fence\.proxy\.async has followed",
}


@pytest.mark.parametrize("kind", [*WRONG_RESULT, *SANITIZER, *REPORTED])
def test_right_kernels_are_right(seed: int, kind: str) -> None:
    assert _reverse(kind, mistaken=False, words=384)


@pytest.mark.parametrize("kind", WRONG_RESULT)
def test_missing_synchronisation_gives_a_wrong_result(seed: int, kind: str) -> None:
    assert not _reverse(kind, mistaken=True)


@pytest.mark.parametrize("kind", REPORTED)
def test_what_cannot_go_on_is_reported(seed: int, kind: str) -> None:
    with pytest.raises(FastpieError, match=REPORTED[kind]):
        _reverse(kind, mistaken=True)
    assert _reverse(kind, mistaken=False)  # and what follows is not disturbed


@pytest.mark.parametrize("kind", SANITIZER)
def test_access_outside_ends_the_process(kind: str) -> None:
    if not _C.address_sanitizer:
        pytest.skip("this build has no AddressSanitizer")
    # Without torch, which takes seconds to load under the sanitizer.
    program = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, y = (ctypes.c_uint32 * 384)(), (ctypes.c_uint32 * 384)()
module.cuda_fault({kind!r}, True, ctypes.addressof(x), ctypes.addressof(y), 384)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "AddressSanitizer" in run.stderr
    assert f"{kind}_kernel" in run.stderr
