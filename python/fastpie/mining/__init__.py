"""`mine()`: score every sample of a data set into a folder that survives a crash."""

from fastpie.mining.exemplars import pie
from fastpie.mining.result import MiningResult
from fastpie.mining.run import DEFAULT_LADDER, mine

__all__ = ["DEFAULT_LADDER", "MiningResult", "mine", "pie"]
