"""Training on what was mined."""

from fastpie.scores.cam_disagreement import CamDisagreement
from fastpie.training.attention import Attention
from fastpie.training.boxes import BoxLoss, SupervisedBoxes, box_disagreement
from fastpie.training.care import CARE
from fastpie.training.consistency import Consistency, consistency
from fastpie.training.contrastive import nt_xent
from fastpie.training.criteria import class_counts, criterion
from fastpie.training.epoch_sampler import EpochSampler
from fastpie.training.masked import MaskedTraining
from fastpie.training.masking_schedules import GradualPruning, IterativePruning, MaskingSchedule
from fastpie.training.objective import Objective, Supervised, TrainBatch
from fastpie.training.sampler import HardnessSampler
from fastpie.training.sdclr import SDCLR
from fastpie.training.segmentation_loss import segmentation_loss
from fastpie.training.semi_supervised import MeanTeacher
from fastpie.training.trainer import Trainer, TrainResult
from fastpie.training.two_stage import HeadRetraining, MetricLearning, class_balanced_draw_weights
from fastpie.training.views import TwoViews
from fastpie.training.weakly_supervised import WeaklySupervised
from fastpie.training.weights import hardness_weights

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
