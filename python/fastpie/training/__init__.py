"""Training on what was mined."""

from fastpie.scores.cam_disagreement import CamDisagreement
from fastpie.training.attention.attention import Attention
from fastpie.training.attention.segmentation_loss import segmentation_loss
from fastpie.training.criteria.criterion import class_counts, criterion
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning, IterativePruning, MaskingSchedule
from fastpie.training.objectives.boxes import BoxLoss, SupervisedBoxes, box_disagreement
from fastpie.training.objectives.care import CARE
from fastpie.training.objectives.consistency import Consistency, consistency
from fastpie.training.objectives.contrastive import nt_xent
from fastpie.training.objectives.objective import Objective, Supervised, TrainBatch
from fastpie.training.objectives.sdclr import SDCLR
from fastpie.training.objectives.semi_supervised import MeanTeacher
from fastpie.training.objectives.two_stage import (
    HeadRetraining,
    MetricLearning,
    class_balanced_draw_weights,
)
from fastpie.training.objectives.views import TwoViews
from fastpie.training.objectives.weakly_supervised import WeaklySupervised
from fastpie.training.sampling.epoch_sampler import EpochSampler
from fastpie.training.sampling.hardness_sampler import HardnessSampler
from fastpie.training.sampling.weights import hardness_weights
from fastpie.training.trainer.trainer import Trainer, TrainResult

__all__ = [
    "CARE",
    "SDCLR",
    "Attention",
    "BoxLoss",
    "CamDisagreement",
    "Consistency",
    "EpochSampler",
    "GradualPruning",
    "HardnessSampler",
    "HeadRetraining",
    "IterativePruning",
    "MaskedTraining",
    "MaskingSchedule",
    "MeanTeacher",
    "MetricLearning",
    "Objective",
    "Supervised",
    "SupervisedBoxes",
    "TrainBatch",
    "TrainResult",
    "Trainer",
    "TwoViews",
    "WeaklySupervised",
    "box_disagreement",
    "class_balanced_draw_weights",
    "class_counts",
    "consistency",
    "criterion",
    "hardness_weights",
    "nt_xent",
    "segmentation_loss",
]
