"""`mine()`: score every sample of a data set into a folder that survives a crash."""

from fastpie.mining.epochs import EpochStatistics
from fastpie.mining.exemplars import pie
from fastpie.mining.recorder import Recorder
from fastpie.mining.result import MiningResult
from fastpie.mining.run import DEFAULT_LADDER, mine

__all__ = ["DEFAULT_LADDER", "EpochStatistics", "MiningResult", "Recorder", "mine", "pie"]
