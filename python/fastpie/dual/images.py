"""Which values of a program belong to the images one by one, and which are its last."""

from __future__ import annotations

import math

from fastpie.dual.program import Call, Program, Value

__all__ = ["final_values", "image_values"]

_INDEPENDENT = {
    f"aten.{name}"
    for name in (
        "relu",
        "relu6",
        "silu",
        "gelu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "mish",
        "softplus",
        "sigmoid",
        "tanh",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "abs",
        "neg",
        "pow",
        "clamp",
        "clamp_min",
        "clamp_max",
        "square",
        "prelu",
        "add",
        "sub",
        "mul",
        "div",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "pixel_shuffle",
        "linear",
        "layer_norm",
        "group_norm",
        "instance_norm",
    )
}


def image_values(program: Program) -> set[Value]:
    """The values [N, ...] each of whose entries depends on the input of that image alone.

    What known operators compute from such values; a reduction, `cat` and `flatten` if they leave
    the first dimension alone. The first dimension of any other value may be a multiple of N.
    """
    found = {v for v in program.inputs if None in program.meta[v].shape[:1]}
    for step in program.steps:
        meta = program.meta.get(step.result)
        if meta is None or not meta.shape or meta.shape[0] is not None:
            continue
        values = step.values()
        if not values or not all(v in found for v in values):
            continue
        if isinstance(step, Call) and not _keeps_images_apart(program, step):
            continue
        found.add(step.result)
    return found


def _keeps_images_apart(program: Program, step: Call) -> bool:
    name = str(step.target).rsplit(".", 1)[0]
    if name.startswith("aten.flatten"):
        name = "aten.flatten"
    rank = len(program.meta[step.result].shape)
    if name in _INDEPENDENT:  # of equal rank: [N] beside [N, C] would be spread over C
        return all(len(program.meta[v].shape) == rank for v in step.values())
    if name in ("aten.mean", "aten.sum", "aten.amax"):
        dims = step.args[1] if len(step.args) > 1 else None
        before = len(program.meta[step.values()[0]].shape)
        return isinstance(dims, list | tuple) and len(dims) > 0 and all(d % before for d in dims)
    if name == "aten.cat":
        return len(step.args) > 1 and step.args[1] % rank != 0
    if name == "aten.reshape":
        # [N, ...] to [-1, ...] with as many elements of each image as before.
        each = program.meta[step.values()[0]].shape[1:]
        sizes = [n for n in (*each, *step.args[1][1:]) if isinstance(n, int) and n > 0]
        known = len(sizes) == len(each) + len(step.args[1]) - 1
        same = math.prod(sizes[: len(each)]) == math.prod(sizes[len(each) :])
        return known and same and step.args[1][0] == -1
    if name in ("aten.pad", "aten.constant_pad_nd"):
        return len(step.args[1]) // 2 < rank
    if name == "aten.flatten":
        return len(step.args) > 1 and step.args[1] > 0
    return name == "aten.softmax" and step.args[1] % rank != 0


def final_values(program: Program) -> set[Value]:
    """The values that the model returns and no step reads."""
    read = {v for step in program.steps for v in step.values()}
    return set(program.outputs()) - read
