"""What the disagreement means: the published analyses, with statistics, from runs or arrays."""

from fastpie.analysis.analysis import Analysis
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.quality import image_quality

__all__ = ["Analysis", "Predictions", "image_quality"]
