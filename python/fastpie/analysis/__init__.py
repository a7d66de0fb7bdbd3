"""What the disagreement means: the published analyses, with statistics, from runs or arrays."""

from fastpie.analysis.analysis import Analysis
from fastpie.analysis.predictions import Predictions

__all__ = ["Analysis", "Predictions"]
