"""Triton kernels: portable twins of the CUDA kernels, for GPUs and sizes those do not serve.

Installed as `fastpie.triton_kernels` and imported on first use only: importing Triton is slow, and
no part of fastpie needs it on a machine without a GPU. The functions trust their arguments; the
operators in `fastpie.ops` check them.
"""

from .disagreement import disagreement
from .null import null
from .top_k import top_k_update

__all__ = ["disagreement", "null", "top_k_update"]
