"""Nearest neighbours of samples in the features of the dense model, exact and out of core."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.mining.run_folder import RunFolder

__all__ = ["Neighbours", "nearest_neighbours", "run_features"]

_METRICS = ("cosine", "euclidean")
_LIBRARIES = ("fastpie", "faiss")
# 2,048 candidates are read, and made unit vectors, once for 4,096 queries: a tenth of the product's
# time with 512 features. All arrays of a block together stay below 500 MB.
_QUERIES, _CANDIDATES = 4096, 2048
_CHUNK = 2**22  # numbers in an array of the exact distances: 32 MB
_FAISS_EXACT = 2**16  # samples up to which FAISS compares all with all
_FAISS_PROBES = 32  # lists searched of the about 4 * sqrt(N) above that


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
    if k < 1:
        raise FastpieError(f"Expected `k` of at least 1, but got {k}.")
    for name, value, known in (("metric", metric, _METRICS), ("library", library, _LIBRARIES)):
        if value not in known:
            raise FastpieError(f"Expected `{name}` to be one of {known}, but got {value!r}.")
    if isinstance(features, MiningResult | str | os.PathLike):
        features = run_features(features)
    rows = _Rows(features, metric)
    best = _Best(len(rows), k)
    (_search if library == "fastpie" else _search_faiss)(rows, best)
    none = best.indices < 0
    squares = np.where(none, np.nan, best.squares)
    distances = squares / 2 if metric == "cosine" else np.sqrt(squares) * rows.scale
    return Neighbours(best.indices, distances, metric)


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
            if len(models) > 1:
                norms = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
                block = block / np.where(norms > 0, norms, 1)
            result[rows.filter(known).to_numpy(), place * width : (place + 1) * width] = block
    return result


def _temporary(shape: tuple[int, int]) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="fastpie-features-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


class _Rows:
    """Features as vectors whose Euclidean distances order as those asked for.

    Attributes:
        usable: bool [N], whether all values of a row are finite.
        scale: what the vectors were divided by, a power of 2: with the largest value in [.5, 1) no
            square overflows.
    """

    def __init__(self, features: Any, metric: str) -> None:
        if isinstance(features, torch.Tensor):
            features = features.detach().cpu()
            features = (features.float() if features.dtype is torch.bfloat16 else features).numpy()
        array = np.asanyarray(features)  # a memory map stays one
        if array.ndim != 2 or not (
            np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
        ):
            raise FastpieError(
                f"Expected `features` of shape [N, D] and numbers, but got {list(array.shape)} of "
                f"{array.dtype}."
            )
        self._array = array
        self._cosine = metric == "cosine"
        self._zeros = False
        self.usable = np.empty(len(array), bool)
        self.scale = 1.0
        largest = 0.0
        for first in range(0, len(array), _CANDIDATES):
            block = array[first : first + _CANDIDATES].astype(np.float64)
            usable = np.isfinite(block).all(1)
            self.usable[first : first + len(block)] = usable
            heights = np.abs(block[usable]).max(1, initial=0)
            self._zeros |= self._cosine and not heights.all()
            largest = max(largest, heights.max(initial=0))
        if largest > 0 and not self._cosine:
            self.scale = float(2.0 ** np.frexp(largest)[1])

    def __len__(self) -> int:
        return len(self._array)

    @property
    def width(self) -> int:
        return int(self._array.shape[1]) + self._zeros

    def block(self, first: int, last: int) -> np.ndarray:  # fp64 [n, width]
        """Some vectors; zeros for a row that is not usable."""
        block = self._array[first:last].astype(np.float64)
        block[~self.usable[first:last]] = 0
        if not self._cosine:
            block /= self.scale
            return block
        heights = np.abs(block).max(1, initial=0, keepdims=True)
        block /= np.where(heights > 0, heights, 1)  # the squares of tiny values would vanish
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        block /= np.where(norms > 0, norms, 1)
        if self._zeros:
            block = np.hstack([block, (norms == 0).astype(np.float64)])
        return block


class _Best:
    """The nearest found so far, by squared distance and then index.

    Attributes:
        indices: int64 [N, k], -1 where none yet.
        squares: fp64 [N, k], inf where none yet.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.indices = np.full((rows, k), -1, np.int64)
        self.squares = np.full((rows, k), np.inf)

    def offer(self, queries: np.ndarray, found: np.ndarray, squares: np.ndarray) -> None:
        """Take pairs into account, each once. All arrays [M]."""
        touched, places = np.unique(queries, return_inverse=True)
        places = np.concatenate([np.repeat(np.arange(len(touched)), self.k), places])
        found = np.concatenate([self.indices[touched].ravel(), found])
        squares = np.concatenate([self.squares[touched].ravel(), squares])
        order = np.lexsort((found, squares, places))
        places = places[order]
        ranks = np.arange(len(order)) - np.searchsorted(places, np.arange(len(touched)))[places]
        kept = ranks < self.k
        order, at = order[kept], (touched[places[kept]], ranks[kept])
        self.indices[at] = found[order]
        self.squares[at] = squares[order]


def _search(rows: _Rows, best: _Best) -> None:
    # With u = 2^-24, a product of D terms in fp32 is off by at most (D + 2) u |a| |b| in whatever
    # order it is summed, its two roundings to fp32 included, and 2 |a| |b| <= |a|^2 + |b|^2
    # (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); 6 u more for the norms
    # and the sums.
    slack = 1.1 * (rows.width + 8) * 2.0**-24
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the bound is for fp32, not for TF32 or bf16
    try:
        for first in range(0, len(rows), _QUERIES):
            queries = rows.block(first, first + _QUERIES)
            for other in range(0, len(rows), _CANDIDATES):
                candidates = rows.block(other, other + _CANDIDATES)
                bounds = _lower_bounds(queries, candidates, slack)
                bounds[~rows.usable[first : first + len(queries)]] = np.inf
                bounds[:, ~rows.usable[other : other + len(candidates)]] = np.inf
                both = np.arange(
                    max(first, other), min(first + len(queries), other + len(candidates))
                )
                bounds[both - first, both - other] = np.inf  # itself
                _offer_nearest(best, bounds, queries, candidates, first, other)
    finally:
        torch.set_float32_matmul_precision(precision)


def _lower_bounds(
    queries: np.ndarray,  # [Q, D]
    candidates: np.ndarray,  # [B, D]
    slack: float,
) -> np.ndarray:  # fp32 [Q, B]
    """What the squared distances are at least."""
    a, b = (torch.from_numpy(v) for v in (queries, candidates))
    norms = [(v.square().sum(1) * (1 - slack)).float() for v in (a, b)]
    bounds: np.ndarray = (
        torch.addmm(norms[1], a.float(), b.float().T, alpha=-2).add_(norms[0][:, None]).numpy()
    )
    return bounds


def _offer_nearest(
    best: _Best,
    bounds: np.ndarray,  # fp32 [Q, B], inf: no candidate
    queries: np.ndarray,
    candidates: np.ndarray,
    first: int,
    other: int,
) -> None:
    """Offer the pairs whose bound is not above what the query has found already.

    In rounds of a few candidates a query, in the order of their indices, for each round lowers what
    is to be beaten: with thousands of duplicates the first k end the search at distance 0, and a
    block that is much nearer than those before does not have to be computed whole.
    """
    row, column = np.nonzero(bounds <= _to_beat(best, first, len(queries))[:, None])
    while len(row):
        starts = np.searchsorted(row, np.arange(len(queries)))
        now = np.arange(len(row)) - starts[row] < 4 * best.k
        best.offer(
            first + row[now],
            other + column[now],
            _squares(queries, candidates, row[now], column[now]),
        )
        row, column = row[~now], column[~now]
        left = bounds[row, column] <= _to_beat(best, first, len(queries))[row]
        row, column = row[left], column[left]


def _to_beat(best: _Best, first: int, count: int) -> np.ndarray:  # fp32 [count]
    """What a bound must not be above, for a candidate to come among the nearest of a query."""
    worst = best.squares[first : first + count, -1]
    limits = np.nextafter(worst.astype(np.float32), np.float32(np.inf))
    limits = np.minimum(limits, np.finfo(np.float32).max)  # inf: not a candidate
    # Candidates come in the order of their indices: a later one cannot win at distance 0.
    limits[worst == 0] = -np.inf
    return limits


def _squares(
    queries: np.ndarray, candidates: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:  # fp64 [M]
    """Squared distances of pairs, each summed by itself so that equal pairs give equal bits."""
    result = np.empty(len(row))
    step = max(1, _CHUNK // max(1, queries.shape[1]))
    for at in range(0, len(row), step):
        difference = queries[row[at : at + step]] - candidates[column[at : at + step]]
        result[at : at + step] = np.square(difference).sum(1)
    return result


def _search_faiss(rows: _Rows, best: _Best) -> None:
    faiss = load_extra("faiss", "faiss", "nearest neighbours by FAISS")
    usable = np.flatnonzero(rows.usable)
    if len(usable) < 2:
        return
    vectors = np.empty((len(usable), rows.width), np.float32)
    for first in range(0, len(rows), _QUERIES):
        of_block = rows.usable[first : first + _QUERIES]
        at = np.searchsorted(usable, first)
        vectors[at : at + of_block.sum()] = rows.block(first, first + _QUERIES)[of_block]
    index = faiss.IndexFlatL2(rows.width)
    if len(usable) > _FAISS_EXACT:
        index = faiss.IndexIVFFlat(index, rows.width, int(4 * len(usable) ** 0.5))
        index.train(vectors)  # from a fixed seed
        index.nprobe = _FAISS_PROBES
    index.add(vectors)
    wanted = min(best.k + 1, len(usable))  # itself among them
    for first in range(0, len(usable), _QUERIES):
        _, found = index.search(vectors[first : first + _QUERIES], wanted)
        row, place = np.nonzero((found >= 0) & (found != first + np.arange(len(found))[:, None]))
        column = found[row, place]
        squares = np.square(vectors[first + row].astype(np.float64) - vectors[column]).sum(1)
        best.offer(usable[first + row], usable[column], squares)
