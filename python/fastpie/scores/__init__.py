"""How hard a sample is: disagreement measures, PIE definitions, selection."""

from fastpie.scores.disagreement import disagreement

__all__ = ["disagreement"]
