"""How hard a sample is: disagreement measures and PIE definitions."""

from fastpie.scores.disagreement import disagreement
from fastpie.scores.pie import exemplars

__all__ = ["disagreement", "exemplars"]
