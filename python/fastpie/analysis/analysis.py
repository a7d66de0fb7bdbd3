"""`Analysis`: what an analysis found, as tables that are files as well."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from fastpie._files import atomic_path, write_atomically
from fastpie.errors import FastpieError

__all__ = ["Analysis"]

_FORMAT = "fastpie-analysis-1"
_INDEX = "analysis.json"
_SAMPLES = "samples.parquet"


@dataclass(frozen=True, eq=False)
class Analysis:
    """What an analysis found.

    Attributes:
        samples: one row a scored sample, in sample_id order; columns: docs/design/analysis.md.
        tables: by name; columns: docs/design/analysis.md. What the run has no data for is not there.
        facts: how it was made and what is one number: JSON.
        sentences: the findings in words, most important first.
    """

    samples: pa.Table
    tables: Mapping[str, pa.Table]
    facts: Mapping[str, Any]
    sentences: list[str]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `samples.parquet`, a CSV file a table and `analysis.json`, each whole or not at all.

        A null is an empty cell. `analysis.json` is written last: without it there is no analysis.

        Args:
            folder: made if it is not there; an earlier analysis in it is replaced.

        Returns:
            The folder.

        Raises:
            FastpieError: if it cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _INDEX).unlink(missing_ok=True)
            for old in folder.glob("*.csv"):
                old.unlink()
            with atomic_path(folder / _SAMPLES) as path:
                pq.write_table(self.samples, path, compression="zstd")
            for name, table in self.tables.items():
                with atomic_path(folder / f"{name}.csv") as path:
                    csv.write_csv(table, path)
            index = {
                "format": _FORMAT,
                "facts": dict(self.facts),
                "sentences": self.sentences,
                "rows": {name: table.num_rows for name, table in self.tables.items()},
                "tables": {
                    name: {field.name: str(field.type) for field in table.schema}
                    for name, table in self.tables.items()
                },
            }
            write_atomically(folder / _INDEX, (json.dumps(index, indent=1) + "\n").encode())
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(
                f"Expected to write an analysis to {folder}, but: {error}."
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Analysis:
        """Read what `save` wrote.

        Raises:
            FastpieError: if there is no analysis, or not a whole one.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / _INDEX).read_bytes())
            if index["format"] != _FORMAT:
                raise ValueError(f"it has the format {index['format']!r}, not {_FORMAT!r}")
            tables = {
                name: _read(folder / f"{name}.csv", types)
                for name, types in index["tables"].items()
            }
            for name, table in tables.items():
                if table.num_rows != index["rows"][name]:
                    raise ValueError(f"{name}.csv has lost rows")
            samples = pq.read_table(folder / _SAMPLES, partitioning=None)
        except FileNotFoundError as error:
            raise FastpieError(
                f"Expected an analysis in {folder}, but a file is not there: {error}. Make one by "
                "fastpie.analysis.analyze or `fastpie analyze`."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise FastpieError(
                f"Expected an analysis in {folder}, but it cannot be read: {error}. Make it again."
            ) from error
        return cls(samples, tables, index["facts"], index["sentences"])


def _read(path: Path, types: Mapping[str, str]) -> pa.Table:
    return csv.read_csv(
        path,
        convert_options=csv.ConvertOptions(
            column_types={name: pa.type_for_alias(alias) for name, alias in types.items()},
            # Written texts stand in quotes, nulls do not: an empty text stays one.
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
        # The only cell of a line may be null.
        parse_options=csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
    )
