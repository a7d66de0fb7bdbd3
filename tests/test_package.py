"""What `import fastpie` promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fastpie
from fastpie import _C


def run_python(code: str, **kwargs) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs
    ).stdout


def test_every_public_name_is_there():
    for name in fastpie.__all__:
        assert getattr(fastpie, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fastpie.__version__)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fastpie, "no_such_name")


def test_import_loads_no_heavy_package():
    code = """
import json, sys, torch
before = set(sys.modules)
import fastpie
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = {name.split(".")[0] for name in json.loads(run_python(code))}
    heavy = {"pyarrow", "matplotlib", "jinja2", "sklearn", "scipy", "pandas", "triton", "monai"}
    assert not loaded & heavy


def test_import_works_without_triton_and_without_a_compiler():
    code = """
import sys
sys.modules["triton"] = None
import os
os.environ["PATH"] = ""
import torch, fastpie
x = torch.randn(5, 3)
assert fastpie.disagreement(x, x)["js"].sum() == 0
print("fine")
"""
    assert run_python(code).strip() == "fine"


def test_the_package_says_that_it_is_typed():
    assert (Path(fastpie.__file__).parent / "py.typed").exists()


def test_triton_kernels_lie_inside_the_package():
    assert (Path(fastpie.__file__).parent / "triton_kernels" / "__init__.py").exists()


def test_one_openmp_runtime_in_the_process_after_a_parallel_kernel():
    code = """
import torch, fastpie
torch.set_num_threads(2)
x = torch.randn(20000, 20)
fastpie.disagreement(x, x + 1)
names = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
print("\\n".join(sorted(n for n in names if n.startswith(("libgomp", "libiomp", "libomp")))))
"""
    if not Path("/proc/self/maps").exists():
        return
    assert len(run_python(code).split()) <= 1
    assert _C.has_openmp_runtime()
