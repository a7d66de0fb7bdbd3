"""Fields of a configuration by their dotted path: how errors name them, and what fills them."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fastpie.errors import FastpieError

__all__ = ["Place", "check_options", "import_from", "imported", "made", "options_of", "suggestion"]


@dataclass(frozen=True)
class Place:
    """A part of a file.

    Attributes:
        file: its name.
        path: dotted, of the part; empty for the whole.
    """

    file: str
    path: str = ""

    def __truediv__(self, field: str) -> Place:
        """A field of it."""
        return Place(self.file, f"{self.path}.{field}" if self.path else field)

    def error(self, text: str) -> FastpieError:
        """An error of that file."""
        return FastpieError(f"{self.file}: {text}" if self.file else text)

    @contextmanager
    def naming(self, fields: Collection[str] = ()) -> Iterator[None]:
        """Let errors of what is built here name their field.

        Args:
            fields: of this part; an error that names one gets the whole path of it.
        """
        try:
            yield
        except FastpieError as error:

            def whole(found: re.Match[str]) -> str:
                return f"`{(self / found[1]).path}`" if found[1] in fields else found[0]

            text = re.sub(r"`(\w+)`", whole, str(error))
            if self.path and f"`{self.path}" not in text:
                text = f"`{self.path}`: {text}"
            raise self.error(text) from error
        except (TypeError, ValueError) as error:  # of torch, or a factory
            given = f", {fields}" if isinstance(fields, dict) else ""
            raise self.error(
                f"Expected `{self.path}` that can be used, but got {type(error).__name__}: {error}{given}"
            ) from error


def imported(name: str, place: Place) -> Any:
    """What `package.module:name` names.

    Raises:
        FastpieError: if it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise place.error(
            f"Expected `{place.path}` to be package.module:factory, but got {name!r}."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module is anybody's code
        raise place.error(
            f"Expected `{place.path}` to be importable, but got {name!r}: {error}"
        ) from error


def made(value: Any, place: Place) -> Any:
    """An option as it is, or what a `{factory: package.module:factory, args: {...}}` makes of it."""
    if not isinstance(value, dict) or "factory" not in value:
        return value
    wrong = sorted(value.keys() - {"factory", "args"})
    if wrong:
        raise place.error(f"Expected `{place.path}` to have `factory` and `args`, but got {wrong}.")
    make = imported(value["factory"], place / "factory")
    try:
        return make(**value.get("args", {}))
    except Exception as error:
        raise place.error(
            f"Expected `{place.path}` to be made by {value['factory']}, but: {error}"
        ) from error


def options_of(make: Callable[..., Any], without: Collection[str] = ()) -> list[str] | None:
    """Keyword arguments that something takes; None for any."""
    parameters = inspect.signature(make).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in without]


def check_options(
    options: Mapping[str, Any], known: Collection[str] | None, place: Place, what: str
) -> None:
    """Refuse unknown options.

    Args:
        options: given.
        known: see `options_of`.
        place: of these.
        what: they are options of.

    Raises:
        FastpieError: with the path of the first, and what it may have meant.
    """
    unknown = [name for name in options if known is not None and name not in known]
    if unknown:
        raise place.error(
            f"Expected `{(place / unknown[0]).path}` to be an option of {what}, but it has only "
            f"{', '.join(known or ())}.{suggestion(unknown[0], known or ())}"
        )


def suggestion(name: str, known: Collection[str]) -> str:
    """A question, if a known name is near."""
    spelled = {one.lower(): one for one in known}
    near = [spelled[one] for one in get_close_matches(name.lower(), spelled, 1)]
    return f" Did you mean {near[0]!r}?" if near else ""


def import_from(folder: str) -> None:
    """Let modules of a folder be imported."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
