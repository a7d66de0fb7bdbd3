"""Which samples a report shows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastpie.report.classes import class_column
from fastpie.report.columns import Columns

__all__ = ["choose"]


def choose(columns: Columns, count: int) -> tuple[np.ndarray, str]:
    """The samples to show, and how they were chosen.

    Of several orders (hardest of all; hardest of each class in turn; most in doubt; most atypical;
    hardest of each quadrant in turn) the next sample that is not there yet is taken, one after
    another, as far as the run has them.

    Args:
        columns: of the run, with those of its analysis.
        count: samples to show at most.

    Returns:
        Rows, hardest first, and a sentence.
    """
    everything = columns.hardest_first()
    if len(everything) <= count:
        return everything, f"All {len(everything):,} samples are shown."
    orders = [everything]
    words = ["the hardest of all"]
    by = class_column(columns)
    if by is not None:
        orders.append(_each_in_turn(everything, columns.numbers(by)))
        words.append(f"of each {'label' if by == 'label' else 'predicted class'}")
    for name, word in (
        ("label_in_doubt", "those whose label is most in doubt"),
        ("atypical", "the most atypical"),
    ):
        values = columns.numbers(name)
        if values is not None and np.isfinite(values).any():
            order = np.argsort(-values, kind="stable")
            orders.append(order[np.isfinite(values[order])])
            words.append(word)
    quadrant = columns.codes("quadrant")
    if quadrant is not None:
        orders.append(_each_in_turn(everything, quadrant[0]))
        words.append("some of each quadrant")
    said = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    sentence = f"{count:,} of {len(everything):,} samples are shown: {said}."
    taken = np.zeros(len(everything), bool)
    queues: list[Iterator[int]] = [iter(order.tolist()) for order in orders]
    left = count
    while left:
        for queue in queues:
            row = next((r for r in queue if not taken[r]), None)
            if row is not None and left:
                taken[row] = True
                left -= 1
    return everything[taken[everything]], sentence


def _each_in_turn(order: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """The first of each group, then the second of each, ...; without those that are in none."""
    assert groups is not None
    order = order[np.isfinite(groups[order])]
    by_group = order[np.argsort(groups[order], kind="stable")]
    _, starts, counts = np.unique(groups[by_group], return_index=True, return_counts=True)
    place = np.arange(len(by_group)) - np.repeat(starts, counts)
    in_turn: np.ndarray = by_group[np.argsort(place, kind="stable")]
    return in_turn
