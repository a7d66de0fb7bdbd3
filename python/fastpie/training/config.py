"""The configuration of `fastpie train`: what may stand in the file, checked before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

load_extra("pydantic", "train", "fastpie train")

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator  # noqa: RUF100

__all__ = ["Config", "Named", "read_config"]


class Section(BaseModel):
    """Unknown keys are errors, and text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Named(BaseModel):
    """A name, and beside it the options of what it names."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """All but the name."""
        return dict(self.model_extra or {})


class Model(Section):
    """The network: `package.module:factory`, its arguments, and weights to begin with."""

    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    args: dict[str, Any] = {}
    weights: str | None = None
    output: str | int | None = None


class Data(Section):
    """Images: as for `fastpie mine`; `manifest` are options of `fastpie.data.read_manifest`.

    `valid` is another manifest, or with `valid_split` alone the same one; `augment` is
    `package.module:factory`, called with `augment_args`, of a function from image to image.
    """

    train: str
    train_split: str = ""
    valid: str | None = None
    valid_split: str = ""
    manifest: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}
    cache: str | None = None
    augment: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    augment_args: dict[str, Any] = {}


class Masks(Section):
    """Removed weights: `sparsity` from the start, or reached between two steps."""

    sparsity: float = Field(gt=0, lt=1)
    begin: int | None = Field(None, ge=0)
    end: int | None = Field(None, ge=0)
    every: int = Field(500, ge=1)
    scope: Literal["global", "layer"] = "global"

    @model_validator(mode="after")
    def _both(self) -> Masks:
        if (self.begin is None) != (self.end is None):
            raise ValueError("`begin` and `end` go together")
        return self


class Config(Section):
    """A training. Sections and their defaults are the fields; see examples/*.yaml."""

    model: Model
    data: Data
    optimizer: Named
    epochs: int = Field(ge=1)
    out: str
    criterion: Named = Named(name="cross_entropy")
    recipe: Named = Named(name="plain")
    attention: dict[str, Any] | None = None
    masks: Masks | None = None
    scheduler: Named | None = None
    scheduler_per_step: bool = False
    batch_size: int = Field(32, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    clip: float | None = Field(None, gt=0)
    monitor: str | None = None
    patience: int | None = Field(None, ge=1)
    workers: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    log: Literal["csv", "tensorboard"] | None = "csv"
    checkpoint_every: int = Field(1, ge=1)
    checkpoint_minutes: float | None = Field(None, ge=0)


def read_config(path: Path) -> Config:
    """Read and check a YAML file.

    Raises:
        FastpieError: it cannot be read, or a field is missing, unknown or of a wrong value: named,
            with what came.
    """
    yaml = load_extra("yaml", "train", "fastpie train")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """YAML 1.2 numbers: 1e-3 is no text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    try:
        values = yaml.load(
            path.read_text(encoding="utf-8"), Loader=Loader
        )  # safe: derived from SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FastpieError(f"Expected a configuration in {path}, but: {error}") from error
    if not isinstance(values, dict):
        raise FastpieError(
            f"Expected sections such as model, data and optimizer in {path}, but got "
            f"{type(values).__name__}."
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(_said(one) for one in error.errors())
        raise FastpieError(f"Expected a configuration in {path}, but {wrong}.") from error


def _said(error: Any) -> str:
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"`{field}` is not known"
    if error["type"] == "missing":
        return f"`{field}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"`{field}`: {message[0].lower()}{message[1:]}, but got {error['input']!r}"
