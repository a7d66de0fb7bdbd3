"""The strings of a whole data set, without a Python object for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import pyarrow as pa

from fastpie.errors import FastpieError

__all__ = ["Texts"]

_CHUNK = 65_536  # strings made at once while iterating


class Texts(Sequence[str]):
    """An immutable sequence of strings in one Arrow array: about 8 bytes and its characters each.

    Worker processes that are forked share its memory, which they would copy bit by bit of a list.

    Attributes:
        array: of type large_string, no nulls.
    """

    def __init__(self, values: Iterable[str] | pa.Array | pa.ChunkedArray) -> None:
        """Take an Arrow array of strings, or copy any strings.

        Raises:
            FastpieError: for values that are no text in UTF-8, or null.
        """
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            try:
                values = pa.array(values, pa.large_string())
            except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
                raise FastpieError(
                    f"Expected strings that are text in UTF-8, but: {error}"
                ) from error
        values = values.cast(pa.large_string())
        if isinstance(values, pa.ChunkedArray):
            values = (
                pa.concat_arrays(values.chunks) if values.num_chunks else values.combine_chunks()
            )
        if values.null_count:
            raise FastpieError(f"Expected strings, but {values.null_count} are null.")
        self.array = values

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self.array[index])
        return str(self.array[index].as_py())  # raises IndexError as a list does

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.array), _CHUNK):
            yield from self.array.slice(start, _CHUNK).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return bool(self.array.equals(other.array))
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Texts({list(self[:3])!r}{', ...' if len(self) > 3 else ''}, {len(self)} strings)"
