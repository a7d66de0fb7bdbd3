"""Numbers that callers give: in their range, or an error that says what was expected."""

from __future__ import annotations

import math
import operator
from typing import Any

from fastpie.errors import FastpieError

__all__ = ["number", "whole_number"]


def whole_number(name: str, value: Any, least: int) -> int:
    """An int, of Python or NumPy, of at least `least`; no bool.

    Raises:
        FastpieError: if it is none.
    """
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise FastpieError(
            f"Expected `{name}` to be an int of at least {least}, but got {value!r}."
        )
    return found


def number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_high: bool = False
) -> float:
    """A number in [low, high], or [low, high) with `open_high`.

    Raises:
        FastpieError: if it is none, or lies outside.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or value == (high if open_high else math.inf):
        limits = f"[{low:g}, {high:g}{')' if open_high else ']'}"
        if high == math.inf:
            limits = f"[{low:g}, inf)"
        raise FastpieError(f"Expected `{name}` to be a number in {limits}, but got {value!r}.")
    return float(value)
