"""The attention of every sample, from the scores and doubts of one mining after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpie.training.attention.strata import rank01, top

__all__ = ["ATTEND", "Attended", "Rule"]

ATTEND = ("soft", "weights", "oversample", "consistency")

_COLUMNS = ("score", "rank", "attention", "doubt")


@dataclass(frozen=True)
class Rule:
    """How ranks become attention, and attention weights; see `Attention`."""

    momentum: float
    fraction: float
    attend: str
    strength: float
    doubtful: float
    doubtful_weight: float


class Attended:
    """All that is known of the samples. Arrays are by position.

    Attributes:
        score: fp64 [N], the last one; NaN where there never was one.
        rank: fp64 [N], of the last score.
        attention: fp64 [N], S.
        doubt: fp64 [N], the same of the ranks of doubts.
        classes: int64 [N], -1 unknown or none.
        hard: bool [N].
        in_doubt: bool [N].
        weights: fp64 [N] with mean 1.
    """

    def __init__(
        self,
        count: int,
        rule: Rule,
        *,
        strata: np.ndarray | None,
        by_label: bool,
        doubt_by_class: bool,
    ) -> None:
        """Nothing is known yet of `count` samples.

        Args:
            count: N.
            rule: what to do with scores.
            strata: integers [N], within which samples are ranked; None for one.
            by_label: whether the classes are the strata.
            doubt_by_class: whether doubts are ranked within classes.
        """
        self._rule = rule
        self._strata, self._by_label = strata, by_label
        self._doubt_by_class = doubt_by_class
        self.score = np.full(count, np.nan)
        self.rank, self.attention, self.doubt = (self.score.copy() for _ in range(3))
        self.classes = np.full(count, -1, np.int64)
        self._unknown()

    def take(self, score: np.ndarray, doubt: np.ndarray, classes: np.ndarray | None) -> None:
        """The results of a mining: fp64 [N] with NaN where unknown, classes with -1."""
        if classes is not None:
            self.classes = np.where(classes >= 0, classes, self.classes)
        rank = rank01(score, self._ranked_within())
        self.score = np.where(np.isnan(score), self.score, score)
        self.rank = np.where(np.isnan(rank), self.rank, rank)
        self.attention = self._averaged(self.attention, rank)
        self.doubt = self._averaged(self.doubt, rank01(doubt, self._doubted_within()))
        self._derive()

    def state(self) -> dict[str, torch.Tensor]:
        """What cannot be derived."""
        names = (*_COLUMNS, "classes")
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in names}

    def load(self, state: Mapping[str, Any], *, mined: bool) -> None:
        """Go on from a `state`; `mined`: whether anything was known."""
        for name in (*_COLUMNS, "classes"):
            setattr(self, name, state[name].cpu().numpy().copy())
        if mined:
            self._derive()
        else:
            self._unknown()

    def _ranked_within(self) -> np.ndarray | None:
        return self.classes if self._by_label else self._strata

    def _doubted_within(self) -> np.ndarray | None:
        return self.classes if self._doubt_by_class else None

    def _averaged(self, before: np.ndarray, new: np.ndarray) -> np.ndarray:
        """S = b S + (1 - b) rank; the first time the rank; without one as before."""
        b = self._rule.momentum
        return np.where(
            np.isnan(new), before, np.where(np.isnan(before), new, b * before + (1 - b) * new)
        )

    def _unknown(self) -> None:
        self.hard = self.in_doubt = np.zeros(len(self.score), bool)
        self.weights = np.ones(len(self.score))

    def _derive(self) -> None:
        """Who is hard, whose label is in doubt, and what each weighs."""
        rule, strata = self._rule, self._ranked_within()
        self.in_doubt = top(self.doubt, rule.doubtful, self._doubted_within())
        self.hard = top(
            np.where(self.in_doubt, np.nan, self.attention),
            rule.fraction,
            strata,
            at_least=0 if strata is None or not rule.fraction else 1,
        )
        weights = np.ones(len(self.attention))
        if rule.attend in ("weights", "oversample"):
            weights += rule.strength * self.hard
        elif rule.attend == "soft":
            weights += rule.strength * np.nan_to_num(self.attention, nan=0.5)
        weights[self.in_doubt] = rule.doubtful_weight
        self.weights = weights / weights.mean()
