"""The libraries of the extra `fastpie[report]`, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from fastpie.errors import FastpieError

__all__ = ["load_extra"]


def load_extra(name: str) -> Any:
    """Import a module of Jinja2 or matplotlib.

    Raises:
        FastpieError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FastpieError(
            f"Expected {name.split('.')[0]} for a report, but it cannot be imported ({error}). "
            "Install it with: pip install 'fastpie[report]'"
        ) from error
