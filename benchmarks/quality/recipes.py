"""The recipes that are compared: baselines, attention and its controls, and what is built on the dual forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastpie
from benchmarks.quality.imbalance import Imbalanced
from benchmarks.quality.networks import UNet, build
from benchmarks.quality.samples import train_of
from fastpie.scores.cam import CamLayers
from fastpie.scores.cam_disagreement import CamDisagreement
from fastpie.training.attention.attention import Attention
from fastpie.training.criteria.criterion import class_counts, criterion
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning
from fastpie.training.objectives.care import CARE
from fastpie.training.objectives.consistency import Consistency
from fastpie.training.objectives.objective import Objective, Supervised
from fastpie.training.objectives.sdclr import SDCLR
from fastpie.training.objectives.semi_supervised import MeanTeacher
from fastpie.training.objectives.two_stage import HeadRetraining, MetricLearning
from fastpie.training.objectives.views import TwoViews
from fastpie.training.objectives.weakly_supervised import WeaklySupervised
from fastpie.training.trainer.trainer import Trainer

__all__ = ["ADJUSTED", "RECIPES", "Recipe", "Setting", "setting_of", "train"]

LEARNING_RATE = 0.003
WEIGHT_DECAY = 0.02
FRACTION = 0.15  # of the samples that attention calls hard
STRENGTH = 8.0  # they are drawn so many times more often, beside once
LABELLED = 0.2  # of the samples, where labels are few
MAPS = CamLayers("stages", "head")  # of the benchmark's classifiers
CLASSIFICATION = ("multiclass", "multilabel")
ADJUSTED = "logit adjustment"


@dataclass(frozen=True)
class Setting:
    """What all recipes of a set share.

    Attributes:
        network: name of it.
        epochs: of the training; a recipe of two stages has as many in all.
        batch_size: of a step.
        warmup: epochs before the attention mines first.
        every: epochs from one mining to the next.
    """

    network: str
    epochs: int
    batch_size: int
    warmup: int
    every: int = 5


_SETTINGS = {
    "digits": Setting("resnet10", 30, 32, 10),
    "chest film": Setting("resnet10", 16, 64, 5, 3),
    "skin, classes": Setting("resnet10 fine", 24, 64, 8, 4),
    "skin, masks": Setting("unet", 16, 32, 5, 3),
}


def setting_of(name: str) -> Setting:
    """Of a set."""
    return _SETTINGS[name]


@dataclass
class Training:
    """A recipe at work on one set.

    Attributes:
        data: the set.
        setting: of it.
        seed: of weights, order and augmentation.
        model: fresh; what is evaluated at the end.
        epochs: of the last `run`, for its schedule.
    """

    data: Imbalanced
    setting: Setting
    seed: int
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        channels, size = self.data.images.shape[1], self.data.images.shape[-1]
        if self.setting.network == "unet":
            torch.manual_seed(self.seed)
            self.model = UNet(channels)
        else:
            self.model = build(self.setting.network, channels, size, self.data.classes, self.seed)

    def criterion(self, name: str, **options: Any) -> Any:
        """A criterion of the set's task; counts of classes go to those that want them."""
        wants = ("class_balanced", "logit_adjusted", "ldam")
        counts = None
        if name in wants:
            counts = class_counts(self.data.labels, self.data.classes, self.data.task)
        return criterion(name, self.data.task, counts=counts, **options)

    def attention(self, data: Any = None, model: Any = None, **options: Any) -> Attention:
        """Of the training set as it is."""
        settings = {
            "warmup": self.setting.warmup, "every": self.setting.every, "attend": "oversample",
            "fraction": FRACTION, "strength": STRENGTH, **options,
        }  # fmt: skip
        return Attention(
            self.model if model is None else model,
            train_of(self.data, augment=False) if data is None else data,
            task=self.data.task, seed=self.seed, batch_size=250, backend="reference", **settings,
        )  # fmt: skip

    def run(
        self,
        objective: Objective,
        *,
        data: Any = None,
        epochs: int | None = None,
        learning_rate: float = LEARNING_RATE,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """Train by AdamW and one cycle of the learning rate."""
        epochs = epochs or self.setting.epochs
        data = train_of(self.data, augment=True) if data is None else data
        steps = -(-len(data) // self.setting.batch_size)
        trained = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=epochs * steps
        )
        masked = options.pop("masked", None)
        Trainer(
            objective, data, optimizer=optimizer, epochs=epochs, scheduler=schedule,
            scheduler_per_step=True, batch_size=self.setting.batch_size,
            masked=None if masked is None else masked(self.model, optimizer, epochs * steps),
            seed=self.seed if seed is None else seed, progress=False, **options,
        ).fit()  # fmt: skip


class KnownGroups:
    """Attention that knows the groups: what could be reached if they were found."""

    attend = "oversample"

    def __init__(self, data: Imbalanced) -> None:
        weights = 1 + STRENGTH * (data.group > 0) * ~data.wrong
        self._weights = weights / weights.sum()

    def weights(self, ids: Any, device: Any = None) -> Tensor:
        return torch.ones(len(ids), device=device)

    def hard(self, ids: Any, device: Any = None) -> Tensor:
        return self.weights(ids, device) > 1

    def draw_weights(self, ids: Any = None) -> np.ndarray:
        return self._weights

    def step(self, epoch: int) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        name: in tables.
        family: "baseline", "control", "fastpie" or "combination".
        run: does it.
        tasks: that it is for.
        masks: whether it wants masks of the training images.
        control: name of the recipe that it has to beat, or None.
    """

    name: str
    family: str
    run: Callable[[Training], None]
    tasks: tuple[str, ...] = CLASSIFICATION
    control: str | None = None
    masks: bool = False


def train(recipe: Recipe, data: Imbalanced, setting: Setting, seed: int) -> nn.Module:
    """A network trained by a recipe, in eval mode."""
    training = Training(data, setting, seed)
    recipe.run(training)
    return training.model.eval()


def _by(t: Training, loss: str = "", **options: Any) -> None:
    """A criterion alone."""
    t.run(Supervised(t.model, t.criterion(loss or _plain(t), **options)))


def _attending(t: Training, loss: str = "", **options: Any) -> None:
    """A criterion and attention."""
    attention = t.attention(**options)
    t.run(Supervised(t.model, t.criterion(loss or _plain(t))), attention=attention)


def _knowing(t: Training, loss: str = "") -> None:
    attention = KnownGroups(t.data)
    t.run(Supervised(t.model, t.criterion(loss or _plain(t))), attention=attention)


def _consistent(t: Training, loss: str = "", **options: Any) -> None:
    objective = Consistency(t.model, t.criterion(loss or _plain(t)), task=t.data.task)
    t.run(objective, attention=t.attention(attend="consistency", **options))


def _care(t: Training, loss: str, **options: Any) -> None:
    rare = np.argsort(t.data.counts)[: t.data.classes // 2].tolist()
    objective = CARE(
        t.model, t.criterion(loss), layer="stages", rare_classes=rare,
        start_epoch=t.setting.warmup, **options,
    )  # fmt: skip
    t.run(objective)


def _metric(t: Training, metric: str) -> None:
    """Three quarters of the epochs for the features, the rest for the head."""
    epochs = t.setting.epochs * 3 // 4
    t.run(MetricLearning(t.model, t.criterion("cross_entropy"), metric), epochs=epochs)
    t.run(HeadRetraining(t.model, t.criterion("logit_adjusted")), epochs=t.setting.epochs - epochs)


def _contrastive(t: Training, sparsity: float) -> None:
    """As many epochs without labels as with them afterwards."""
    views = TwoViews(train_of(t.data, augment=False), partial(_view, mirror=t.data.classes == 6))
    t.run(SDCLR(t.model, sparsity=sparsity, seed=t.seed), data=views)
    _by(t, "logit_adjusted")


def _view(image: Tensor, mirror: bool) -> Tensor:
    """Moved, cut out, brighter or darker, with noise: what does not change the class."""
    size = image.shape[-1]
    most = max(1, size // 8)
    image = image.roll(torch.randint(-most, most + 1, (2,)).tolist(), (-2, -1))
    if mirror and torch.rand(()) < 0.5:
        image = image.flip(-1)
    image = image * (0.7 + 0.6 * torch.rand(())) + 0.4 * (torch.rand(()) - 0.5)
    return image + 0.1 * torch.randn_like(image)


def _looking_alike(t: Training, method: str) -> None:
    """The dense model looks where its pruned self looks."""
    t.run(WeaklySupervised(t.model, t.criterion(_LA), MAPS, method=method, seed=t.seed))


def _by_maps(t: Training) -> None:
    dual = fastpie.DualModel(t.model, fastpie.prune(t.model, 0.5), features=MAPS.features)
    attention = t.attention(model=dual, score=CamDisagreement(MAPS))
    t.run(Supervised(t.model, t.criterion(_LA)), attention=attention)


def _few(t: Training, teacher: bool = True, score: str | None = None) -> None:
    """Labels of a part of the samples; with a score, attention to those without that it finds hard."""
    rng = np.random.default_rng([t.seed, 99])
    labels = np.where(rng.random(len(t.data.labels)) < LABELLED, t.data.labels, -1)
    known = np.bincount(labels[labels >= 0], minlength=t.data.classes).clip(1)
    few = replace(t.data, labels=labels)
    loss = criterion(_LA, t.data.task, counts=known)
    if not teacher:
        seen = labels >= 0
        part = replace(few, images=t.data.images[seen], labels=labels[seen], masks=None)
        # As many steps as the others take.
        data = torch.utils.data.ConcatDataset([train_of(part, augment=True)] * round(1 / LABELLED))
        t.run(Supervised(t.model, loss), data=_WithoutIds(data))
        return
    attention = None
    if score is not None:
        plain = train_of(few, augment=False)
        attention = t.attention(plain, score=score, guard=None, attend="consistency")
    objective = MeanTeacher(t.model, loss, weight=10.0, hard_weight=0.0 if score is None else 4.0)
    t.run(objective, data=train_of(few, augment=True), attention=attention)


class _WithoutIds(torch.utils.data.Dataset[Any]):
    """Samples several times over: their ids would come more than once."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return {k: v for k, v in self._data[index].items() if k != "sample_id"}


def _masked(t: Training, loss: str, sparsity: float) -> None:
    """Pruned gradually while it is trained."""

    def masked(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> MaskedTraining:
        schedule = GradualPruning(sparsity, begin=steps // 4, end=steps // 2, every=20)
        return MaskedTraining(model, schedule, optimizer)

    t.run(Supervised(t.model, t.criterion(loss)), masked=masked)


def _plain(t: Training) -> str:
    return "dice_cross_entropy" if t.data.task == "segmentation" else "cross_entropy"


_LA = "logit_adjusted"
_MULTICLASS, _MULTILABEL, _SEGMENTATION = ("multiclass",), ("multilabel",), ("segmentation",)


def _recipes() -> tuple[Recipe, ...]:
    everywhere, adjusted = (*CLASSIFICATION, "segmentation"), ADJUSTED
    known, dense = "groups known, oversampled", "attention, dense loss"
    few, teacher = f"{LABELLED:.0%} labelled: {adjusted}", f"{LABELLED:.0%} labelled: mean teacher"

    def attending(
        what: str, family: str = "fastpie", control: str = dense, **options: Any
    ) -> list[Recipe]:
        """On masks, and of classes on top of logit adjustment."""
        what = f"attention, {what}"
        control = control if family == "fastpie" else None
        above = None if control is None else f"{adjusted} + {control}"
        return [
            Recipe(what, family, partial(_attending, **options), _SEGMENTATION, control),
            Recipe(
                f"{adjusted} + {what}",
                family,
                partial(_attending, loss=_LA, **options),
                control=above,
            ),
        ]

    def of_classes(
        name: str,
        run: Callable[..., None] = _attending,
        tasks: tuple[str, ...] = CLASSIFICATION,
        family: str = "fastpie",
        control: str | None = f"{adjusted} + {dense}",
        masks: bool = False,
        **options: Any,
    ) -> Recipe:
        return Recipe(name, family, partial(run, **options), tasks, control, masks)

    return (
        Recipe("plain", "baseline", _by, everywhere),
        of_classes("class-balanced weights", _by, family="baseline", control=None, loss="class_balanced"),
        of_classes("focal loss", _by, family="baseline", control=None, loss="focal"),
        of_classes("LDAM-DRW", _by, _MULTICLASS, "baseline", None, loss="ldam", scale=1.0, reweight_from=20),
        of_classes("asymmetric loss", _by, _MULTILABEL, "baseline", None, loss="asymmetric"),
        of_classes("two-stage, triplet", _metric, _MULTICLASS, "baseline", None, metric="triplet"),
        of_classes(adjusted, _by, family="baseline", control=None, loss=_LA),
        # Attention, by the loss alone.
        of_classes(dense, family="control", control=None, score="loss_dense"),
        of_classes("attention, pruned loss", control=dense, score="loss_pruned"),
        of_classes(f"{dense}, weights by rank", family="control", control=None, score="loss_dense", attend="soft"),
        of_classes("attention, pruned margin, weights by rank", control=f"{dense}, weights by rank", score="margin_pruned", attend="soft"),
        # Attention on top of what labels can tell, and to masks.
        *attending("random", "control", score="random", guard=None),
        *attending("dense loss", "control", score="loss_dense"),
        Recipe(known, "control", _knowing, _SEGMENTATION),
        of_classes(f"{adjusted} + {known}", _knowing, family="control", control=None, loss=_LA),
        *attending("pruned loss", score="loss_pruned"),
        *attending("dense loss, weights by rank", "control", score="loss_dense", attend="soft"),
        *attending("pruned loss, weights by rank", control=f"{dense}, weights by rank", score="loss_pruned", attend="soft"),
        *attending("pruned loss, not guarded", score="loss_pruned", guard=None),
        *attending("damage", score="damage"),
        Recipe("attention, 1 - soft IoU of both", "fastpie", partial(_attending, score="iou_soft"), _SEGMENTATION, dense),
        of_classes(f"{adjusted} + attention, js", loss=_LA, score="js"),
        of_classes(f"{adjusted} + attention, pruned margin", loss=_LA, score="margin_pruned"),
        of_classes(f"{adjusted} + attention, pruned margin, weights by rank", control=f"{adjusted} + {dense}, weights by rank", loss=_LA, score="margin_pruned", attend="soft"),
        of_classes(f"{adjusted} + attention, pruned loss, drawn 3 times", loss=_LA, score="loss_pruned", strength=2.0),
        of_classes(f"{adjusted} + attention, pruned loss, within classes", loss=_LA, score="loss_pruned", per="label"),
        of_classes(f"{adjusted} + attention, pruned loss, guarded by the probe", tasks=_MULTICLASS, loss=_LA, score="loss_pruned", guard="probe"),
        Recipe("consistency", "fastpie", partial(_consistent, score="iou_soft"), _SEGMENTATION, dense),
        of_classes(f"{adjusted} + consistency", _consistent, loss=_LA),
        # Other recipes on the dual forward.
        of_classes("SimCLR, then logit adjustment", _contrastive, family="control", control=None, sparsity=0.0),
        of_classes("SDCLR, then logit adjustment", _contrastive, control="SimCLR, then logit adjustment", sparsity=0.9),
        of_classes(f"{adjusted} + pruned gradually to .5", _masked, control=adjusted, loss=_LA, sparsity=0.5),
        # Localisation from image labels; CARE is given masks of the rare classes.
        of_classes(f"{adjusted} + maps as with random masks", _looking_alike, family="control", control=None, masks=True, method="random"),
        of_classes(f"{adjusted} + maps as with pruned weights", _looking_alike, control=f"{adjusted} + maps as with random masks", masks=True, method="l1"),
        of_classes(f"{adjusted} + attention, maps of both", _by_maps, masks=True),
        of_classes("CARE", _care, control="plain", masks=True, loss="cross_entropy"),
        of_classes(f"{adjusted} + CARE by area", _care, control=adjusted, masks=True, loss=_LA, alpha=0.5, by_area=True, second_order=True, reduction="mean"),
        # Few labels.
        of_classes(few, _few, _MULTICLASS, "baseline", None, teacher=False),
        of_classes(teacher, _few, _MULTICLASS, "fastpie", few),
        of_classes(f"{teacher} + attention, random", _few, _MULTICLASS, "control", None, score="random"),
        of_classes(f"{teacher} + attention, js", _few, _MULTICLASS, "fastpie", f"{teacher} + attention, random", score="js"),
    )  # fmt: skip


RECIPES = _recipes()
