"""The choice of the hardest rows of a column that is too long to be held."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fastpie.errors import FastpieError

__all__ = ["Hardest", "Strata", "check_numbers", "sort_keys"]

_SPARE = 2**18  # candidates held beyond those wanted, at least: a cut should be worth its while


def check_numbers(type_: pa.DataType) -> None:
    """Refuse a column that cannot be ranked.

    Raises:
        FastpieError: for anything but numbers and booleans.
    """
    if not (
        pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_)
    ):
        raise FastpieError(f"Expected a column of numbers to rank by, but got {type_}.")


def sort_keys(values: pa.Array, lower_is_harder: bool) -> np.ndarray:  # int32 or int64 [n]
    """Integers in the order of hardness: the lowest is the hardest, NaN and null are the highest.

    The bits of a float, with those of a negative one turned over, order as the float does. Integers
    and booleans go through fp64.
    """
    half = pa.types.is_float16(values.type) or pa.types.is_float32(values.type)
    float_, int_ = (np.float32, np.int32) if half else (np.float64, np.int64)
    numbers = values.cast(pa.float32() if half else pa.float64(), safe=False)
    numbers = numbers.to_numpy(zero_copy_only=False).astype(float_, copy=False)  # null -> NaN
    numbers = (numbers if lower_is_harder else -numbers) + float_(0)  # no -0, which equals 0
    highest = np.iinfo(int_).max
    bits = numbers.view(int_)
    keys: np.ndarray = bits ^ ((bits >> (bits.itemsize * 8 - 1)) & highest)
    keys[np.isnan(numbers)] = highest
    return keys


class Strata:
    """Numbers the different values of a column in the order in which they come.

    Attributes:
        names: the values as text, by number.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.names: list[str] = []
        self._number: dict[str, int] = {}

    def numbers(self, column: pa.Array) -> np.ndarray:  # int32 [n]
        """The number of each value; null is a value of its own."""
        if pa.types.is_nested(column.type):  # the labels of a multilabel task
            column = pa.array([str(value) for value in column.to_pylist()], pa.string())
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        column = column.dictionary_encode(null_encoding="encode")
        texts = [str(value) for value in column.dictionary.to_pylist()]
        for text in texts:
            if text not in self._number:
                self._number[text] = len(self.names)
                self.names.append(text)
        known = np.array([self._number[text] for text in texts], dtype=np.int32)
        places: np.ndarray = column.indices.to_numpy(zero_copy_only=False)
        return known[places] if len(known) else np.empty(0, np.int32)


class Hardest:
    """Keeps the rows of the lowest keys of each stratum, equal keys by row.

    Candidates wait in a buffer that holds half as many more as are wanted. When it is full the
    key of the last one wanted is found by `np.partition`, the rest is dropped, and only lower keys
    come in from then on: of equal keys the earlier row is wanted, and it is already there.
    """

    def __init__(self, counts: np.ndarray, rows: int) -> None:
        """Nothing seen yet.

        Args:
            counts: int64 [S], how many rows of each stratum are wanted; each at least 1.
            rows: how many there are at most.
        """
        self._counts = counts
        wanted = int(counts.sum())
        self._capacity = min(rows, wanted + max(wanted // 2, _SPARE))
        self._stratum_type = np.uint16 if len(counts) <= 2**16 else np.int32  # 16 bits sort fast
        self._keys: np.ndarray | None = None
        self._rows = np.empty(self._capacity, np.int64)
        self._strata = np.empty(self._capacity if len(counts) > 1 else 0, self._stratum_type)
        self._limits: np.ndarray  # the highest key that still comes in, by stratum
        self._held = 0

    def add(
        self,
        keys: np.ndarray,  # int32 or int64 [n]
        first_row: int,
        strata: np.ndarray | None = None,  # int [n]
    ) -> None:
        """Look at the next rows."""
        if self._keys is None:
            self._keys = np.empty(self._capacity, keys.dtype)
            self._limits = np.full(len(self._counts), np.iinfo(keys.dtype).max, keys.dtype)
        limits = self._limits[0] if strata is None else self._limits[strata]
        inside = np.flatnonzero(keys <= limits)
        at = 0
        while at < len(inside):
            if self._held == self._capacity:
                self._cut()
            new = inside[at : at + self._capacity - self._held]
            space = slice(self._held, self._held + len(new))
            self._keys[space] = keys[new]
            self._rows[space] = new + first_row
            if strata is not None and len(self._counts) > 1:
                self._strata[space] = strata[new]
            self._held += len(new)
            at += len(new)

    def rows(self) -> np.ndarray:  # int64 [n]
        """The rows wanted, hardest first whatever their stratum, equal keys by row."""
        if self._keys is None:
            return np.empty(0, np.int64)
        self._cut()
        keys, rows = self._keys[: self._held], self._rows[: self._held].copy()
        self._keys = None  # the caller needs the memory
        self._rows = np.empty(0, np.int64)
        order = np.argsort(keys, kind="stable")
        chosen: np.ndarray = rows[order]
        return chosen

    def _cut(self) -> None:
        """Drop what is not wanted; what stays keeps the order of its rows."""
        assert self._keys is not None
        keys = self._keys[: self._held]
        if len(self._counts) == 1:
            keep = self._wanted(keys, 0)
        else:
            strata = self._strata[: self._held]
            by_stratum = np.argsort(strata, kind="stable")
            ends = np.cumsum(np.bincount(strata, minlength=len(self._counts)))
            keep = np.zeros(self._held, dtype=bool)
            for stratum, members in enumerate(np.split(by_stratum, ends[:-1])):
                keep[members] = self._wanted(keys[members], stratum)
            self._strata[: np.count_nonzero(keep)] = strata[keep]
        kept = np.count_nonzero(keep)
        self._keys[:kept] = keys[keep]
        self._rows[:kept] = self._rows[: self._held][keep]
        self._held = int(kept)

    def _wanted(self, keys: np.ndarray, stratum: int) -> np.ndarray:  # bool [n]
        """Which candidates of one stratum are wanted; closes it to keys that never will be."""
        count = int(self._counts[stratum])
        if len(keys) < count:
            return np.ones(len(keys), dtype=bool)
        last = np.partition(keys, count - 1)[count - 1]
        keep: np.ndarray = keys < last
        equal = np.flatnonzero(keys == last)
        keep[equal[: count - np.count_nonzero(keep)]] = True
        self._limits[stratum] = last - 1  # no key is the lowest integer: that of -inf is above
        return keep
