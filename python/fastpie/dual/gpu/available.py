"""Which GPU an example lies on, and which kernels can be used there."""

from __future__ import annotations

from typing import Any

import torch

from fastpie.dual.gpu import cudnn_graph
from fastpie.dual.gpu.device import CudaDevice, Device, tf32_allowed
from fastpie.dual.gpu.kernels import ChannelsLast, Cudnn, Family, Torch
from fastpie.dual.gpu.layers import GpuLayer
from fastpie.dual.gpu.sparse24 import SparseTensorCores
from fastpie.ops import _native, masked_conv_nhwc

__all__ = ["device_of", "families_of", "unusable_reason"]


def unusable_reason(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None where it can.

    Args:
        backend: "cuda" or "triton", or "auto", which needs neither of our families of kernels.
        device: of the example.
    """
    if device.type != "cuda":
        return f"the example is on {device}, not on a GPU"
    if torch.version.hip is not None:
        return "this is a GPU of AMD, for which there is no engine yet"
    if backend == "cuda":
        return _native.cuda_unusable_reason()
    return _native.triton_unusable_reason() if backend == "triton" else None


def device_of(device: torch.device) -> Device:
    """The GPU that a tensor lies on."""
    return CudaDevice(device)


def families_of(backend: str) -> list[Family]:
    """The kernels to choose from.

    Args:
        backend: "cuda" leaves the Triton kernels out, "triton" our CUDA kernels; "auto" nothing.
    """
    families: list[Family] = [Torch(), Cudnn()]
    if cudnn_graph.unusable_reason() is None:
        families.append(cudnn_graph.CudnnGraph())
    if backend != "cuda" and _native.triton_unusable_reason() is None:
        families.append(_triton())
    if backend != "triton" and _native.cuda_unusable_reason() is None:
        families += [_cuda(), SparseTensorCores()]
    return families


def _triton() -> ChannelsLast:
    kernels = _native.triton_kernels()

    def configs(layer: GpuLayer, models: int) -> list[tuple[str, dict[str, Any]]]:
        groups = layer.window[3]
        allowed = tf32_allowed()
        found = kernels.masked_conv_configs(
            layer.channels,
            layer.filters,
            groups,
            models=models,
            dtype=layer.dtype,
            allow_tf32=allowed,
        )
        return [
            (
                f"{c.pixels}x{c.filters}x{c.channels}, {c.num_stages} stages",
                {"config": c, "allow_tf32": allowed},
            )
            for c in found
        ]

    return ChannelsLast(
        "triton",
        kernels.masked_conv_nhwc,
        configs,
        frozenset({torch.float32, torch.bfloat16, torch.float16}),
        frozenset(kernels.ACTIVATIONS),
    )


def _cuda() -> ChannelsLast:
    def configs(layer: GpuLayer, models: int) -> list[tuple[str, dict[str, Any]]]:
        names = list(enumerate(masked_conv_nhwc.tiles()))
        if layer.channels % 8:  # the kernels for few channels have one tile
            names = names[:1]
        return [(name, {"tile": i}) for i, name in names]

    return ChannelsLast(
        "cuda",
        masked_conv_nhwc.masked_conv_nhwc_cuda,
        configs,
        frozenset({torch.bfloat16, torch.float16}),
        frozenset(masked_conv_nhwc.ACTIVATIONS),
    )
