"""A training as a configuration describes it: one stage, built from its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastpie.dual import DualModel
from fastpie.errors import FastpieError
from fastpie.mining.ranks import Ranks
from fastpie.pruning import prune
from fastpie.scores.cam import cam_layers
from fastpie.scores.cam_disagreement import CamDisagreement
from fastpie.training.attention.attention import Attention
from fastpie.training.config.augment import AUGMENTATIONS, Augmented, Compose
from fastpie.training.config.config import Named, TrainConfig
from fastpie.training.config.data import TrainingData
from fastpie.training.config.fields import Place, check_options, imported, made, options_of
from fastpie.training.config.recipes import MASKS, RECIPES, named_class
from fastpie.training.criteria.criterion import CRITERIA, criterion
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import IterativePruning
from fastpie.training.objectives.objective import Objective, Supervised
from fastpie.training.objectives.two_stage import class_balanced_draw_weights
from fastpie.training.objectives.views import TwoViews
from fastpie.training.trainer.evaluation import evaluate_model
from fastpie.training.trainer.feed import Feed
from fastpie.training.trainer.randomness import generators_kept, seed_everything, seed_of
from fastpie.training.trainer.trainer import Trainer

__all__ = ["ConfiguredTraining"]

_INITIAL = 4  # what a seed is for; the Trainer's are 0 to 3
_IMAGES_TRIED = 256


class ConfiguredTraining:
    """One stage of a configuration, built and ready to fit.

    Attributes:
        data: the samples.
        model: the network.
        trainer: with all the rest.
        monitor: what epochs are compared by, None for nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path | None,
        *,
        weights: Path | None = None,
        device: str | None = None,
        progress: bool | None = None,
    ) -> None:
        """Open the data and build everything; nothing is written.

        Args:
            config: of the stage.
            out: its folder.
            weights: to begin with, instead of the configuration's.
            device: instead of the configuration's.
            progress: whether to show bars.

        Raises:
            FastpieError: naming the field.
        """
        self.config, self._place = config, config.place
        self._device = device or config.device
        recipe = RECIPES[config.recipe.name]
        self.data = TrainingData.of_config(config.data, self._place / "data")
        self.monitor = config.monitor
        if self.monitor is None and self.data.valid is not None and recipe.evaluated:
            self.monitor = "valid_loss"
        with generators_kept(torch.device("cpu")):
            seed_everything(seed_of(_INITIAL, config.seed))
            self.model = self._network(weights or config.model.weights)
            objective = self._objective()
            train = self._augmented(recipe.views)
            optimizer = self._optimizer(objective)
            scheduler = self._scheduler(optimizer, len(train))
            attention = self._attention(recipe.attend)
            masked = self._masked(optimizer, scheduler)
            self.objective = objective
            with self._place.naming(TrainConfig.model_fields):
                self.trainer = Trainer(
                    objective,
                    train,
                    optimizer=optimizer,
                    epochs=config.epochs,
                    batch_size=config.batch_size,
                    scheduler=scheduler,
                    scheduler_per_step=config.scheduler is not None
                    and config.scheduler.per == "step",
                    attention=attention,
                    draw_weights=self._draws(),
                    masked=masked,
                    valid=self.data.valid if recipe.evaluated else None,
                    monitor=self.monitor,
                    patience=config.patience,
                    clip=config.clip,
                    precision=config.precision,
                    compile=config.compile,
                    device=self._device,
                    num_workers=config.workers,
                    seed=config.seed,
                    out=out,
                    checkpoint_every=config.checkpoint_every,
                    checkpoint_minutes=config.checkpoint_minutes,
                    log=config.log if out is not None else None,
                    progress=progress,
                )

    def summary(self) -> list[str]:
        """Lines that say what is trained on what."""
        trained = sum(p.numel() for p in self.objective.parameters() if p.requires_grad)
        return [*self.data.summary(), f"{trained} parameters to train, {self.config.epochs} epochs"]

    def test(self, weights: Path, ranks: Ranks) -> dict[str, float] | None:
        """Metrics on the test set with these weights, see `evaluate_model`; None without one."""
        if self.data.test is None or not RECIPES[self.config.recipe.name].evaluated:
            return None
        model = self._network(weights)
        objective = Supervised(model, self._criterion(), output=self.config.model.output)
        feed = Feed(
            self.data.test, batch_size=self.config.batch_size, num_workers=self.config.workers
        )
        device = torch.device(self._device)
        metrics, _ = evaluate_model(objective, feed, ranks, device, nullcontext())
        return metrics

    # ------------------------------------------------------------------ the parts

    def _network(self, weights: str | Path | None) -> nn.Module:
        section, place = self.config.model, self._place / "model"
        model = made({"factory": section.factory, "args": section.args}, place)
        if not isinstance(model, nn.Module):
            raise place.error(
                f"Expected `{place.path}` to make an nn.Module, but got {type(model).__name__}."
            )
        with (place / "weights").naming():
            if weights is not None:
                _load(model, Path(weights))
        with (self._place / "device").naming():
            try:
                return model.to(self._device)
            except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
                raise FastpieError(f"Expected one that torch can use, but: {error}") from error

    def _criterion(self) -> Any:
        named, place = self.config.criterion, self._place / "criterion"
        options = _made(named.options, place)
        with place.naming(options):
            if ":" in named.name:
                return imported(named.name, place / "name")(**options)
            make = CRITERIA[self.data.task].get(named.name)
            if make is not None:
                check_options(options, options_of(make, without=("counts",)), place, named.name)
            return criterion(named.name, self.data.task, self.data.counts, **options)

    def _objective(self) -> Objective:
        named, place = self.config.recipe, self._place / "recipe"
        recipe = RECIPES[named.name]
        fill: dict[str, Callable[[], Any]] = {
            "criterion": self._criterion,
            "task": lambda: self.data.task,
            "output": lambda: self.config.model.output,
            "layers": self._layers,
        }
        arguments = inspect.signature(recipe.objective).parameters
        filled = {name: make() for name, make in fill.items() if name in arguments}
        options = _made(named.options, place)
        with place.naming(arguments):
            return recipe.objective(self.model, **filled, **options)

    def _augmented(self, views: tuple[int, ...]) -> Any:
        first = self._transform("augment")
        if 2 in views and (1 not in views or self.config.augment_second is not None):
            given = self.config.augment_second is not None
            second = self._transform("augment_second") if given else None
            return TwoViews(self.data.train, first, second)
        return Augmented(self.data.train, first) if first.transforms else self.data.train

    def _transform(self, field: str) -> Compose:
        return Compose(
            [
                self._one_transform(entry, self._place / field / str(number))
                for number, entry in enumerate(getattr(self.config, field))
            ]
        )

    def _one_transform(self, entry: Named, place: Place) -> Callable[[Any], Any]:
        make = imported(entry.name, place) if ":" in entry.name else AUGMENTATIONS[entry.name]
        with place.naming(entry.options):
            transform: Callable[[Any], Any] = make(**_made(entry.options, place))
            return transform

    def _optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        named, place = self.config.optimizer, self._place / "optimizer"
        make = named_class(named.name, torch.optim, place)
        with place.naming(named.options):
            optimizer: torch.optim.Optimizer = make(
                [p for p in objective.parameters() if p.requires_grad], **named.options
            )
            return optimizer

    def _scheduler(self, optimizer: torch.optim.Optimizer, samples: int) -> Any:
        named, place = self.config.scheduler, self._place / "scheduler"
        if named is None:
            return None
        make = named_class(named.name, torch.optim.lr_scheduler, place)
        steps = self.config.epochs
        if named.per == "step":
            steps *= -(-samples // self.config.batch_size)
        whole = {
            name: steps for name in ("total_steps", "T_max") if name in (options_of(make) or ())
        }
        with place.naming(named.options):
            return make(optimizer, **{**whole, **named.options})

    def _attention(self, attend: str | None) -> Attention | None:
        place = self._place / "attention"
        options = self.config.attention
        if options is None:
            if attend is None:
                return None
            options = {}
        given: dict[str, Any] = {
            "task": self.data.task,
            "output": self.config.model.output,
            "num_workers": self.config.workers,
            **({} if attend is None else {"attend": attend}),
            **_made(options, place),
        }
        model: nn.Module | DualModel = self.model
        with place.naming(options):
            if given.get("score") == "cam":
                layers = self._layers()
                levels = given.pop("sparsity", 0.5)
                model = DualModel(model, prune(model, levels), features=layers.features)
                given["score"] = CamDisagreement(layers, output=given["output"])
            if isinstance(given.get("per"), str) and given["per"] != "label":
                given["per"] = self._attribute(given["per"])
            return Attention(model, self.data.train, **given)

    def _attribute(self, column: str) -> list[Any]:
        manifest = getattr(self.data.train, "manifest", None)
        columns = getattr(manifest, "table", None)
        names = [] if columns is None else columns.column_names
        if columns is None or column not in names:
            raise FastpieError(
                f"Expected `per` to be 'label' or a column of the manifest, {names}, but got {column!r}."
            )
        values: list[Any] = columns.column(column).to_pylist()
        return values

    def _masked(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> MaskedTraining | None:
        named, place = self.config.masks, self._place / "masks"
        if named is None:
            return None
        with place.naming(named.options):
            if named.name == "fixed":
                return MaskedTraining(self.model, prune(self.model, **named.options), optimizer)
            schedule = MASKS[named.name](**named.options)
            rewinds = isinstance(schedule, IterativePruning) and schedule.rewind is not None
            rewound = [scheduler] if rewinds and scheduler is not None else []
            return MaskedTraining(self.model, schedule, optimizer, rewound=rewound)

    def _draws(self) -> Tensor | None:
        if self.config.draw is None:
            return None
        with (self._place / "draw").naming():
            return class_balanced_draw_weights(self.data.labels)

    def _layers(self) -> Any:
        """Those of class activation maps."""
        for index in range(min(len(self.data.train), _IMAGES_TRIED)):
            try:
                image = self.data.train[index][0]
            except (FastpieError, OSError):
                continue
            return cam_layers(
                self.model, image.unsqueeze(0).to(self._device), output=self.config.model.output
            )
        raise FastpieError(
            "Expected images to find the layers of the maps with, but none can be read."
        )


def _made(options: dict[str, Any], place: Place) -> dict[str, Any]:
    return {name: made(value, place / name) for name, value in options.items()}


def _load(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FastpieError(f"Expected weights of the network in {path}, but: {error}") from error
