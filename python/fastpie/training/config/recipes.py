"""What a configuration chooses by name: recipes, optimizers, schedulers, masks.

A new recipe is one entry of `RECIPES`. Its first argument is the model; of its others `criterion`,
`task` and `layers` are filled in, and the rest are its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.optim.lr_scheduler

from fastpie.pruning import prune
from fastpie.training.attention.attention import Attention
from fastpie.training.config.augment import AUGMENTATIONS
from fastpie.training.config.fields import Place, check_options, imported, options_of, suggestion
from fastpie.training.masking.schedules import GradualPruning, IterativePruning
from fastpie.training.objectives.care import CARE
from fastpie.training.objectives.consistency import Consistency
from fastpie.training.objectives.objective import Objective, Supervised
from fastpie.training.objectives.sdclr import SDCLR
from fastpie.training.objectives.semi_supervised import MeanTeacher
from fastpie.training.objectives.two_stage import HeadRetraining, MetricLearning
from fastpie.training.objectives.weakly_supervised import WeaklySupervised

if TYPE_CHECKING:
    from fastpie.training.config.config import Named, TrainConfig

__all__ = ["MASKS", "RECIPES", "Recipe", "check_names", "named_class"]

_FILLED = ("criterion", "layers", "output", "task")  # see `configured`


@dataclass(frozen=True)
class Recipe:
    """How a training goes about it.

    Attributes:
        objective: its class.
        views: how many views of an image it can take.
        evaluated: whether its model classifies when it is done; else there is nothing to evaluate, and
            the weights kept are the last ones.
        attend: how it attends, if nothing is said: then it needs attention.
    """

    objective: Callable[..., Objective]
    views: tuple[int, ...] = (1,)
    evaluated: bool = True
    attend: str | None = None


RECIPES: Mapping[str, Recipe] = {
    "supervised": Recipe(Supervised),
    "consistency": Recipe(Consistency, attend="consistency"),
    "mean_teacher": Recipe(MeanTeacher, views=(1, 2)),
    "sdclr": Recipe(SDCLR, views=(2,), evaluated=False),
    "care": Recipe(CARE),
    "metric_learning": Recipe(MetricLearning),
    "head_retraining": Recipe(HeadRetraining),
    "weakly_supervised": Recipe(WeaklySupervised),
}


MASKS: Mapping[str, Callable[..., Any]] = {
    "fixed": prune,
    "gradual": GradualPruning,
    "iterative": IterativePruning,
}

_OF_ATTENTION = options_of(Attention, without=("model", "data", "task", "output"))


def check_names(config: TrainConfig) -> None:
    """Refuse names that are not known and options that what is named has not.

    Raises:
        FastpieError: with the field's path.
    """
    place = config.place
    recipe = _known(config.recipe, RECIPES, place / "recipe")
    _check(config.recipe, recipe.objective, place / "recipe", without=_FILLED, skip=1)
    at = place / "optimizer"
    _check(config.optimizer, named_class(config.optimizer.name, torch.optim, at), at, skip=1)
    if config.scheduler is not None:
        at = place / "scheduler"
        make = named_class(config.scheduler.name, torch.optim.lr_scheduler, at)
        _check(config.scheduler, make, at, skip=1)
    if config.masks is not None:
        at = place / "masks"
        makers = {prune, _known(config.masks, MASKS, at)}  # a schedule takes the options of prune
        known = {name for make in makers for name in inspect.signature(make).parameters}
        known -= {"model", "within", "pruning"}
        check_options(
            config.masks.options, sorted(known), at, f"masks that are {config.masks.name}"
        )
    if config.attention is not None:
        check_options(config.attention, _OF_ATTENTION, place / "attention", "Attention")
    for field in ("augment", "augment_second"):
        for number, entry in enumerate(getattr(config, field) or ()):
            at = place / field / str(number)
            if ":" not in entry.name:
                _check(entry, _known(entry, AUGMENTATIONS, at), at)
    second = config.augment_second is not None
    if second and 2 not in recipe.views:
        raise place.error(
            f"Expected no `augment_second`, as the recipe {config.recipe.name!r} takes one view of an "
            "image, but got one."
        )


def named_class(name: str, module: Any, place: Place) -> Callable[..., Any]:
    """A class of a module of torch, or `package.module:factory`.

    Raises:
        FastpieError: if there is none.
    """
    if ":" in name:
        make: Callable[..., Any] = imported(name, place / "name")
        return make
    known = [n for n, c in vars(module).items() if isinstance(c, type) and not n.startswith("_")]
    if name not in known:
        raise place.error(
            f"Expected `{(place / 'name').path}` to be a class of {module.__name__} or "
            f"package.module:factory, but got {name!r}.{suggestion(name, known)}"
        )
    found: Callable[..., Any] = getattr(module, name)
    return found


def _known(named: Named, table: Mapping[str, Any], place: Place) -> Any:
    if named.name not in table:
        raise place.error(
            f"Expected `{(place / 'name').path}` to be one of {list(table)}, but got {named.name!r}."
            f"{suggestion(named.name, table)}"
        )
    return table[named.name]


def _check(
    named: Named,
    make: Callable[..., Any],
    place: Place,
    *,
    without: tuple[str, ...] = (),
    skip: int = 0,
) -> None:
    known = options_of(make)
    if known is not None:
        known = [name for name in known[skip:] if name not in without]
    check_options(named.options, known, place, named.name)
