"""The hardest samples, class by class, as cards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fastpie.report.classes import class_column
from fastpie.report.columns import Columns

__all__ = ["Card", "Gallery", "GalleryClass", "hardest"]

_MOST_CLASSES = 40
_MOST_CARDS = 1_000


@dataclass
class Card:
    """One sample.

    Attributes:
        sample_id: of the sample.
        facts: name and value, as they are shown.
        changed: whether the pruned model says something else.
        wrong: whether the dense model is wrong; None where that is not known.
        uri: the thumbnail, filled in later.
        missing: why there is none.
    """

    sample_id: str
    facts: list[tuple[str, str]]
    changed: bool
    wrong: bool | None
    uri: str | None = None
    missing: str = ""

    @property
    def alt(self) -> str:
        """What the picture is, in words."""
        return f"Sample {self.sample_id}: " + ", ".join(f"{k} {v}" for k, v in self.facts)


@dataclass
class GalleryClass:
    """The hardest samples of a class (index None: of all), hardest first."""

    index: int | None
    name: str
    n: int
    cards: list[Card] = field(default_factory=list)


@dataclass
class Gallery:
    """The classes that are shown.

    Attributes:
        by: the column that sorts samples into classes, None for one gallery of all samples.
        classes: in order of their index.
        note: what was left out; empty if nothing was.
    """

    by: str | None
    classes: list[GalleryClass]
    note: str = ""

    def cards(self) -> list[Card]:
        """All cards."""
        return [card for one in self.classes for card in one.cards]


def hardest(columns: Columns, name_of: Callable[[int], str], count: int) -> Gallery:
    """The hardest samples of each class, or of all where the samples have no single class.

    Args:
        columns: of the run.
        name_of: the name of a class.
        count: samples of each class, 0 for none.
    """
    order = columns.hardest_first()
    if not count or not len(order):
        return Gallery(None, [])
    by = class_column(columns)
    values = None if by is None else columns.numbers(by)
    if values is None:
        everything = GalleryClass(None, "All samples", len(order))
        everything.cards = _cards(columns, name_of, order[: min(4 * count, _MOST_CARDS)])
        return Gallery(None, [everything])
    members = _members(values, order)
    notes = []
    found = len(members)
    if found > _MOST_CLASSES:
        members = _hardest_classes(members, columns)
        notes.append(
            f"Of {found:,} classes, the {_MOST_CLASSES} with the highest mean hardness are shown."
        )
    if count * len(members) > _MOST_CARDS:
        count = max(1, _MOST_CARDS // len(members))
        notes.append(f"At most {count} samples of each class are shown.")
    classes = []
    for index, rows in sorted(members.items()):
        cards = _cards(columns, name_of, rows[:count])
        classes.append(GalleryClass(index, name_of(index), len(rows), cards))
    return Gallery(by, classes, " ".join(notes))


def _members(values: np.ndarray, order: np.ndarray) -> dict[int, np.ndarray]:
    """Rows of each class, hardest first."""
    order = order[np.isfinite(values[order])]
    by_class = order[np.argsort(values[order], kind="stable")]
    indices, starts = np.unique(values[by_class], return_index=True)
    parts = np.split(by_class, starts[1:])
    return {int(index): rows for index, rows in zip(indices, parts, strict=True)}


def _hardest_classes(members: dict[int, np.ndarray], columns: Columns) -> dict[int, np.ndarray]:
    hardness = columns.numbers("hardness")
    assert hardness is not None  # every run with classes has it
    finite = np.where(np.isfinite(hardness), hardness, -np.inf)
    ranked = sorted(members, key=lambda index: -finite[members[index]].mean())
    return {index: members[index] for index in ranked[:_MOST_CLASSES]}


def _cards(columns: Columns, name_of: Callable[[int], str], rows: np.ndarray) -> list[Card]:
    """Cards of some rows, with the facts that the run has."""
    table = columns.table.take(pa.array(rows))
    here = Columns(table, columns.sparsities, columns.is_ladder)
    highest = f"{columns.sparsities[-1]:g}"
    labels = here.numbers("label")
    several = here.multilabels()
    dense = here.numbers("prediction_dense")
    pruned = here.at_highest("prediction_pruned")
    flips = here.numbers("flip")
    scores = [
        (name, here.numbers(name))
        for name in ("hardness", "js", "drift", "iou_soft", "loss_dense", "loss_pruned")
    ]
    if here.numbers("js") is not None:
        scores = [(name, values) for name, values in scores if name != "drift"]

    cards = []
    for row, sample_id in enumerate(table.column("sample_id").to_pylist()):
        facts: list[tuple[str, str]] = []
        if labels is not None and np.isfinite(labels[row]):
            facts.append(("label", name_of(int(labels[row]))))
        if several is not None:
            facts.append(("labels", _names(np.flatnonzero(several[row] == 1), name_of)))
        if dense is not None and np.isfinite(dense[row]):
            facts.append(("dense", name_of(int(dense[row]))))
        if pruned is not None and np.isfinite(pruned[row]):
            facts.append((f"pruned {highest}", name_of(int(pruned[row]))))
        facts += [(name, f"{values[row]:.3g}") for name, values in scores if values is not None]
        wrong = None
        if labels is not None and dense is not None and np.isfinite(labels[row]):
            wrong = bool(labels[row] != dense[row])
        cards.append(Card(sample_id, facts, bool(flips is not None and flips[row] > 0), wrong))
    return cards


def _names(indices: np.ndarray, name_of: Callable[[int], str]) -> str:
    names = [name_of(int(index)) for index in indices[:8]]
    more = [f"and {len(indices) - 8} more"] if len(indices) > 8 else []
    return ", ".join(names + more) or "none"
