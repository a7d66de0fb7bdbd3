"""Libraries of the extras (`fastpie[report]`, ...), imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from fastpie.errors import FastpieError

__all__ = ["how_to_install", "load_extra"]


def load_extra(name: str, extra: str, purpose: str) -> Any:
    """Import a module of a library that fastpie can do without.

    Args:
        name: of the module.
        extra: that brings it.
        purpose: what it is needed for.

    Raises:
        FastpieError: if it cannot be imported, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FastpieError(
            f"Expected {name.split('.')[0]} for {purpose}, but it cannot be imported ({error}). "
            f"{how_to_install(extra)}"
        ) from error


def how_to_install(extra: str) -> str:
    """A sentence with the command."""
    return f"Install it with: pip install 'fastpie[{extra}]'"
