"""A few launches of every CUDA kernel, for compute-sanitizer (`make gpu-check`).

With PYTORCH_NO_CUDA_MEMORY_CACHING=1: torch's caching allocator would hide accesses outside.
"""

from __future__ import annotations

import torch

from fastpie import ops
from fastpie.ops.masked_conv_nhwc import masked_conv_nhwc_cuda, tiles
from fastpie.ops.sparse24 import pack_sparse24, sparse24_conv_cuda


def main() -> None:
    """Launch each kernel in every form that it has, at sizes with something left over."""
    for classes in (1, 12, 20, 30, 50, 100, 129, 1000, 16384):
        for task in ("multiclass", "multilabel"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                dense = torch.randn(5, classes, device="cuda", dtype=dtype)
                pruned = torch.randn(2, 5, classes, device="cuda", dtype=dtype)
                labels = torch.tensor([0, -1, classes, 2**62, 0], device="cuda")
                if task == "multilabel":
                    labels = (torch.rand(5, classes, device="cuda") < 0.5).float()
                ops.disagreement(dense, pruned, labels, task)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for classes in (1, 2, 5, 20):
            for turned in (False, True):  # pixels side by side, classes side by side
                pair = [
                    torch.randn(*n, 3, classes, 4099, device="cuda", dtype=dtype)
                    for n in ((), (5,))
                ]
                pair = [x.mT.contiguous().mT for x in pair] if turned else pair
                ops.segmentation_disagreement(*pair)
        for size in (1, 33, 2100):
            pair = [torch.randn(*n, 5, size, device="cuda", dtype=dtype) for n in ((), (2,))]
            ops.embedding_disagreement(*pair)
    ops.null(torch.randn(1001, device="cuda"))
    for shape in ((5, 33), (64, 40, 3, 3)):
        ops.pack_mask(torch.randint(0, 5, shape, device="cuda", dtype=torch.uint8), 2)
    # Few histograms, and more than a block has.
    for counts in ([0, 9, 30_000], range(1, 30_000, 150)):
        weights = [torch.randn(n, device="cuda").mul(50).round() for n in (1, 30_000, 0, 1025)]
        ops.magnitude_levels([*weights, weights[1].half(), weights[3].bfloat16()], counts)
    for shape in ((2, 3, 5, 7), (2, 3, 8, 8)):  # single elements, and vectors
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            images = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
            ops.normalize_uint8(images, *torch.rand(2, 3, device="cuda"), dtype)
            ops.normalize_uint8(images, *torch.rand(2, 3, device="cuda"), dtype, 8)
    for k in (1, 100, 4096):
        values = torch.full((k,), -torch.inf, device="cuda")
        ids = torch.full((k,), -1, device="cuda")
        for count in (3, 5000):
            ops.top_k_update(values, ids, torch.randn(2, count, device="cuda"))
    for rows, tile in ((64, 64), (64, 128), (128, 64), (128, 128)):
        weight = torch.randn(rows + 6, 3, 3, 64, device="cuda").half()
        packed = pack_sparse24(weight, torch.rand(weight.shape) < 0.4, rows)
        x = torch.randn(3, 9, 9, 64, device="cuda").half().movedim(-1, 1)
        y = torch.empty(3, 9, 9, rows + 6, device="cuda").half().movedim(-1, 1)
        ones = ((1, 1),) * 3
        sparse24_conv_cuda(x, packed, None, None, y.clone(), y, *ones, tile_pixels=tile)
    # Read 16 bytes at a time, by elements, and without tensor cores; with filters and pixels left over.
    for channels, groups, filters in ((40, 1, 136), (5, 1, 9), (1, 24, 24)):
        for tile in range(len(tiles())):
            x, y = (
                torch.randn(2, 9, 11, c, device="cuda").half().movedim(-1, 1)
                for c in (channels * groups, filters)
            )
            mask = torch.rand(filters, channels, 3, 3, device="cuda") < 0.3
            words = ops.reference.pack_mask(mask)
            weight = torch.randn(filters, 3, 3, channels, device="cuda").half()
            scale = torch.rand(filters, device="cuda")
            masked_conv_nhwc_cuda(
                [x, x.clone()],
                weight,
                [None, words],
                [scale, None],
                [None, scale],
                [None, y],
                [torch.empty_like(y), torch.empty_like(y)],
                (1, 1),
                (1, 1),
                (1, 1),
                groups,
                ("silu", 0.0),
                tile,
            )
    torch.cuda.synchronize()
    print("launched")


if __name__ == "__main__":
    main()
