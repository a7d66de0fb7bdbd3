"""The Triton kernels become machine code of the H100 and H200, on a machine without a GPU.

Triton's interpreter replaces the compiler where TRITON_INTERPRET is set, so these run in a process
without it: `pytest -m triton_compile`.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs in a process without TRITON_INTERPRET", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.triton_compile

# The functions of the package hide the modules of the same name.
kernels = importlib.import_module("fastpie.triton_kernels.disagreement")
embedding = importlib.import_module("fastpie.triton_kernels.embedding_disagreement")
null = importlib.import_module("fastpie.triton_kernels.null")
segmentation = importlib.import_module("fastpie.triton_kernels.segmentation_disagreement")
top_k = importlib.import_module("fastpie.triton_kernels.top_k")


def _compile(kernel: Any, arguments: dict[str, str], constants: dict[str, Any]) -> Any:
    signature = arguments | dict.fromkeys(constants, "constexpr")
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this build of Triton ships no cuobjdump")
    command = [str(cuobjdump), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _disagreement(classes: int, dtype: str, task: str, labelled: bool) -> Any:
    multilabel = task == "multilabel"
    labels = ("*fp32" if multilabel else "*i64") if labelled else f"*{dtype}"
    arguments = {"dense": f"*{dtype}", "pruned": f"*{dtype}", "labels": labels, "out": "*fp32"}
    arguments |= dict.fromkeys(["levels", "rows", "classes"], "i32")
    strides = ["dense_row_stride", "pruned_level_stride", "pruned_row_stride"]
    arguments |= dict.fromkeys(strides, "i32")
    constants = {"MULTILABEL": multilabel, "HAS_LABELS": labelled}
    constants |= kernels.launch_options(classes)
    tile = classes <= kernels.TILE_CLASSES
    return _compile(kernels.tile_kernel if tile else kernels.chunk_kernel, arguments, constants)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("classes", [20, 128, 1000])
def test_disagreement_compiles(
    classes: int, dtype: str, task: str, labelled: bool, tmp_path: Path
) -> None:
    compiled = _disagreement(classes, dtype, task, labelled)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    resources = _resources(compiled.asm["cubin"], tmp_path)
    assert resources["LOCAL"] == 0
    assert resources["STACK"] <= 32
    if classes <= 128 or task == "multiclass":  # the rows that data sets have: nothing spills
        assert resources["STACK"] == 0
        assert resources["REG"] <= 128


def test_null_compiles(tmp_path: Path) -> None:
    arguments = {"input": "*fp32", "output": "*fp32", "count": "i64"}
    compiled = _compile(null.null_kernel, arguments, {"BLOCK": null.BLOCK})
    assert _resources(compiled.asm["cubin"], tmp_path)["STACK"] == 0


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_segmentation_disagreement_compiles(dtype: str, single: bool, tmp_path: Path) -> None:
    arguments = {"dense": f"*{dtype}", "pruned": f"*{dtype}", "partials": "*fp64"}
    arguments |= dict.fromkeys(["levels", "images", "foreground", "pixels", "blocks"], "i32")
    strides = ["dense_image", "dense_class", "dense_pixel", "pruned_level", "pruned_image"]
    strides += ["pruned_class", "pruned_pixel"]
    arguments |= {f"{name}_stride": "i64" for name in strides}
    constants = {"SINGLE": single, "BLOCK": segmentation.BLOCK}
    compiled = _compile(segmentation.segmentation_disagreement_kernel, arguments, constants)
    resources = _resources(compiled.asm["cubin"], tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    assert resources["REG"] <= 168  # three blocks on a multiprocessor


@pytest.mark.parametrize("size", [1, 512, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_embedding_disagreement_compiles(dtype: str, size: int, tmp_path: Path) -> None:
    arguments = {"dense": f"*{dtype}", "pruned": f"*{dtype}", "out": "*fp32"}
    arguments |= dict.fromkeys(["levels", "rows", "size"], "i32")
    strides = ["dense_row", "dense", "pruned_level", "pruned_row", "pruned"]
    arguments |= {f"{name}_stride": "i64" for name in strides}
    kernel = embedding.embedding_disagreement_kernel
    compiled = _compile(kernel, arguments, embedding.launch_options(size))
    resources = _resources(compiled.asm["cubin"], tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    assert resources["REG"] <= 128
    # Equal rows give exactly 0 only where no product is contracted with the difference.
    assert "fma.rn.f64" not in compiled.asm["ptx"].split("sqrt.rn.f64")[1]


def test_what_changes_with_the_batch_is_not_specialised() -> None:
    for kernel in (kernels.tile_kernel, kernels.chunk_kernel):
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert free == {"levels", "rows", "pruned_level_stride"}
    free = {p.name for p in embedding.embedding_disagreement_kernel.params if p.do_not_specialize}
    assert free == {"levels", "rows", "pruned_level_stride"}
    kernel = segmentation.segmentation_disagreement_kernel
    free = {p.name for p in kernel.params if p.do_not_specialize}
    assert free == {"levels", "images", "pruned_level_stride"}


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("k", [1, 100, 4096])
def test_top_k_compiles(k: int, with_ids: bool, tmp_path: Path) -> None:
    arguments = {"values": "*fp32", "ids": "*i64", "scores": "*fp32", "new_ids": "*i64"}
    arguments |= {"first_id": "i64", "k": "i32", "levels": "i32", "count": "i32"}
    arguments |= {"level_stride": "i32"}
    constants = {"HAS_IDS": with_ids} | top_k.launch_options(k)
    compiled = _compile(top_k.top_k_update_kernel, arguments, constants)
    resources = _resources(compiled.asm["cubin"], tmp_path)
    assert resources["STACK"] == resources["LOCAL"] == 0
    # Between a tile of the state that is read and its being written lies a barrier, and another
    # one behind the batch: without shared memory in between, only these order the threads.
    moves = compiled.asm["ttgir"].split("scf.for %tile")[1]
    order = re.findall(r"tt\.load|tt\.store|\bbarrier\b", moves)
    read, written, barrier = ["tt.load"] * 2, ["tt.store"] * 2, ["barrier"]
    assert order == [*read, *barrier, *written, *written, *barrier]


def test_no_batch_compiles_the_top_k_again() -> None:
    free = {p.name for p in top_k.top_k_update_kernel.params if p.do_not_specialize}
    assert free == {"first_id", "k", "levels", "count", "level_stride"}
