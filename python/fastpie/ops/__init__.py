"""torch.library operators over the native kernels, each beside a readable twin.

One file holds one operator: schema, implementations, fake kernel and autograd. The twins are in
`reference.py`. How to add one: CONTRIBUTING.md, "A new operation".
"""

from fastpie.ops.alias_table import alias_table
from fastpie.ops.disagreement import disagreement
from fastpie.ops.dual_conv import dual_conv1d, dual_conv2d, dual_conv3d, dual_linear
from fastpie.ops.embedding_disagreement import embedding_disagreement
from fastpie.ops.magnitude_levels import magnitude_levels
from fastpie.ops.masked_conv import masked_conv1d, masked_conv2d, masked_conv3d, masked_linear
from fastpie.ops.normalize_uint8 import normalize_uint8
from fastpie.ops.null import null
from fastpie.ops.pack_mask import pack_mask
from fastpie.ops.segmentation_disagreement import segmentation_disagreement
from fastpie.ops.top_k import disagreement_top_k, top_k_update

__all__ = [
    "alias_table",
    "disagreement",
    "disagreement_top_k",
    "dual_conv1d",
    "dual_conv2d",
    "dual_conv3d",
    "dual_linear",
    "embedding_disagreement",
    "magnitude_levels",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv3d",
    "masked_linear",
    "normalize_uint8",
    "null",
    "pack_mask",
    "segmentation_disagreement",
    "top_k_update",
]
