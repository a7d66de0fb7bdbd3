"""The libraries of the extra `fastpie[medical]`, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from fastpie.errors import FastpieError

__all__ = ["INSTALL", "load_medical"]

INSTALL = "Install it with: pip install 'fastpie[medical]'"


def load_medical(name: str, kind: str) -> Any:
    """Import a module of pydicom or nibabel.

    Raises:
        FastpieError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FastpieError(
            f"Expected {name.split('.')[0]} to read {kind}, but it cannot be imported ({error}). "
            f"{INSTALL}"
        ) from error
