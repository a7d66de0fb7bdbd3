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
        backward.plan_input_gradient(gradients, weight, masks, inputs, *window, None),
        backward.plan_weight_gradient(gradients, inputs, masks, kernel, *window, None),
    )


class Case(NamedTuple):
    """One configuration, as a row of the table."""

    what: str
    config: Any
    launch: Any


def cases() -> list[Case]:
    """Every configuration that the kernels offer, each on a layer that it is offered for, bf16."""
    layers = {  # of few channels, of many, an image's, depthwise
        "3x3": [
            (32, 32, (3, 3), 1),
            (32, 64, (3, 3), 1),
            (64, 64, (3, 3), 1),
            (256, 256, (3, 3), 1),
        ],
        "1x1": [(64, 32, (1, 1), 1)],
        "image": [(3, 32, (3, 3), 1), (3, 64, (7, 7), 1)],
        "depthwise": [(1, 96, (3, 3), 96)],
    }
    found: list[Case] = []
    for what, sizes in layers.items():
        for models in (2, 1):
            seen = set()
            for channels, filters, kernel, groups in sizes:
                offered = masked_conv.masked_conv_configs(channels, filters, groups, models=models)
                for config in offered:
                    # What one model uses is less than what two do, but for the tiles of its own.
                    if config in seen or (models == 1 and config.pixels * config.filters < 2**14):
                        continue
                    seen.add(config)
                    layer = example(
                        channels,
                        filters,
                        kernel,
                        groups,
                        config=config,
                        models=models,
                        shared_input=what == "image",
                    )
                    number = "both models" if models == 2 else "one model"
                    found.append(Case(f"{what}, {number}", config, layer))
    for channels, filters in ((32, 256), (64, 64), (256, 256)):
        of_inputs, of_weight = example_gradients(channels, filters, (3, 3), 2)
        if channels != 64:  # as with 256 channels
            config = backward.input_gradient_config(channels)
            found.append(Case("gradient of the inputs, 3x3", config, of_inputs))
        config = backward.weight_gradient_config(channels, filters)
        found.append(Case("gradient of the weight, 3x3", config, of_weight))
    return found


def bytes_of_a_step(launch: Any) -> int:
    """Bytes that one step of the loop over a product loads from global memory, padding included."""
    constants, names = launch.constants, launch.kernel.arg_names
    if "CHANNELS" not in constants:
        return 0
    operands = dict(zip(names, launch.arguments, strict=False))
    pixels, filters, channels = (constants[n] for n in ("PIXELS", "FILTERS", "CHANNELS"))
    models = 2 if constants["DUAL"] else 1
    inputs = 1 if constants.get("SHARED_INPUT") else models
    itemsize = launch.arguments[0].element_size()
    masks = sum(constants[f"HAS_MASK{m}"] for m in range(models)) * filters * channels // 8
    if "weight" not in operands:  # gradient of the weight: two tiles of pixels, no mask in the loop
        return pixels * (models * filters + inputs * channels) * itemsize
    of_pixel = filters if "gradient0" in operands else channels
    return (pixels * of_pixel * inputs + filters * channels) * itemsize + masks


def table() -> str:
    """The resources of every configuration for sm_90, as Markdown."""
    lines = [
        "| kernel | pixels x filters x channels, stages | registers | stack, B | shared, KiB "
        + "| tensor-core instructions (loop / all) | bytes a step | instructions in the loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        used = resources(compile_launch(case.launch))
        c = case.config
        tile = f"{c.pixels} x {c.filters}" + (f" x {c.channels}" if c.channels else "")
        in_loop = used.in_loop["HGMMA"] + used.in_loop["HMMA"]
        lines.append(
            f"| {case.what} | {tile}, {c.num_stages} | {used.registers} | {used.stack} "
            f"| {used.shared / 1024:.0f} | {in_loop} / {used.tensor_core} "
            f"| {bytes_of_a_step(case.launch) or ''} | {used.in_loop.total()} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
