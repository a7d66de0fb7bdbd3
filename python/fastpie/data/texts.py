"""The strings of a whole data set, without a Python object for each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.errors import FastpieError

__all__ = ["Texts"]

_STEP = 1 << 16  # strings that iteration holds as Python objects at a time


class Texts(Sequence[str]):
    """An immutable sequence of strings in one Arrow array: 8 bytes and its characters for each.

    Worker processes that are forked share its memory, which they would copy bit by bit of a list.

    Attributes:
        array: `pa.LargeStringArray` [N] without nulls.
    """

    def __init__(self, values: Iterable[str] | pa.Array | pa.ChunkedArray) -> None:
        """Hold strings; an Arrow array of one chunk is not copied.

        Raises:
            FastpieError: if a value is null or no string.
        """
        if isinstance(values, pa.ChunkedArray):
            values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
        try:
            if not isinstance(values, pa.Array):
                values = pa.array(values, pa.large_string())
            array = values.cast(pa.large_string())
        except (pa.ArrowException, UnicodeError, TypeError) as error:
            raise FastpieError(f"Expected strings in UTF-8, but: {error}") from error
        if array.null_count:
            raise FastpieError(f"Expected strings, but {array.null_count} are null.")
        self.array: pa.LargeStringArray = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self.array[index])
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        return str(self.array[index].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _STEP):
            yield from self.array.slice(start, _STEP).to_pylist()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and bool(pc.index(self.array, value).as_py() >= 0)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return bool(self.array.equals(other.array))
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(map(operator.eq, self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compares by content, as a list does

    def buffers(self) -> Iterator[np.ndarray]:
        """Lengths (int64) and characters (uint8): what to hash, without an object for each string."""
        _, offsets, characters = self.array.buffers()
        if len(self.array):
            first = self.array.offset
            ends = np.frombuffer(offsets, np.int64)[first : first + len(self.array) + 1]
            yield np.diff(ends)
            if characters is not None:
                yield np.frombuffer(characters, np.uint8)[ends[0] : ends[-1]]

    def __repr__(self) -> str:
        shown: list[Any] = self.array.slice(0, 3).to_pylist()
        return f"Texts({len(self)}: {', '.join(map(repr, shown))}{', ...' * (len(self) > 3)})"
