"""Drop-ins for torch's layers that compute with the kept weights alone.

Each is a subclass of torch's own layer with one buffer more, `mask`. `apply_masks` makes them of the
layers of a model.
"""

from fastpie.nn.apply_masks import apply_masks, remove_masks
from fastpie.nn.masked_layers import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedLinear",
    "apply_masks",
    "remove_masks",
]
