"""The Triton convolutions become good machine code of the H100 and H200, without a GPU.

Every configuration that is offered is compiled here. `pytest -m triton_compile`: see
test_compile.py.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs in a process without TRITON_INTERPRET", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks.triton_resources import (
    Case,
    bytes_of_a_step,
    cases,
    compile_launch,
    example,
    resources,
)

kernels = importlib.import_module("fastpie.triton_kernels.masked_conv")
code = importlib.import_module("fastpie.triton_kernels.masked_conv_kernels")
backward = importlib.import_module("fastpie.triton_kernels.masked_conv_backward")
launch = importlib.import_module("fastpie.triton_kernels.launch")

pytestmark = pytest.mark.triton_compile

_TENSORS = ("input", "mask", "scale", "bias", "residual", "output", "gradient")
SHARED_MEMORY = 227 * 1024  # of a program on sm_90
CASES = cases()


@pytest.fixture(autouse=True, scope="module")
def _own_triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiled here and now, not found in a cache of other days."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.what}, {'x'.join(map(str, c.config))}" for c in CASES]
)
def test_every_configuration(case: Case) -> None:
    used = resources(compile_launch(case.launch))
    assert used.stack == 0  # nothing is spilled
    assert used.shared <= SHARED_MEMORY
    assert case.config.num_warps <= 4
    assert set(used.stores) == {16}
    if case.launch.kernel is code.direct_kernel:
        assert used.tensor_core == 0
        assert used.loads[16] > 0
        assert used.in_loop["FFMA"] > 0
        return
    assert used.in_loop["HGMMA"] > 0
    assert used.in_loop["HMMA"] == 0
    assert used.in_loop["LDL"] == used.in_loop["STL"] == 0
    assert used.in_loop["LDGSTS"] > 0  # the next steps' tiles are on their way
    if not case.what.startswith("image"):
        # Inputs and weights come 16 bytes at a time, mask words 4.
        assert used.async_copies[16] > 0
        assert set(used.async_copies) <= {16, 8, 4}
        assert used.in_loop["LDG"] == 0
    # What is under way in all stages but one fits what was set aside.
    assert (case.config.num_stages - 1) * bytes_of_a_step(case.launch) <= used.shared + 2048 or (
        case.what.startswith("image")
    )


def test_1x1_of_both_models() -> None:
    """No bounds are checked in the loop: fewer instructions than a window takes."""
    used = resources(compile_launch(example(64, 256)))
    assert used.stack == 0
    assert used.in_loop["HGMMA"] == 16
    assert used.in_loop.total() < 350
    assert set(used.async_copies) == {16, 4}


@pytest.mark.parametrize(
    ("dtype", "allow_tf32", "capability", "tensor_cores"),
    [
        (torch.float16, False, 80, "HMMA"),
        (torch.float32, True, 90, "HGMMA"),
        (torch.float32, False, 90, "FFMA"),
    ],
)
def test_other_dtypes(
    dtype: torch.dtype, allow_tf32: bool, capability: int, tensor_cores: str
) -> None:
    # sm_80 keeps operands in registers as well: there the tile of 128 x 64 spills 48 bytes.
    config = kernels.TileConfig(64, 64, 64, 4, 3) if capability == 80 else None
    layer = example(64, 64, (3, 3), config=config, dtype=dtype, allow_tf32=allow_tf32)
    used = resources(compile_launch(layer, capability))
    assert used.in_loop[tensor_cores] > 0
    assert used.stack == 0
    assert used.shared <= (163 if capability == 80 else 227) * 1024


def test_pack_mask_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    monkeypatch.setattr(kernels, "run", lambda planned_launch, wrap: planned.append(planned_launch))
    kernels.pack_mask(torch.empty(64, 64, 3, 3, dtype=torch.bool, device="meta"))
    assert resources(compile_launch(planned[0])).stack == 0


def test_what_changes_between_layers_is_not_specialised() -> None:
    for kernel in (
        code.dot_kernel,
        code.direct_kernel,
        backward.input_gradient_kernel,
        backward.weight_gradient_kernel,
    ):
        for p in kernel.params:
            is_tensor = p.name.rstrip("01") in _TENSORS or p.name in ("weight", "output")
            assert p.do_not_specialize != (is_tensor or p.is_constexpr), p.name


class _Driver:
    """As much of a GPU as torch asks for when it looks which operands a kernel writes to."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


# A kernel that torch.compile launches cannot say whether it wants contraction.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_torch_compile_sees_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    operators = importlib.import_module("fastpie.ops.dual_conv_kernels")
    monkeypatch.setattr(operators, "is_served", lambda dense, weight: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    targets: list[str] = []

    class Seen(Exception):
        pass

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        raise Seen

    @torch.compile(backend=aot_autograd(fw_compiler=look), fullgraph=True)
    def layer(dense: Any, pruned: Any, weight: Any, mask: Any) -> Any:
        return torch.ops.fastpie.dual_conv(
            dense, pruned, weight, mask, None, [1, 1], [1, 1], [1, 1], 1
        )

    x, y = (torch.randn(2, 32, 6, 6, dtype=torch.bfloat16, requires_grad=True) for _ in "12")
    weight = torch.randn(64, 32, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="Seen"):
        layer(x, y, weight, weight > 0)
    assert not any("fastpie" in target for target in targets)
    assert sum("triton_kernel" in target for target in targets) == 2  # pack_mask, the layer
