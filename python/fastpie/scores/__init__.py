"""How hard a sample is: disagreement measures and PIE definitions."""

from fastpie.scores.disagreement import disagreement
from fastpie.scores.pie import pie

__all__ = ["disagreement", "pie"]
