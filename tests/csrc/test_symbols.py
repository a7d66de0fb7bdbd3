"""Object files of one instruction set keep to themselves.

The linker keeps one copy of each weak symbol for the whole program. Were a function of the standard
library compiled into an AVX-512 object, that copy could be the one that a machine without AVX-512
runs. So such objects may define nothing outside their own namespace.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build_folders() -> list[Path]:
    given = os.environ.get("FASTPIE_BUILD_DIR")
    if given:
        return [Path(given)]
    return sorted(p.parent for p in ROOT.glob("build/*/compile_commands.json"))


def objects_by_instruction_set() -> dict[str, list[Path]]:
    """Object files that exist, by the FASTPIE_ISA that they were compiled with."""
    found: dict[str, list[Path]] = {}
    for folder in build_folders():
        for entry in json.loads((folder / "compile_commands.json").read_text()):
            arguments = entry.get("arguments") or shlex.split(entry["command"])
            isa = [a.split("=", 1)[1] for a in arguments if a.startswith("-DFASTPIE_ISA=")]
            output = entry.get("output") or arguments[arguments.index("-o") + 1]
            path = Path(entry["directory"], output)
            if isa and path.exists():
                found.setdefault(isa[0], []).append(path)
    return found


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    found = objects_by_instruction_set()
    if not found:
        pytest.skip(
            "no build folder with object files: a wheel was installed, or FASTPIE_BUILD_DIR"
        )
    return found


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter, demangled name) of every symbol that other objects can see."""
    command = ["nm", "-C", "--defined-only", "--extern-only", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [re.match(r"[0-9a-f]*\s+(\S)\s+(.*)", line) for line in lines]
    return [(m[1], m[2]) for m in symbols if m]


def test_every_kernel_source_was_compiled_for_every_instruction_set(
    objects: dict[str, list[Path]],
) -> None:
    baseline = {path.name for path in objects["baseline"]}
    for isa, paths in objects.items():
        assert {path.name for path in paths} == baseline, isa


def test_objects_define_nothing_outside_the_namespace_of_their_instruction_set(
    objects: dict[str, list[Path]],
) -> None:
    for isa, paths in objects.items():
        for path in paths:
            symbols = defined_symbols(path)
            assert symbols, f"{path} defines nothing"
            outside = [s for s in symbols if not s[1].startswith(f"fastpie::cpu::{isa}::")]
            assert not outside, f"{path} defines {outside}"


def test_objects_export_no_weak_or_unique_symbol(objects: dict[str, list[Path]]) -> None:
    for paths in objects.values():
        for path in paths:
            weak = [s for s in defined_symbols(path) if s[0] in "WwVvu"]
            assert not weak, f"{path} exports weak symbols {weak}"


# Types and C functions: nothing that the compiler could make a weak symbol of.
ALLOWED_OF_STD = {
    "free", "int32_t", "int64_t", "malloc", "size_t", "uint8_t", "uint16_t", "uint32_t", "uint64_t",
    "uintptr_t",
}  # fmt: skip


def test_kernel_sources_take_only_types_and_c_functions_from_the_standard_library() -> None:
    """What an optimiser leaves of a template is up to it: the sources themselves are read too."""
    files = [p for p in (ROOT / "csrc/cpu").iterdir() if p.suffix in (".cpp", ".h")]
    code = {path.name: re.sub(r"//.*", "", path.read_text()) for path in files}
    per_instruction_set = {name for name, text in code.items() if "cpu::FASTPIE_ISA {" in text}
    assert {"null.cpp", "relayout.cpp", "vec.h", "block.h"} <= per_instruction_set
    for name in per_instruction_set:
        assert set(re.findall(r"std::(\w+)", code[name])) <= ALLOWED_OF_STD, name
