"""What a report calls a sample, so that it can be shown without saying whose picture it is."""

from __future__ import annotations

import csv
import io
import re
import secrets
from pathlib import Path
from typing import Any

from fastpie._files import write_atomically
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["FILE", "Identities"]

FILE = "report-ids.csv"
# Letters and digits that cannot be taken for one another, read aloud or typed.
_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"
_LENGTH = 8  # 8.5e11 names
# Errors of these stages are sentences of fastpie's own, about numbers; others can hold names of files.
_OWN_WORDS = ("label", "score")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?=: |$)")


class Identities:
    """Names of samples in one report: their ids, or pseudonyms.

    A pseudonym is random, so that nothing can be told from it. `report-ids.csv` in the run folder says
    which is whose; later reports of the run take the same from there.

    Attributes:
        shown: whether ids are shown as they are.
    """

    def __init__(self, result: MiningResult, shown: bool) -> None:
        """Take the pseudonyms of earlier reports of the run, if it lies on this machine."""
        self.shown = shown
        self._path = _file_of(result)
        self._names: dict[str, str] = {}
        self._known = 0
        if not shown and self._path is not None:
            self._names = _read(self._path)
            self._known = len(self._names)
        self._taken = set(self._names.values())

    def of(self, sample_id: str) -> str:
        """The name of a sample in the report."""
        if self.shown:
            return sample_id
        if sample_id not in self._names:
            name = _random()
            while name in self._taken:
                name = _random()
            self._taken.add(name)
            self._names[sample_id] = name
        return self._names[sample_id]

    def reason(self, error: BaseException) -> str:
        """What went wrong; of a message that can hold a name, the kind of the error alone."""
        return (str(error) if self.shown else "") or type(error).__name__

    def message(self, stage: str, text: str | None) -> str:
        """What the errors table says of a sample, without the names that it can hold."""
        if self.shown or stage in _OWN_WORDS:
            return text or ""
        kind = _EXCEPTION.match(text or "")
        return f"{kind[0]} (message hidden)" if kind else "(message hidden)"

    def save(self) -> bool:
        """Write which pseudonym is whose into the run folder, where one is new.

        Returns:
            Whether it is written there: not of a run at a URL, or in a folder that lets nothing in.
        """
        if self._path is None:
            return False
        if len(self._names) == self._known:
            return True
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["pseudonym", "sample_id"])
        writer.writerows((name, sample_id) for sample_id, name in self._names.items())
        try:
            write_atomically(self._path, text.getvalue().encode())
        except OSError:
            return False
        return True


def _file_of(result: MiningResult) -> Path | None:
    try:
        return result.path / FILE
    except FastpieError:  # at a URL
        return None


def _random() -> str:
    # A letter first: no spreadsheet takes it for a number or a date.
    return "s-" + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def _read(path: Path) -> dict[str, str]:
    """Pseudonyms by sample id; none where there is no such file, or another one of that name."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        return {row["sample_id"]: row["pseudonym"] for row in rows}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error):
        return {}
