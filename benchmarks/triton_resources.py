"""What the compiled Triton convolutions use: registers, shared memory, tensor-core instructions.

No GPU is needed: the launches are made on meta tensors and compiled for an architecture by name.
`python -m benchmarks.triton_resources` prints the table of docs/design/gpu-engine.md.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The functions of the package hide the modules of the same name.
masked_conv = importlib.import_module("fastpie.triton_kernels.masked_conv")
backward = importlib.import_module("fastpie.triton_kernels.masked_conv_backward")

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Resources(NamedTuple):
    """Of one cubin."""

    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers and arrays
    shared: int  # bytes of a program
    tensor_core: int  # instructions in the code, loops counted once
    async_copies: dict[int, int]  # width in bytes: instructions in the code
    loads: dict[int, int]  # the same of plain loads from global memory
    stores: dict[int, int]
    in_loop: Counter[str]  # instructions of the innermost loop that multiplies, by name


def compile_launch(launch: Any, capability: int = 90) -> Any:
    """Triton's compiled kernel of a `Launch`, whose tensors may be meta tensors."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constants = dict(launch.constants)
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if launch.kernel.params[i].is_constexpr:
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # as torch allocates
        else:
            is_integer = isinstance(value, int)
            signature[name] = ("i32" if value < 2**31 else "i64") if is_integer else "fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    return triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**launch.options, "enable_fp_fusion": False},
    )


def resources(compiled: Any) -> Resources:
    """What `nvdisasm` and `cuobjdump`, which Triton ships, say about a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(*command: str) -> str:
        command = (str(tools / command[0]), *command[1:])
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernel.cubin"))
        Path(cubin).write_bytes(compiled.asm["cubin"])
        used = tool("cuobjdump", "--dump-resource-usage", cubin)
        code = tool("nvdisasm", "--print-code", cubin).splitlines()
    sizes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    names = [_instruction(line) for line in code]
    count = Counter(name.split(".")[0] for name in names)
    return Resources(
        sizes["REG"],
        sizes["STACK"] + sizes["LOCAL"],
        compiled.metadata.shared,
        count["HGMMA"] + count["HMMA"],
        _widths(names, "LDGSTS"),
        _widths(names, "LDG"),
        _widths(names, "STG"),
        _loop(code, names),
    )


def _instruction(line: str) -> str:
    """The instruction of a line of code with its modifiers, or nothing."""
    found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
    return found[1] if found else ""


def _widths(names: list[str], instruction: str) -> dict[int, int]:
    """Bytes of each thread and how often, of one kind of memory access."""
    widths: Counter[int] = Counter()
    for name in names:
        head, *modifiers = name.split(".")
        if head == instruction:
            bits = [
                int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|64|128)", m)
            ]
            widths[(bits[0] if bits else 32) // 8] += 1
    return dict(sorted(widths.items(), reverse=True))


def _loop(code: list[str], names: list[str]) -> Counter[str]:
    """Instructions of the shortest loop with a product in it."""
    labels = {m[1]: i for i, line in enumerate(code) if (m := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i:
            body = Counter(n.split(".")[0] for n in names[labels[target[1]] : i + 1] if n)
            if body["HGMMA"] + body["HMMA"] + body["FFMA"]:
                loops.append(body)
    return min(loops, key=lambda body: body.total(), default=Counter())


def example(
    channels: int,  # of one group
    filters: int,
    kernel: tuple[int, ...] = (1, 1),
    groups: int = 1,
    *,
    config: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    models: int = 2,
    shared_input: bool = False,
    masked: bool = True,
    residual: bool = True,
    activation: str = "relu",
    allow_tf32: bool = False,
    size: int = 28,
) -> Any:
    """The launch of a layer on meta tensors; the second model of two is the pruned one."""
    rank = len(kernel)

    def nhwc(count: int) -> Tensor:
        x = torch.empty((16, *[size] * rank, count), dtype=dtype, device="meta")
        return x.movedim(-1, 1)

    taps = torch.Size(kernel).numel()
    inputs = [nhwc(groups * channels) for _ in range(models)]
    words = torch.empty(filters, taps, (channels + 31) // 32, dtype=torch.int32, device="meta")
    vectors = [torch.empty(filters, device="meta")] * models
    outputs = [nhwc(filters) for _ in range(models)]
    return masked_conv.plan(
        [inputs[0]] * models if shared_input else inputs,
        torch.empty(filters, *kernel, channels, dtype=dtype, device="meta"),
        [None] * (models - 1) + [words if masked else None],
        vectors,
        vectors,
        outputs if residual else [None] * models,
        outputs,
        [1] * rank,
        [k // 2 for k in kernel],
        [1] * rank,
        groups,
        (activation, 0.0),
        config,
        allow_tf32,
    )


def example_gradients(
    channels: int,  # of one group
    filters: int,  # of one group
    kernel: tuple[int, ...] = (1, 1),
    stride: int = 1,
    *,
    input_config: Any = None,
    weight_config: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    shared_input: bool = False,
    size: int = 28,
) -> tuple[Any, Any]:
    """The launches of both gradients of a layer, of two models, on meta tensors."""
    rank = len(kernel)

    def nhwc(count: int, side: int) -> Tensor:
        x = torch.empty((16, *[side] * rank, count), dtype=dtype, device="meta")
        return x.movedim(-1, 1)

    taps = torch.Size(kernel).numel()
    inputs = [nhwc(channels, size)] * 2 if shared_input else [nhwc(channels, size) for _ in "12"]
    gradients = [nhwc(filters, size // stride) for _ in "12"]
    weight = torch.empty(filters, *kernel, channels, dtype=dtype, device="meta")
    words = torch.empty(filters, taps, (channels + 31) // 32, dtype=torch.int32, device="meta")
    window: tuple[Any, ...] = ([stride] * rank, [k // 2 for k in kernel], [1] * rank, 1)
    masks = [None, words]
    return (
        backward.plan_input_gradient(gradients, weight, masks, inputs, *window, input_config),
        backward.plan_weight_gradient(gradients, inputs, masks, kernel, *window, weight_config),
    )
