"""What the disagreement means: the published analyses, with statistics, from runs or arrays.

`analyze` calls everything that a run has data for; each table is also a function of its own.
"""

from fastpie.analysis.analysis import Analysis
from fastpie.analysis.analyze import analyze, analyze_predictions
from fastpie.analysis.classes import class_impact, class_ratios, count_ratios
from fastpie.analysis.doubt import label_in_doubt
from fastpie.analysis.folds import fold_predictions, fold_table
from fastpie.analysis.forgettability import class_changes, curves, levels, links
from fastpie.analysis.hardness import hardness_interval
from fastpie.analysis.metrics import measure
from fastpie.analysis.neighbours import (
    atypical,
    label_conflict,
    nearest_neighbours,
    neighbour_agreement,
    standardised,
)
from fastpie.analysis.pairs import pair_links, pairs, regression
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.probe import leave_one_out, probe_margins
from fastpie.analysis.quadrants import quadrants
from fastpie.analysis.quality import image_quality
from fastpie.analysis.stability import control_share, stability
from fastpie.analysis.subgroups import subgroups

__all__ = [
    "Analysis",
    "Predictions",
    "analyze",
    "analyze_predictions",
    "atypical",
    "class_changes",
    "class_impact",
    "class_ratios",
    "control_share",
    "count_ratios",
    "curves",
    "fold_predictions",
    "fold_table",
    "hardness_interval",
    "image_quality",
    "label_conflict",
    "label_in_doubt",
    "leave_one_out",
    "levels",
    "links",
    "measure",
    "nearest_neighbours",
    "neighbour_agreement",
    "pair_links",
    "pairs",
    "probe_margins",
    "quadrants",
    "regression",
    "stability",
    "standardised",
    "subgroups",
]
