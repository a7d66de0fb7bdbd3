"""Training on what was mined."""

from fastpie.training.sampler import HardnessSampler
from fastpie.training.weights import hardness_weights

__all__ = ["HardnessSampler", "hardness_weights"]
