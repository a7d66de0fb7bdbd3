"""From a checked configuration to trainers: recipes by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastpie.errors import FastpieError
from fastpie.training.criteria import class_counts, criterion
from fastpie.training.masked import MaskedTraining
from fastpie.training.masking_schedules import GradualPruning
from fastpie.training.objective import Objective, Supervised
from fastpie.training.trainer import Trainer

if TYPE_CHECKING:
    from fastpie.training.config import Config, Named

__all__ = ["RECIPES", "Augmented", "trainers"]

RECIPES = ("plain", "consistency", "care", "mean_teacher", "two_stage", "sdclr")
"""plain: the criterion alone; the others are the objectives of these names."""


class Augmented(Dataset[Any]):
    """A data set of `(image, label, sample_id)` whose images go through a function."""

    def __init__(self, dataset: Any, augment: Callable[[Any], Any]) -> None:
        """Join them."""
        self.dataset, self.augment = dataset, augment
        self.sample_ids, self.paths = dataset.sample_ids, dataset.paths
        self.fingerprint = dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label, sample_id = self.dataset[index]
        return self.augment(image), label, sample_id


def trainers(
    config: Config,
    model: nn.Module,
    train: Any,
    valid: Any,
    device: str,
    *,
    progress: bool | None = None,
) -> Iterator[Trainer]:
    """The trainings of a recipe, one after another, each begun when the one before has ended.

    Args:
        config: checked.
        model: the network, on the device.
        train: a `ManifestDataset`, without augmentation.
        valid: another, or None.
        device: to train on.
        progress: whether to show bars; None: on a terminal.

    Raises:
        FastpieError: for names and options that do not fit, with the section.
    """
    recipe = config.recipe
    if recipe.name not in RECIPES:
        raise FastpieError(
            f"Expected `recipe.name` to be one of {RECIPES}, but got {recipe.name!r}."
        )
    task = train.manifest.task or "multiclass"
    augment = None
    if config.data.augment is not None:
        factory = imported("data.augment", config.data.augment)
        augment = called("data.augment_args", factory, **config.data.augment_args)
    data: Any = train if augment is None else Augmented(train, augment)
    if recipe.name == "sdclr":
        from fastpie.training.sdclr import SDCLR
        from fastpie.training.views import TwoViews

        if augment is None:
            raise FastpieError(
                "Expected `data.augment` for the recipe sdclr, which makes its views."
            )
        objective = called("recipe", SDCLR, model, **recipe.options)
        yield _trainer(
            config, objective, TwoViews(train, augment), None, train, config.out, device, progress
        )
        return
    loss = _criterion(config, train, model, task)
    options = dict(recipe.options)
    if recipe.name == "two_stage":
        from fastpie.training.two_stage import (
            HeadRetraining,
            MetricLearning,
            class_balanced_draw_weights,
        )

        metric = called(
            "recipe", MetricLearning, model, loss, output=config.model.output, **options
        )
        yield _trainer(
            config, metric, data, valid, train, f"{config.out}/stage-1", device, progress
        )
        head = HeadRetraining(model, loss, output=config.model.output)
        draws = class_balanced_draw_weights(train.labels)
        yield _trainer(
            config,
            head,
            data,
            valid,
            train,
            f"{config.out}/stage-2",
            device,
            progress,
            draw_weights=draws,
        )
        return
    yield _trainer(
        config,
        _objective(config, model, loss, task),
        data,
        valid,
        train,
        config.out,
        device,
        progress,
    )


def _objective(config: Config, model: nn.Module, loss: Any, task: str) -> Objective:
    makers: dict[str, tuple[str, str]] = {
        "consistency": ("fastpie.training.consistency", "Consistency"),
        "care": ("fastpie.training.care", "CARE"),
        "mean_teacher": ("fastpie.training.semi_supervised", "MeanTeacher"),
    }
    options = {"output": config.model.output, **config.recipe.options}
    if config.recipe.name == "plain":
        return called("recipe", Supervised, model, loss, **options)  # type: ignore[no-any-return]
    module, name = makers[config.recipe.name]
    maker = getattr(importlib.import_module(module), name)
    if "task" in inspect.signature(maker).parameters:
        options = {"task": task, **options}
    return called("recipe", maker, model, loss, **options)  # type: ignore[no-any-return]


def _criterion(config: Config, train: Any, model: nn.Module, task: str) -> Any:
    if train.labels is None:
        raise FastpieError(
            "Expected labels to train on; name them in `data.manifest.labels`, or take the recipe sdclr."
        )
    classes = None if train.class_names is None else len(train.class_names)
    counts = class_counts(train.labels, classes, task)
    return called(
        "criterion", criterion, config.criterion.name, task, counts, **config.criterion.options
    )


def _trainer(
    config: Config,
    objective: Objective,
    data: Any,
    valid: Any,
    plain: Any,
    out: str,
    device: str,
    progress: bool | None,
    *,
    draw_weights: Any = None,
) -> Trainer:
    objective.to(device)
    optimizer = _of_torch("optimizer", torch.optim, config.optimizer, torch.optim.Optimizer)(
        [p for p in objective.parameters() if p.requires_grad]
    )
    scheduler = None
    if config.scheduler is not None:
        schedulers = torch.optim.lr_scheduler
        kinds = schedulers.LRScheduler, schedulers.ReduceLROnPlateau
        scheduler = _of_torch("scheduler", schedulers, config.scheduler, kinds)(optimizer)
    attention = None
    if config.attention is not None:
        from fastpie.training.attention import Attention

        options = {"task": plain.manifest.task or "multiclass", "output": config.model.output}
        attention = called(
            "attention", Attention, objective.model, plain, **(options | config.attention)
        )
    return Trainer(
        objective,
        data,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_per_step=config.scheduler_per_step,
        epochs=config.epochs,
        batch_size=config.batch_size,
        attention=attention,
        draw_weights=draw_weights,
        masked=_masked(config, objective.model, optimizer),
        valid=valid,
        monitor=config.monitor if valid is not None else None,
        patience=config.patience if valid is not None else None,
        clip=config.clip,
        precision=config.precision,
        compile=config.compile,
        device=device,
        num_workers=config.workers,
        seed=config.seed,
        out=out,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        log=config.log,
        progress=progress,
    )


def _masked(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer
) -> MaskedTraining | None:
    from fastpie.pruning import prune

    masks = config.masks
    if masks is None:
        return None
    if masks.begin is None or masks.end is None:
        return MaskedTraining(model, prune(model, masks.sparsity, scope=masks.scope), optimizer)
    schedule = GradualPruning(
        masks.sparsity, begin=masks.begin, end=masks.end, every=masks.every, scope=masks.scope
    )
    return MaskedTraining(model, schedule, optimizer)


def _of_torch(section: str, module: Any, named: Named, kind: Any) -> Callable[[Any], Any]:
    made = getattr(module, named.name, None)
    if not (inspect.isclass(made) and issubclass(made, kind)):
        known = sorted(
            n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, kind)
        )
        raise FastpieError(
            f"Expected `{section}.name` to be one of {known}, but got {named.name!r}."
        )
    return lambda first: called(section, made, first, **named.options)


def imported(section: str, name: str) -> Any:
    """What `package.module:name` names.

    Raises:
        FastpieError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise FastpieError(f"Expected `{section}` to name a function, but: {error}") from error


def called(section: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call with the options of a section.

    Raises:
        FastpieError: for options that it does not take, with the section.
    """
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise FastpieError(f"Expected other options in `{section}`: {error}.") from error
    try:
        return function(*args, **options)
    except (TypeError, ValueError) as error:  # FastpieError is a ValueError
        raise FastpieError(f"`{section}`: {error}") from error
