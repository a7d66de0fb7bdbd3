"""Triton kernels: portable twins of the CUDA kernels, for GPUs and sizes those do not serve.

Installed as `fastpie.triton_kernels` and imported on first use only: importing Triton is slow, and
no part of fastpie needs it on a machine without a GPU. The functions trust their arguments; the
operators in `fastpie.ops` check them.
"""

from .disagreement import disagreement
from .embedding_disagreement import embedding_disagreement
from .masked_conv import TileConfig, masked_conv_configs, masked_conv_nhwc, pack_mask
from .masked_conv_backward import masked_conv_input_gradient, masked_conv_weight_gradient
from .masked_conv_parts import ACTIVATIONS
from .null import null
from .segmentation_disagreement import segmentation_disagreement
from .top_k import top_k_update

__all__ = [
    "ACTIVATIONS",
    "TileConfig",
    "disagreement",
    "embedding_disagreement",
    "masked_conv_configs",
    "masked_conv_input_gradient",
    "masked_conv_nhwc",
    "masked_conv_weight_gradient",
    "null",
    "pack_mask",
    "segmentation_disagreement",
    "top_k_update",
]
