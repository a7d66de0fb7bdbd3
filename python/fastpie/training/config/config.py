"""What a training's YAML file may say, as pydantic models (the extra `fastpie[train]`).

Types, ranges and unknown keys are checked here; `fastpie.training.config.file` reads the file, and
`fastpie.training.config.configured` builds the training. Options of what is chosen by name (an optimizer, a
recipe) are checked against the signature of what they are handed to (`fastpie.training.config.recipes`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastpie._extras import load_extra

load_extra("pydantic", "train", "training by a configuration")

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)
from typing_extensions import Self

from fastpie.training.config.fields import Place

__all__ = [
    "PARTS",
    "DataConfig",
    "ModelConfig",
    "Named",
    "Scheduled",
    "SourceConfig",
    "TrainConfig",
]

PARTS = ("train", "valid", "test", "unlabelled")
"""Of the data."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | None) else [value]


def _square(value: Any) -> Any:
    return [value, value] if type(value) is int else value


Names = Annotated[list[str], BeforeValidator(_listed)]
Numbers = Annotated[list[float], BeforeValidator(_listed)]
Sides = Annotated[
    list[Annotated[int, Field(ge=1)]],
    BeforeValidator(_square),
    Field(min_length=2, max_length=3),
]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Refuses unknown keys, and text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Named(Section):
    """Something by its name, or `package.module:factory`, with options; text alone is a name."""

    model_config = ConfigDict(extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Beside the name."""
        return dict(self.model_extra or {})


class Scheduled(Named):
    """A scheduler of the learning rate.

    Attributes:
        per: after what it is stepped.
    """

    per: Literal["step", "epoch"] = "epoch"


class ModelConfig(Section):
    """What builds the network.

    Attributes:
        factory: `package.module:factory`.
        args: its keyword arguments.
        weights: to begin with, .safetensors.
        output: key or index of the logits in a dict or tuple output.
    """

    factory: str
    args: dict[str, Any] = {}
    weights: str | None = None
    output: Any = None

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return {"factory": value} if isinstance(value, str) else value


class SourceConfig(Section):
    """Samples, as the options of `fastpie mine` name them.

    Attributes:
        source: manifest, folder of class folders, tar shards, or a data set's own label files.
        factory: instead, `package.module:factory` of a data set (masks, boxes, several inputs).
        args: its keyword arguments.
        split: only the samples of this split.
        splits: shares of new splits by name, by groups where there are any; then name one by `split`.
        leave_out: file with the ids of samples to leave out: a line each, or a CSV's column
            `sample_id`.
        format: see `fastpie.data.read_manifest`, as the following.
        root: likewise.
        labels: label column; multilabel: columns.
        task: "multiclass", "multilabel", and of a factory's data set "segmentation".
        classes: names in the order of the model's outputs.
        path_column: likewise.
        uncertain: likewise.
        manifest_args: more arguments of `read_manifest`.
        size: to resize to: a side, [height, width], or of volumes [depth, height, width].
        mean: see `fastpie.data.Preprocessing`, as the following.
        std: likewise.
        channels: likewise.
        window: likewise.
        cache: folder of decoded images.
        cache_limit: GiB that it may take.
    """

    source: str | None = None
    factory: str | None = None
    args: dict[str, Any] = {}
    split: str | None = None
    splits: dict[str, Weight] | None = None
    leave_out: str | None = None
    format: str = "auto"
    root: str | None = None
    labels: Names | None = None
    task: Literal["multiclass", "multilabel", "segmentation"] | None = None
    classes: list[str] | None = None
    path_column: str = "path"
    uncertain: str | None = None
    manifest_args: dict[str, Any] = {}
    size: Sides | None = None
    mean: Numbers = [0.0]
    std: Numbers = [1.0]
    channels: Literal[1, 3] = 3
    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    cache: str | None = None
    cache_limit: Positive | None = None

    def over(self, common: SourceConfig) -> SourceConfig:
        """What is said here, and of the rest what is said in `common`."""
        names = common.model_fields_set & SourceConfig.model_fields.keys()
        if self.factory is not None:
            names -= {"source", "split", "splits"}
        given = {name: getattr(common, name) for name in names}
        given |= {name: getattr(self, name) for name in self.model_fields_set}
        return SourceConfig.model_construct(_fields_set=set(given), **given)


class DataConfig(SourceConfig):
    """Which samples are for what; options beside these hold for all of them.

    Attributes:
        train: to train on.
        valid: to evaluate on after each epoch.
        test: to evaluate on at the end, with the best weights.
        unlabelled: to train on without their labels (`mean_teacher`, `sdclr`).
    """

    train: SourceConfig
    valid: SourceConfig | None = None
    test: SourceConfig | None = None
    unlabelled: SourceConfig | None = None

    def part(self, name: str) -> SourceConfig | None:
        """One of them, with what holds for all."""
        found: SourceConfig | None = getattr(self, name)
        return None if found is None else found.over(self)


class TrainConfig(Section):
    """A training; see `fastpie.training.Trainer` for what is not told here.

    Attributes:
        model: the network.
        data: see `DataConfig`.
        augment: what happens to a training image, in this order: names of
            `fastpie.training.config.augment.AUGMENTATIONS`, or factories of a callable on an image tensor.
        augment_second: of the second view, where the recipe takes two (`mean_teacher`: the strong one).
        draw: "balanced" draws every class as often.
        recipe: a name of `fastpie.training.config.recipes.RECIPES` and its options.
        criterion: a name of `fastpie.training.criterion` and its options.
        optimizer: a class of `torch.optim` and its options.
        scheduler: a class of `torch.optim.lr_scheduler` and its options.
        attention: options of `Attention`; None for none.
        masks: fixed (options of `fastpie.prune`), gradual or iterative (options of `GradualPruning`,
            `IterativePruning`); None for none.
        device: "cpu", "cuda", "cuda:1"; under torchrun "cuda" is one GPU a process.
        workers: processes that read images.
        out: folder of the training.
        then: a later stage of it, which begins with the best weights of this one.
    """

    model: ModelConfig
    data: DataConfig
    augment: list[Named] = []
    augment_second: list[Named] | None = None
    draw: Literal["balanced"] | None = None
    recipe: Named = Named(name="supervised")
    criterion: Named = Named(name="cross_entropy")
    optimizer: Named
    scheduler: Scheduled | None = None
    attention: dict[str, Any] | None = None
    masks: Named | None = None
    epochs: Count
    batch_size: Count = 32
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    device: str = "cpu"
    workers: Annotated[int, Field(ge=0)] = 0
    patience: Count | None = None
    monitor: str | None = None
    clip: Positive | None = None
    checkpoint_every: Count = 1
    checkpoint_minutes: Positive | None = None
    log: Literal["csv", "tensorboard"] | None = "csv"
    out: str
    then: TrainConfig | None = None

    _place: Place = PrivateAttr(Place(""))

    @property
    def place(self) -> Place:
        """Where it stands, for errors."""
        return self._place

    def placed(self, place: Place) -> Self:
        """The same, that stands there."""
        self._place = place
        return self

    @property
    def stages(self) -> list[TrainConfig]:
        """This one and the later ones."""
        return [self, *([] if self.then is None else self.then.stages)]
