"""Training on what was mined."""

from fastpie.training.weights import hardness_weights

__all__ = ["hardness_weights"]
