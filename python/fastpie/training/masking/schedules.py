"""When a training prunes, and how much: gradually, or in rounds with rewinding."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpie._checks import whole_number
from fastpie.errors import FastpieError
from fastpie.pruning import Masks, prune
from fastpie.pruning.structured import pattern_of

__all__ = ["GradualPruning", "IterativePruning", "MaskingSchedule"]

_REWINDS = ("weights", "learning_rate", None)


class MaskingSchedule:
    """What `MaskedTraining` asks: the sparsity in force. A subclass may answer otherwise.

    It holds no state: the same step gives the same answer.

    Attributes:
        pruning: arguments of `fastpie.prune` by which weights are chosen.
    """

    def __init__(self, **pruning: Any) -> None:
        """Take the arguments of `fastpie.prune` but for `sparsity` and `within`.

        Raises:
            FastpieError: for these, or a pattern, which has one sparsity alone.
        """
        wrong = sorted(pruning.keys() & {"sparsity", "within"})
        if wrong:
            raise FastpieError(f"Expected the schedule to say {wrong}, but got them.")
        if pattern_of(str(pruning.get("method", "l1"))):
            raise FastpieError(
                f"Expected a `method` of any sparsity, but got {pruning['method']!r}; give "
                "MaskedTraining the masks of a pattern themselves."
            )
        self.pruning = pruning

    def sparsity_at(self, step: int) -> float:
        """The sparsity in force once `step` steps of the optimizer are done; never less than before."""
        raise NotImplementedError

    def choose(self, model: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        """Masks of this sparsity, from the weights as they are; what `within` removes stays removed."""
        return prune(model, sparsity, within=within, **self.pruning)


class GradualPruning(MaskingSchedule):
    """Sparsity that rises while training (Zhu and Gupta, arXiv 1710.01878).

    After t steps of the optimizer the sparsity is::

        final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3

    at t = begin, begin + every, begin + 2 * every, ... and at `end`, in between that of the last of
    these; before `begin` nothing is removed. At each of them masks are chosen from the weights of the
    moment. What is removed stays removed (in the authors' code masked weights keep their value, and
    may come back).
    """

    def __init__(
        self,
        final: float,
        *,
        begin: int,
        end: int,
        every: int = 500,
        initial: float = 0.0,
        **pruning: Any,
    ) -> None:
        """Set the course.

        Args:
            final: sparsity from `end` on, in [0, 1).
            begin: steps before the first pruning, at least 0.
            end: steps before the last one, at least `begin`.
            every: steps between two (500: Hooker et al., arXiv 1911.05248).
            initial: sparsity at `begin`, in [0, final].
            pruning: arguments of `fastpie.prune`: `method`, `scope`, `exclude`, ...

        Raises:
            FastpieError: for numbers out of these ranges.
        """
        super().__init__(**pruning)
        self.begin, self.end = whole_number("begin", begin, 0), whole_number("end", end, 0)
        self.every = whole_number("every", every, 1)
        self.initial, self.final = float(initial), float(final)
        if self.end < self.begin:
            raise FastpieError(f"Expected `end` of at least {begin}, `begin`, but got {end}.")
        if not 0 <= self.initial <= self.final < 1:
            raise FastpieError(
                f"Expected 0 <= `initial` <= `final` < 1, but got {initial} and {final}."
            )

    def sparsity_at(self, step: int) -> float:
        """The sparsity in force once `step` steps of the optimizer are done."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        since = (step - self.begin) // self.every * self.every
        left = 1 - since / (self.end - self.begin)
        return self.initial + (self.final - self.initial) * (1 - left**3)


class IterativePruning(MaskingSchedule):
    """Rounds of training, each followed by pruning and rewinding.

    Iterative magnitude pruning (Frankle and Carbin, arXiv 1803.03635): after each round the smallest
    `fraction` of the weights that are left goes, and those that stay take the values again that
    they had after step `rewind_to` (0: the initial ones; later: arXiv 1912.05671), with the BatchNorm
    statistics and the optimizer as they were then. After r rounds 1 - (1 - fraction)^r is removed.
    """

    def __init__(
        self,
        fraction: float = 0.2,
        *,
        rewind_to: int = 0,
        rewind: str | None = "weights",
        every: int | None = None,
        rounds: int | None = None,
        **pruning: Any,
    ) -> None:
        """Set the rounds.

        Args:
            fraction: of the remaining weights that a round removes, in (0, 1).
            rewind_to: steps of the optimizer after which to keep what later rounds begin with.
            rewind: "weights": weights, buffers, optimizer and learning rate go back to that step;
                "learning_rate": the learning rate alone, with all else that the optimizer's groups
                hold (Renda et al., arXiv 2003.02389); None: nothing (fine-tuning).
            every: epochs of a round: `MaskedTraining.begin_epoch` starts the next one. None: a call
                of `MaskedTraining.next_round` does.
            rounds: prunings at most that `begin_epoch` does; None: no end.
            pruning: arguments of `fastpie.prune`: `method`, `scope`, `exclude`, ...

        Raises:
            FastpieError: for numbers out of these ranges.
        """
        super().__init__(**pruning)
        if not 0 < fraction < 1:
            raise FastpieError(f"Expected `fraction` in (0, 1), but got {fraction}.")
        if rewind not in _REWINDS:
            raise FastpieError(f"Expected `rewind` to be one of {_REWINDS}, but got {rewind!r}.")
        self.fraction, self.rewind = float(fraction), rewind
        self.rewind_to = whole_number("rewind_to", rewind_to, 0)
        self.every = None if every is None else whole_number("every", every, 1)
        self.rounds = None if rounds is None else whole_number("rounds", rounds, 0)

    def sparsity_at(self, step: int) -> float:
        """That of the first round, 0; rounds are no matter of steps."""
        return 0.0

    def sparsity_of(self, round_: int) -> float:
        """The sparsity in force in a round, counted from 0."""
        return float(1 - (1 - self.fraction) ** round_)

    def round_of(self, epoch: int) -> int:
        """The round that an epoch belongs to; 0 if rounds are not counted in epochs."""
        if self.every is None:
            return 0
        passed = epoch // self.every
        return passed if self.rounds is None else min(passed, self.rounds)
