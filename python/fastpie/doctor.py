"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from typing import Any

import torch

from fastpie import _C
from fastpie.dual.gpu import cudnn_graph
from fastpie.ops import _native

__all__ = ["examine"]

_PACKAGES = (
    "fastpie", "torch", "triton", "numpy", "pyarrow", "safetensors", "pillow", "jinja2", "matplotlib",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Versions, CPU, GPUs, and for each family of kernels whether it can be used.

    Returns:
        A dict that JSON can hold: `versions`, `cpu`, `cuda`, `gpus`, `kernels` (rows of name,
        usable, reason).
    """
    gpus, gpu_reason = _gpus()
    return {
        "versions": {name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "cpu": _cpu(),
        "cuda": {
            "kernels_for": _C.cuda_architectures,
            "compiled_with": getattr(_C, "cuda_version", None),
            "torch_built_for": torch.version.cuda,
        },
        "gpus": gpus,
        "gpus_unreadable": gpu_reason,
        "kernels": [_cpu_row(), *_gpu_rows()],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        active: str | None = _C.cpu_capability()
    except RuntimeError:
        active = None
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_sets": _C.cpu_capabilities(),
        "in_use": active,
        "openmp_of_torch_found": _C.has_openmp_runtime(),
    }


def _cpu_row() -> dict[str, Any]:
    try:
        _C.cpu_capability()
    except RuntimeError as error:
        return {"name": "cpu", "usable": False, "reason": str(error)}
    return {"name": "cpu", "usable": True, "reason": None}


def _gpu_rows() -> list[dict[str, Any]]:
    reasons = {
        "cuda": _native.cuda_unusable_reason(),
        "triton": _native.triton_unusable_reason(),
        "cudnn graph": cudnn_graph.unusable_reason(),
    }
    return [
        {"name": name, "usable": reason is None, "reason": reason}
        for name, reason in reasons.items()
    ]


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """What the driver says of each GPU, through NVML."""
    if importlib.util.find_spec("pynvml") is None:
        return [], "the package nvidia-ml-py is not installed"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "compute_capability": f"{major}.{minor}",
                    "memory_gib": round(memory.total / 2**30, 1),
                    "memory_used_gib": round(memory.used / 2**30, 1),
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                }
            )
        return gpus, None
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()
