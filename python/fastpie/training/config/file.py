"""A training's YAML file: read, overridden, checked, and written with everything resolved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.training.config.config import PARTS, TrainConfig
from fastpie.training.config.fields import Place, import_from, suggestion
from fastpie.training.config.recipes import check_names

load_extra("yaml", "train", "training by a configuration")

import yaml
from pydantic import BaseModel, ValidationError

__all__ = ["config_data", "config_text", "parse_overrides", "read_config"]

_KEPT = ("model", "out", "seed")  # one for all stages
_PATHS = ("source", "root", "weights", "cache", "leave_out", "out")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} comes twice", node.start_mark
                )
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read and check a configuration.

    Relative paths are relative to the file's folder, whose modules can be imported, as those of the
    working directory can. `then`, a later stage, has everything of the first that it does not say
    otherwise.

    Args:
        path: of the YAML file.
        overrides: values by dotted path that replace the file's.

    Returns:
        TrainConfig: with absolute paths.

    Raises:
        FastpieError: naming file and field, for what cannot be read or used.
    """
    path = Path(path).resolve()
    place = Place(path.name)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise FastpieError(f"Expected a configuration in {path}, but: {error}") from error
    except yaml.YAMLError as error:
        raise FastpieError(f"Expected YAML in {path}, but: {error}") from error
    if not isinstance(raw, dict):
        raise place.error(f"Expected fields with values, but got {type(raw).__name__}.")
    for field, value in (overrides or {}).items():
        _set(raw, field, value, place)
    for folder in (str(path.parent), os.getcwd()):  # noqa: PTH109 - sys.path holds strings
        import_from(folder)
    return _checked(raw, place, path.parent)


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """From "epochs=3", "attention.every=2" to values by dotted path; values are YAML.

    Raises:
        FastpieError: for text of another form.
    """
    found = {}
    for text in texts:
        field, sign, value = text.partition("=")
        if not sign or not all(field.split(".")):
            raise FastpieError(f"Expected field=value, but got {text!r}.")
        try:
            found[field] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise FastpieError(f"Expected a YAML value for {field}, but: {error}") from error
    return found


def config_data(config: TrainConfig) -> dict[str, Any]:
    """Everything of it as plain values that `read_config` could read; of the data, what is not default."""
    data = config.model_dump(mode="json", exclude={"data", "then"})
    parts = {name: config.data.part(name) for name in PARTS}
    data["data"] = {
        name: part.model_dump(mode="json", exclude_unset=True)
        for name, part in parts.items()
        if part is not None
    }
    return {**data, "then": None if config.then is None else config_data(config.then)}


def config_text(config: TrainConfig) -> str:
    """`config_data` as YAML."""
    text: str = yaml.safe_dump(config_data(config), sort_keys=False, allow_unicode=True)
    return text


def _set(raw: dict[str, Any], field: str, value: Any, place: Place) -> None:
    *parents, last = field.split(".")
    for number, name in enumerate(parents):
        inner = raw.setdefault(name, {})
        if isinstance(inner, str):  # a name alone
            inner = raw[name] = {"factory" if name == "model" else "name": inner}
        elif inner is None:
            inner = raw[name] = {}
        if not isinstance(inner, dict):
            raise place.error(
                f"Expected `{'.'.join(parents[: number + 1])}` to have fields, for {field}, but it is "
                f"{inner!r}."
            )
        raw = inner
    raw[last] = value


def _checked(raw: dict[str, Any], place: Place, folder: Path) -> TrainConfig:
    own = {name: value for name, value in raw.items() if name != "then"}
    try:
        config = TrainConfig.model_validate(own).placed(place)
    except ValidationError as error:
        lines = [_line(found, own, place) for found in error.errors()]
        raise FastpieError("\n".join(lines)) from None
    _resolve(config, folder)
    check_names(config)
    then = raw.get("then")
    if then is None:
        return config
    inner = place / "then"
    if not isinstance(then, dict):
        raise place.error(f"Expected `{inner.path}` to have fields, but got {then!r}.")
    kept = [name for name in _KEPT if name in then and then[name] is not None]
    if kept and any(then[name] != raw.get(name) for name in kept):
        raise place.error(
            f"Expected `{(inner / kept[0]).path}` to be that of the first stage, but got "
            f"{then[kept[0]]!r}."
        )
    config.then = _checked({**own, "then": None, **then}, inner, folder)
    return config


def _line(found: Any, raw: Any, place: Place) -> str:
    """One thing that is wrong, as a sentence."""
    path, known = place, TrainConfig.model_fields
    for name in found["loc"]:
        path = path / str(name)
    for name in found["loc"][:-1]:
        inner = known[name].annotation if name in known else None
        models = [m for m in (inner, *getattr(inner, "__args__", ())) if _is_model(m)]
        known = models[0].model_fields if models else {}
    message, field = found["msg"], f"`{path.path}`"
    if found["type"] == "extra_forbidden":
        near = suggestion(str(found["loc"][-1]), known)
        text = f"Expected {field} to be a field, but there is none of that name.{near}"
    elif found["type"] == "missing":
        text = f"Expected {field}, but it is missing."
    else:
        wanted = re.sub(r"^(Input|[A-Z]\w*) should ", "", message)
        wanted = f"to {wanted}" if wanted != message else f"that can be used ({message})"
        text = f"Expected {field} {wanted}, but got {_short(found['input'])}."
    return str(place.error(text))


def _is_model(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, BaseModel)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _resolve(section: BaseModel, folder: Path) -> None:
    """Make the paths of a section and those within it absolute; URLs stay."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            _resolve(value, folder)
        elif name in _PATHS and isinstance(value, str) and "://" not in value:
            setattr(section, name, str((folder / value).resolve()))
