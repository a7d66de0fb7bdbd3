"""The CUDA part of the compiled module: what it links, and which GPUs it holds code for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastpie import _C

pytestmark = pytest.mark.skipif(
    _C.cuda_architectures is None, reason="this build has no CUDA kernels (nvcc was not found)"
)


def _run(tool: str, *arguments: str) -> str:
    path = shutil.which(tool)
    if path is None and tool == "cuobjdump" and (triton := importlib.util.find_spec("triton")):
        path = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin" / tool))
    if path is None:
        pytest.skip(f"{tool} is neither on the PATH nor shipped with Triton")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
@pytest.mark.parametrize("command", [("ldd",), ("readelf", "-d")])
def test_links_no_cuda_library(command: tuple[str, ...]) -> None:
    # libcuda belongs to the driver and is missing on a machine without a GPU; a shared libcudart
    # would tie the module to one torch build.
    assert re.findall(r"lib(?:cuda|cudart|nvrtc)\b\S*", _run(*command, _C.__file__)) == []


def test_holds_code_for_the_named_architectures() -> None:
    elf = _run("cuobjdump", "--list-elf", _C.__file__)
    assert set(re.findall(r"\.(sm_\w+)\.cubin", elf)) == {"sm_80", "sm_90a"}
    # PTX of a generic target for later GPUs: code of sm_90a runs on no other.
    ptx = _run("cuobjdump", "--list-ptx", _C.__file__)
    assert set(re.findall(r"\.(sm_\w+)\.ptx", ptx)) == {"sm_80"}


def test_kernels_do_not_spill() -> None:
    usage = _run("cuobjdump", "--dump-resource-usage", _C.__file__)
    kernels = re.findall(r"Function (\S*kernel\S*):\s+REG:\d+ STACK:(\d+)\S* .*?LOCAL:(\d+)", usage)
    sources = Path(__file__).resolve().parents[2].glob("csrc/cuda/*.cu")
    written = {
        name
        for source in sources
        for name in re.findall(
            r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", source.read_text()
        )
    }
    assert len(written) >= 3
    for name in written:  # each for both architectures
        assert sum(name in mangled for mangled, _, _ in kernels) >= 2, name
    assert [name for name, stack, local in kernels if int(stack) or int(local)] == []


def test_hopper_kernels_keep_several_products_under_way() -> None:
    name = "masked_conv_nhwc_hopper_kernel"
    usage = _run("cuobjdump", "--dump-resource-usage", "--gpu-architecture", "sm_90a", _C.__file__)
    kernels = sorted(set(re.findall(rf"Function (\S*{name}\S*):", usage)))
    assert kernels
    code = _run(
        *("cuobjdump", "--dump-sass", "--gpu-architecture", "sm_90a"),
        *("--function", ",".join(kernels), _C.__file__),
    )
    functions = re.split(r"Function : ", code)[1:]
    assert len(functions) == len(kernels)
    for function in functions:
        assert function.count("HGMMA") >= 4
        # Where the compiler makes products wait for each other, each has a wait for all of them.
        assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", function) == ["0x3"] * 4 + ["0x0"]


def test_says_in_words_why_cuda_cannot_be_used() -> None:
    reason = _C.cuda_unusable_reason()
    assert isinstance(reason, str)
    assert reason == "" or len(reason.split()) > 1


def test_names_its_toolkit() -> None:
    assert re.fullmatch(r"\d+\.\d+", _C.cuda_version)
    assert _C.cuda_max_classes == 16384
