"""Both models in one call: `DualModel`, the truth, and `DualEngine`, the compiled one pass."""

from fastpie.dual.engine import DualEngine
from fastpie.dual.features import stage_features
from fastpie.dual.model import DualModel
from fastpie.dual.output import DualOutput, Features

__all__ = ["DualEngine", "DualModel", "DualOutput", "Features", "stage_features"]
