"""Every score that takes part: what it is, what it needs, whose it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, softmax

from benchmarks.quality import neighbours as near
from benchmarks.quality.measures import (
    as_ranks,
    correct,
    el2n,
    entropy,
    js,
    loss,
    margin,
    probability,
    spearman,
)  # fmt: skip
from benchmarks.quality.trials import LADDER, LEVELS, Trial
from fastpie.analysis import atypical, nearest_neighbours

__all__ = ["COLUMNS", "SCORES", "Score"]


@dataclass(frozen=True)
class Score:
    """A score: higher = more likely that something is planted there.

    Attributes:
        name: in the table.
        needs: "checkpoint" (the trained model), "logs" (looks after each epoch), "3 short runs", or
            "5 trainings".
        family: "fastpie", "control" or "peer".
        of: from a trial and the labels to fp [N].
    """

    name: str
    needs: str
    family: str
    of: Callable[[Trial, np.ndarray], np.ndarray]


# fastpie's three columns, and the kinds that each of them is for.
COLUMNS = {
    "hard": ("label conflict, early features", ("faint",)),
    "label in doubt": ("leave-one-out probe, early features", ("wrong label",)),
    "atypical": ("distance to neighbours, early features", ("corrupted", "rare kind")),
}
# Neighbours. Rare kinds and bad images come in groups, in which each has near neighbours: the distance
# is to as many as such a group has here (30 of 1,500). With 10, rare kinds among the digits are found
# worse. Peers have the 10 that is usual.
K_DISTANCE, K_CONFLICT, K_PEER = 30, 20, 10


def _at(level: float) -> int:
    return LEVELS.index(level)


_LADDER = [_at(level) for level in LADDER]


def _mean_margin(key: str) -> Callable[[Trial, np.ndarray], np.ndarray]:
    return lambda t, y: -margin(t[key], y).mean(0)


def _mean_loss(key: str) -> Callable[[Trial, np.ndarray], np.ndarray]:
    return lambda t, y: loss(t[key], y).mean(0)


def _conflict(t: Trial, y: np.ndarray) -> np.ndarray:
    return near.conflict(near.early(t), y, K_CONFLICT)


def _probe(t: Trial, y: np.ndarray, key: str = "features") -> np.ndarray:
    return near.probe(near.early(t, key), y)


def _distance(t: Trial, y: np.ndarray, key: str = "features", k: int = K_DISTANCE) -> np.ndarray:
    return atypical(nearest_neighbours(near.early(t, key), k, metric="euclidean"))


def _penultimate_distance(metric: str) -> Callable[[Trial, np.ndarray], np.ndarray]:
    return lambda t, y: near.nearest(near.penultimate(t), K_PEER, metric)[0].mean(1)


def _forgetting(t: Trial, y: np.ndarray) -> np.ndarray:
    """Times that the prediction was right and then wrong; never right counts most (arXiv 1812.05159)."""
    right = correct(t["epochs"], y)
    events = (right[:-1] & ~right[1:]).sum(0).astype(np.float64)
    events[~right.any(0)] = len(right)
    return events


def _cleanlab(method: str) -> Callable[[Trial, np.ndarray], np.ndarray]:
    """Cleanlab's own quality of a label, out of sample, by its default for several labels."""

    def score(t: Trial, y: np.ndarray) -> np.ndarray:
        if y.ndim == 2:
            from cleanlab import multilabel_classification

            given = [list(np.flatnonzero(row)) for row in y]
            quality = multilabel_classification.get_label_quality_scores(
                given, expit(t["folds"]), method=method
            )
        else:
            from cleanlab import rank

            chances = softmax(t["folds"].astype(np.float64), axis=1)
            quality = rank.get_label_quality_scores(y, chances, method=method)
        return -np.asarray(quality)

    return score


def _sum_of_ranks(
    *parts: Callable[[Trial, np.ndarray], np.ndarray],
) -> Callable[[Trial, np.ndarray], np.ndarray]:
    return lambda t, y: np.sum([as_ranks(part(t, y)) for part in parts], axis=0)


def _many(y: np.ndarray) -> bool:
    return y.ndim == 2


SCORES: tuple[Score, ...] = (
    # fastpie, from a checkpoint
    Score(COLUMNS["hard"][0], "checkpoint", "fastpie", _conflict),
    Score(COLUMNS["label in doubt"][0], "checkpoint", "fastpie", _probe),
    Score(COLUMNS["atypical"][0], "checkpoint", "fastpie", _distance),
    Score("leave-one-out probe, early features of the pruned model", "checkpoint", "fastpie",
          lambda t, y: _probe(t, y, "features_pruned")),
    Score("distance to neighbours, early features of the pruned model", "checkpoint", "fastpie",
          lambda t, y: _distance(t, y, "features_pruned")),
    Score("leave-one-out probe and moved images, ranks", "checkpoint", "fastpie",
          _sum_of_ranks(_probe, _mean_margin("moved"))),
    Score("pruned loss, ladder", "checkpoint", "fastpie", lambda t, y: loss(t["pruned"][_LADDER], y).mean(0)),
    Score("pruned margin, ladder", "checkpoint", "fastpie", lambda t, y: -margin(t["pruned"][_LADDER], y).mean(0)),
    Score("pruned entropy, ladder", "checkpoint", "fastpie",
          lambda t, y: entropy(t["pruned"][_LADDER], _many(y)).mean(0)),
    Score("js, ladder", "checkpoint", "fastpie", lambda t, y: js(t["dense"], t["pruned"][_LADDER], _many(y)).mean(0)),
    Score("js at .5", "checkpoint", "fastpie", lambda t, y: js(t["dense"], t["pruned"][_at(0.5)], _many(y))),
    Score("js at .9", "checkpoint", "fastpie", lambda t, y: js(t["dense"], t["pruned"][_at(0.9)], _many(y))),
    Score("1 - spearman at .5", "checkpoint", "fastpie", lambda t, y: 1 - spearman(t["dense"], t["pruned"][_at(0.5)])),
    Score("js at .9, not recalibrated (as published)", "checkpoint", "peer",
          lambda t, y: js(t["dense"], t["raw"][_at(0.9)], _many(y))),
    Score("1 - spearman at .9, not recalibrated (as published)", "checkpoint", "peer",
          lambda t, y: 1 - spearman(t["dense"], t["raw"][_at(0.9)])),
    Score(
        "entropy of the neighbours' labels, early features",
        "checkpoint",
        "fastpie",
        lambda t, y: near.label_entropy(near.nearest(near.early(t), K_DISTANCE)[1], y),
    ),
    # Controls, from a checkpoint
    Score("dense loss", "checkpoint", "control", lambda t, y: loss(t["dense"], y)),
    Score("dense margin", "checkpoint", "control", lambda t, y: -margin(t["dense"], y)),
    Score("random masks, loss, ladder", "checkpoint", "control", _mean_loss("random")),
    Score("random masks, margin, ladder", "checkpoint", "control", _mean_margin("random")),
    Score("weight noise, margin, not recalibrated", "checkpoint", "control", _mean_margin("noise")),
    Score("weight noise, margin", "checkpoint", "control", _mean_margin("noise_recalibrated")),
    Score("weight noise, loss", "checkpoint", "control", _mean_loss("noise_recalibrated")),
    Score("six random 10 % masks, margin", "checkpoint", "control", _mean_margin("random_committee")),
    # Peers, from a checkpoint
    Score("softmax entropy (FiftyOne)", "checkpoint", "peer", lambda t, y: entropy(t["dense"], _many(y))),
    Score("moved images, margin", "checkpoint", "peer", _mean_margin("moved")),
    Score("penultimate neighbours, cosine distance", "checkpoint", "peer", _penultimate_distance("cosine")),
    Score("penultimate neighbours, L2 distance", "checkpoint", "peer", _penultimate_distance("euclidean")),
    Score("penultimate neighbours, labels that differ", "checkpoint", "peer",
          lambda t, y: -near.agreement(near.nearest(near.penultimate(t), K_PEER, "cosine")[1], y)),
    Score("penultimate Mahalanobis distance", "checkpoint", "peer",
          lambda t, y: near.mahalanobis(near.penultimate(t), y)),
    # While training
    Score("pruned loss at .5, epoch mean", "logs", "fastpie", _mean_loss("epochs_pruned")),
    Score("pruned margin at .5, epoch mean", "logs", "fastpie", _mean_margin("epochs_pruned")),
    Score("js at .5, epoch mean", "logs", "fastpie",
          lambda t, y: js(t["epochs"], t["epochs_pruned"], _many(y)).mean(0)),
    Score("leave-one-out probe and AUM, ranks", "logs", "fastpie",
          _sum_of_ranks(_probe, _mean_margin("epochs"))),
    Score("weight noise, loss, epoch mean", "logs", "control", _mean_loss("epochs_noise")),
    Score("weight noise, margin, epoch mean", "logs", "control", _mean_margin("epochs_noise")),
    Score("dense loss, epoch mean", "logs", "control", _mean_loss("epochs")),
    Score("AUM", "logs", "peer", _mean_margin("epochs")),
    Score("EL2N after epoch 5", "logs", "peer", lambda t, y: el2n(t["early"][0], y)),
    Score("forgetting", "logs", "peer", _forgetting),
    Score("cartography, confidence", "logs", "peer", lambda t, y: -probability(t["epochs"], y).mean(0)),
    Score("cartography, variability", "logs", "peer", lambda t, y: probability(t["epochs"], y).std(0)),
    Score("variance of gradients", "logs", "peer", lambda t, y: t["vog"]),
    # More trainings
    Score("EL2N, 3 runs", "3 short runs", "peer", lambda t, y: el2n(t["early"], y).mean(0)),
    Score("cleanlab self-confidence", "5 trainings", "peer", _cleanlab("self_confidence")),
    Score("cleanlab normalized margin", "5 trainings", "peer", _cleanlab("normalized_margin")),
    Score("five-fold margin", "5 trainings", "peer", lambda t, y: -margin(t["folds"], y)),
)  # fmt: skip
