"""Nearest neighbours of samples in the features of the dense model, exact and out of core."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from fastpie.analysis.neighbour_search import Nearest, Rows, View, search, search_faiss
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.mining.run_folder import RunFolder

__all__ = [
    "Neighbours", "atypical", "known_labels", "label_conflict", "nearest_neighbours", "neighbour_agreement",
    "run_features", "standardised",
]  # fmt: skip

_METRICS = ("cosine", "euclidean")
_LEAST_SPREAD = 1e-8  # a column that varies less is a dead channel
_LIBRARIES = ("fastpie", "faiss")
_TASKS = ("multiclass", "multilabel")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest other samples of each of N samples.

    Attributes:
        indices: int64 [N, k], nearest first; -1 where there is none: fewer than k others, or
            features that are not finite.
        distances: fp64 [N, k], not negative; NaN where there is no neighbour. Cosine distances are
            1 - cos, in [0, 2].
        metric: "cosine" or "euclidean".
    """

    indices: np.ndarray
    distances: np.ndarray
    metric: str

    def __len__(self) -> int:
        return len(self.indices)


def nearest_neighbours(
    features: Any,  # [N, D], or a run that kept its features, or its folder
    k: int = 10,
    *,
    metric: str = "cosine",
    library: str = "fastpie",
) -> Neighbours:
    """The k nearest neighbours of every sample among the others.

    Exact: a pair is left out only if a bound on the rounding error of the fp32 product says that it
    cannot be among the nearest; what remains is computed in fp64 as the squared length of the
    difference. Equal distances, exact duplicates among them, come in the order of their indices. So
    the answer is the same whatever the number of threads. Features are read in blocks: a
    memory-mapped array larger than memory will do. Time grows with N^2 D.

    Args:
        features: array, memory map or tensor; a run's are those of the dense model, see
            `run_features`. A sample with a value that is not finite gets no neighbours and is none.
        k: neighbours, at least 1.
        metric: "cosine" or "euclidean". Under "cosine" a row of zeros, which has no direction, counts
            as one direction more, at right angles to all others (distance 1; 0 between two of them).
        library: "fastpie", or "faiss" (Johnson, Douze, Jegou, arXiv 1702.08734) for more samples than
            can be compared all with all: exact up to 65,536 samples; above that neighbours are sought
            among the nearest 32 of 4 sqrt(N) cells, so that one can be missed. Holds the features in
            memory. Its distances, too, are computed again in fp64.

    Raises:
        FastpieError: for features of another shape or type, k below 1, an unknown metric or library,
            a run without features, or without the package faiss where it is asked for.
    """
    if library not in _LIBRARIES:
        raise FastpieError(f"Expected `library` to be one of {_LIBRARIES}, but got {library!r}.")
    rows = _rows(features, k, metric)
    nearest = Nearest(len(rows), k)
    if library == "fastpie":
        search(rows, [View(nearest)])
    else:
        search_faiss(rows, nearest)
    return Neighbours(nearest.indices, rows.distances(nearest), metric)


def run_features(run: MiningResult | str | os.PathLike[str]) -> np.ndarray:  # fp32 [N, D]
    """The dense model's features in the order of a run's table, out of memory.

    They are copied part by part to a temporary file without a name, which goes when the array goes.

    Args:
        run: a run with `keep_features`, or its folder. Of a run of several models the features of
            each are made unit vectors and put side by side: a cosine distance between them is the
            mean over the models.

    Raises:
        FastpieError: for a run without features.
    """
    run = run if isinstance(run, MiningResult) else MiningResult(run)
    if not run.record["config"]["keep_features"]:
        raise FastpieError(
            f"Expected a run with its features kept, but {run.location} was made without "
            "keep_features=True."
        )
    models = run.members or [run]
    ids = run.table.column("sample_id")
    result = np.empty((len(ids), 0), np.float32)
    width = 0
    for place, model in enumerate(models):
        folder = RunFolder(model.location)
        for part in folder.done_parts():
            if not folder.part_rows(part):
                continue  # nothing of it could be scored, and there may be no features
            # A part of several models has the samples that all of them could score, and features
            # are written before scores: a crash can leave some without.
            table = folder.read_part(part, "features", ["sample_id", "dense"])
            rows = pc.index_in(table["sample_id"], ids)
            known = pc.is_valid(rows)
            column = table["dense"].filter(known).combine_chunks()
            if not len(column):
                continue
            block = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
            if not width:
                width = block.shape[1]
                result = _temporary((len(ids), width * len(models)))
            if block.shape[1] != width:
                raise FastpieError(
                    f"Expected features of one size, but those of {model.location} have "
                    f"{block.shape[1]} values, others {width}."
                )
            if len(models) > 1:
                norms = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
                block = block / np.where(norms > 0, norms, 1)
            result[rows.filter(known).to_numpy(), place * width : (place + 1) * width] = block
    return result


def standardised(features: Any, widths: Sequence[int] | None = None) -> np.ndarray:  # fp32 [N, D]
    """Columns of mean 0 and variance 1, and every stage of the same weight.

    Columns of different stages have different sizes, and a late stage has more of them: unscaled
    distances are those of a few columns. Columns that do not vary become 0; a row with a value that is
    not finite stays so and takes no part in the others' scale.

    Args:
        features: [N, D].
        widths: columns of each stage (`feature_widths` in `run.json`); None for one stage.

    Raises:
        FastpieError: for widths that do not sum to D.
    """
    x = np.asanyarray(features)
    widths = [x.shape[1]] if widths is None else list(widths)
    if sum(widths) != x.shape[1]:
        raise FastpieError(
            f"Expected `widths` that sum to the {x.shape[1]} columns, but got {widths}."
        )
    good = np.isfinite(x).all(1)
    result = np.full(x.shape, np.nan, np.float32)
    first = 0
    for width in widths:
        here = slice(first, first + width)
        block = x[good, here].astype(np.float64)
        if len(block):
            spread = block.std(0)
            scale = np.where(spread > _LEAST_SPREAD, spread, np.inf) * np.sqrt(width)
            result[good, here] = (block - block.mean(0)) / scale
        first += width
    return result


def _rows(features: Any, k: int, metric: str) -> Rows:
    if k < 1:
        raise FastpieError(f"Expected `k` of at least 1, but got {k}.")
    if metric not in _METRICS:
        raise FastpieError(f"Expected `metric` to be one of {_METRICS}, but got {metric!r}.")
    if isinstance(features, MiningResult | str | os.PathLike):
        features = run_features(features)
    return Rows(features, metric)


def _temporary(shape: tuple[int, int]) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="fastpie-features-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def atypical(neighbours: Neighbours) -> np.ndarray:  # fp64 [N]
    """How far a sample is from its nearest neighbours: the mean of their distances.

    The k-nearest-neighbour distance of outlier detection (Angiulli, Pizzuti, 2002, their weight; in
    features of a network Sun et al., arXiv 2204.06507). High for rare kinds and bad images, and in the
    features of a model that has memorised its labels for wrong ones, too. An exact duplicate lowers
    it: k copies of one odd image do not look odd.

    Cosine distances and k = 10 are what did best over three ways of training a small network (on
    AUROC for occluded and for rotated digits): Euclidean ones can fail altogether (.3 against .97
    in an early feature map), local outlier factors and ratios of densities were not better.

    Returns:
        Higher = more atypical; NaN for a sample without neighbours.
    """
    return _mean(neighbours.distances)


def neighbour_agreement(
    neighbours: Neighbours,
    labels: Any,  # multiclass: integers [N], below 0 unknown; multilabel: [N, C] of 1, 0, NaN
    *,
    task: str = "multiclass",
) -> np.ndarray:  # fp64 [N]
    """The share of the neighbours that have the sample's label, nearer ones weighing more.

    A neighbour at distance d weighs 1 / (d + the mean of the distances), so at most twice what it
    would at the mean distance, and a duplicate does not outvote all others. Neighbours without a label
    are left out.

    In the features that a network of its size has memorised this says little: a wrong label lies
    among the samples of that label. `label_conflict` still tells there.

    Returns:
        In [0, 1], 1 where all agree; multilabel: mean over the sample's known classes. NaN without
        label or labelled neighbours.

    Raises:
        FastpieError: for labels that do not fit.
    """
    known, columns = known_labels(labels, len(neighbours), task)
    there = neighbours.indices >= 0
    mean = atypical(neighbours)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.where(mean > 0, 1 / (neighbours.distances + mean), 1.0)
    weights[~there] = 0
    shares = np.full(known.shape, np.nan)
    for c in range(known.shape[1]):
        counted = weights * known[neighbours.indices, c]
        equal = columns[neighbours.indices, c] == columns[:, c, None]
        total = counted.sum(1)
        told = known[:, c] & (total > 0)
        shares[told, c] = (counted * equal).sum(1)[told] / total[told]
    return _mean(shares)


def label_conflict(
    features: Any,  # as for nearest_neighbours
    labels: Any,  # multiclass: integers [N], below 0 unknown; multilabel: [N, C] of 1, 0, NaN
    k: int = 5,
    *,
    metric: str = "cosine",
    task: str = "multiclass",
) -> np.ndarray:  # fp64 [N]; multilabel [N, C]
    """How much nearer a sample is to other labels than to its own.

    `own / (own + other)`, where own is the mean distance to the k nearest samples of the same label
    and other to the k nearest of another one; it orders as own / other, the k-nearest-neighbour
    strangeness of Proedrou et al. (Transductive confidence machines for pattern recognition, ECML
    2002). Multilabel: of each class, where the label is 1 or 0.

    Args:
        features: see `nearest_neighbours`, which also says how it is computed and what it costs;
            multilabel takes a search for each class.
        labels: of the samples; those without take no part.
        k: neighbours of either kind, at least 1; fewer where there are no more.
        metric: "cosine" or "euclidean".
        task: "multiclass" or "multilabel".

    Returns:
        In [0, 1], higher = the label is more doubtful; .5 where both distances are equal, exact
        duplicates with different labels among them. NaN without label or features, or where no other
        sample has the same label, or none another.

    Raises:
        FastpieError: as `nearest_neighbours`, and for labels that do not fit.
    """
    rows = _rows(features, k, metric)
    known, columns = known_labels(labels, len(rows), task)
    pairs = [
        tuple(_label_view(rows, k, known[:, c], columns[:, c], same) for same in (True, False))
        for c in range(columns.shape[1])
    ]
    search(rows, [view for pair in pairs for view in pair])
    conflict = np.empty(columns.shape)
    for c, pair in enumerate(pairs):
        own, other = (_mean(rows.distances(view.nearest)) for view in pair)
        total = own + other
        with np.errstate(invalid="ignore"):
            conflict[:, c] = np.where(total == 0, 0.5, own / total)
    return conflict if task == "multilabel" else conflict[:, 0]


def _label_view(rows: Rows, k: int, known: np.ndarray, labels: np.ndarray, same: bool) -> View:
    def allowed(queries: slice, candidates: slice) -> np.ndarray:
        equal = labels[queries, None] == labels[candidates]
        mask: np.ndarray = (equal == same) & known[queries, None] & known[candidates]
        return mask

    return View(Nearest(len(rows), k), allowed)


def known_labels(
    labels: Any, samples: int | None, task: str
) -> tuple[np.ndarray, np.ndarray]:  # bool [N, C], [N, C]
    """Which labels are known, and what they are; multiclass is one column.

    Raises:
        FastpieError: for an unknown task, or labels of another shape or no numbers.
    """
    if task not in _TASKS:
        raise FastpieError(f"Expected `task` to be one of {_TASKS}, but got {task!r}.")
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    array = np.asarray(array)
    fits = array.ndim == (1 if task == "multiclass" else 2)
    if not fits or samples not in (None, len(array)) or array.dtype.kind not in "iufb":
        rows = "N" if samples is None else samples
        shape = f"[{rows}]" if task == "multiclass" else f"[{rows}, C]"
        raise FastpieError(
            f"Expected {task} `labels` of shape {shape} and numbers, but got {list(array.shape)} of "
            f"{array.dtype}."
        )
    columns = array.astype(np.float64).reshape(len(array), -1)
    known = columns >= 0  # not NaN
    if task == "multilabel" and not ((columns == 0) | (columns == 1) | np.isnan(columns)).all():
        raise FastpieError("Expected multilabel `labels` of 1, 0 or NaN (unknown), but got others.")
    return known, columns


def _mean(values: np.ndarray) -> np.ndarray:  # [N, k] -> [N]
    """Mean over what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(there, values, 0).sum(1) / there.sum(1)
    return mean
