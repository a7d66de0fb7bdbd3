"""What the compiler made of the CUDA kernels: registers, memory, tensor-core instructions.

    python -m benchmarks.kernel_resources [MODULE.so] [--only masked_conv]

Reads the compiled module, by default the installed one, with cuobjdump (the toolkit's, or the one
that Triton ships); needs no GPU. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|IMMA|QMMA|QGMMA|IGMMA)(\.\w+)*$")


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str
    registers: int
    shared_bytes: int  # static: what a launch asks for beyond that is not in the module
    spilled_bytes: int  # stack frame and local memory
    tensor_core: dict[str, int]  # instructions in the code, by their full name
    instructions: int


def kernel_resources(module: Path) -> list[Kernel]:
    """Of every kernel in a compiled module, for every architecture it holds code for."""
    found = []
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(module))
    code = _instructions(_run(_tool("cuobjdump"), "--dump-sass", str(module)))
    architecture = ""
    for line, following in zip(usage.splitlines(), [*usage.splitlines()[1:], ""], strict=True):
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S*kernel\S*):", line):
            values = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", following)}
            names = code.get((architecture, match[1]), [])
            tensor = [name for name in names if TENSOR_CORE.match(name)]
            found.append(
                Kernel(
                    architecture,
                    match[1],
                    values["REG"],
                    values["SHARED"],
                    values["STACK"] + values["LOCAL"],
                    {name: tensor.count(name) for name in sorted(set(tensor))},
                    len(names),
                )
            )
    readable = _run("c++filt", *(k.name for k in found)).splitlines()
    named = [
        Kernel(**{**vars(k), "name": _short(name)}) for k, name in zip(found, readable, strict=True)
    ]
    return sorted(named, key=lambda k: (k.name, k.architecture))


def _instructions(sass: str) -> dict[tuple[str, str], list[str]]:
    """Names of the instructions of every function, by architecture and function."""
    code: dict[tuple[str, str], list[str]] = {}
    architecture, names = "", []
    for line in sass.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            names = code.setdefault((architecture, match[1]), [])
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)[^;]*;", line):
            names.append(match[1])
    return code


def _short(name: str) -> str:
    name = re.sub(r"fastpie::|cuda::|\(anonymous namespace\)::|^void |\(int\)|\(bool\)", "", name)
    return re.sub(r"\(.*$", "", name)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        found = shutil.which(str(Path(triton.origin).parent / "backends/nvidia/bin" / name))
    if found is None:
        raise SystemExit(f"Expected {name} on the PATH or in the package triton.")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="?", type=Path)
    parser.add_argument("--only", default="", help="a part of the kernels' names")
    options = parser.parse_args()
    if options.module is None:
        spec = importlib.util.find_spec("fastpie._C")
        if spec is None or spec.origin is None:
            raise SystemExit("Expected the package fastpie to be installed.")
        options.module = Path(spec.origin)
    print(
        "| kernel | GPU | registers | static shared memory | spilled | tensor-core instructions |"
    )
    print("|---|---|---|---|---|---|")
    for k in kernel_resources(options.module):
        if options.only in k.name:
            tensor = ", ".join(f"{n} {name}" for name, n in k.tensor_core.items()) or "0"
            print(
                f"| `{k.name}` | {k.architecture} | {k.registers} | {k.shared_bytes} | "
                f"{k.spilled_bytes} | {tensor} of {k.instructions} |"
            )


if __name__ == "__main__":
    main()
