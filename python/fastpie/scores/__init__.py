"""How hard a sample is: disagreement measures and PIE definitions."""

from fastpie.scores.disagreement import disagreement
from fastpie.scores.pie import exemplars
from fastpie.scores.top_k import RunningTopK

__all__ = ["RunningTopK", "disagreement", "exemplars"]
