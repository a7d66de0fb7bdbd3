"""The search behind `fastpie.analysis.neighbours`: blocks of queries against blocks of candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

__all__ = ["Nearest", "Rows", "View", "search", "search_faiss"]

# A block is read, and made unit vectors, once for 2,048 queries: a small part of the product's time.
# Its arrays stay below 300 MB; below 1 GB where most features are equal, and all pairs are candidates.
_QUERIES = _CANDIDATES = 2048
_CHUNK = 2**16  # numbers in an array of the exact distances: 512 KB, which stay in the cache
_FAISS_EXACT = 2**16  # samples up to which FAISS compares all with all
_FAISS_PROBES = 32  # lists searched of the about 4 * sqrt(N) above that


class Rows:
    """Features as vectors whose Euclidean distances order as those asked for.

    Attributes:
        usable: bool [N], whether all values of a row are finite.
        scale: what the vectors were divided by, a power of 2: with the largest value in [1, 2) no
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
            self.scale = float(np.ldexp(1.0, np.frexp(largest)[1] - 1))

    def __len__(self) -> int:
        return len(self._array)

    @property
    def width(self) -> int:
        """Components of a vector."""
        return int(self._array.shape[1]) + self._zeros

    def distances(self, nearest: Nearest) -> np.ndarray:  # fp64 [N, k]
        """In the metric asked for; NaN where there is no neighbour."""
        squares = np.where(nearest.indices < 0, np.nan, nearest.squares)
        distances: np.ndarray = squares / 2 if self._cosine else np.sqrt(squares) * self.scale
        return distances

    def block(self, first: int, last: int) -> np.ndarray:  # fp64 [n, width]
        """Some vectors; zeros for a row that is not usable."""
        block: np.ndarray = self._array[first:last].astype(np.float64)
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


class Nearest:
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

    def full(self, queries: Any, found: Any) -> Any:  # bool, one for each query
        """Whether k are found at distance 0, all before an index: no later one can win then."""
        return (self.squares[queries, -1] == 0) & (self.indices[queries].max(-1) < found)


class View(NamedTuple):
    """One search among others over the same features.

    Attributes:
        nearest: where it puts what it finds.
        allowed: bool [Q, B] for a slice of queries and one of candidates; None: all pairs.
    """

    nearest: Nearest
    allowed: Callable[[slice, slice], np.ndarray] | None = None


def search(rows: Rows, views: Sequence[View]) -> None:
    """Find the nearest of every row among those that each view allows; exactly, ties by index."""
    # With u = 2^-24, a product of D terms in fp32 is off by at most (D + 2) u |a| |b| in whatever
    # order it is summed, its two roundings to fp32 included, and 2 |a| |b| <= |a|^2 + |b|^2
    # (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); 6 u more for the norms
    # and the sums, a tenth for u^2.
    slack = 1.1 * (rows.width + 8) * 2.0**-24
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the bound is for fp32, not for TF32 or bf16
    try:
        for first in range(0, len(rows), _QUERIES):
            queries = rows.block(first, first + _QUERIES)
            for other in range(0, len(rows), _CANDIDATES):
                candidates = rows.block(other, other + _CANDIDATES)
                ends = first + len(queries), other + len(candidates)
                bounds = _lower_bounds(queries, candidates, slack)
                bounds[~rows.usable[first : ends[0]]] = np.inf
                bounds[:, ~rows.usable[other : ends[1]]] = np.inf
                both = np.arange(max(first, other), min(ends))
                bounds[both - first, both - other] = np.inf  # itself
                for view in views:
                    of_view = bounds
                    if view.allowed is not None:
                        mask = view.allowed(slice(first, ends[0]), slice(other, ends[1]))
                        of_view = np.where(mask, bounds, np.float32(np.inf))
                    _offer_nearest(view.nearest, of_view, queries, candidates, first, other)
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
    nearest: Nearest,
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

    def offer(row: np.ndarray, column: np.ndarray) -> None:
        squares = _squares(queries, candidates, row, column)
        nearest.offer(first + row, other + column, squares)

    here = slice(first, first + len(queries))
    if np.isinf(nearest.squares[here]).any():
        # Nothing to beat yet: begin with those that look nearest.
        count = min(nearest.k, len(candidates))
        found = torch.from_numpy(bounds).topk(count, 1, largest=False).indices.numpy()
        row = np.repeat(np.arange(len(queries)), count)
        column = found.ravel()
        some = np.isfinite(bounds[row, column])
        row, column = row[some], column[some]
        offer(row, column)
        bounds = bounds.copy()
        bounds[row, column] = np.inf
    limits = _limits(nearest, here)
    limits[nearest.full(here, other)] = -np.inf
    row, column = np.nonzero(bounds <= limits[:, None])
    while len(row):
        starts = np.searchsorted(row, np.arange(len(queries)))
        now = np.arange(len(row)) - starts[row] < 4 * nearest.k
        offer(row[now], column[now])
        row, column = row[~now], column[~now]
        left = bounds[row, column] <= _limits(nearest, here)[row]
        left &= ~nearest.full(first + row, other + column)
        row, column = row[left], column[left]


def _limits(nearest: Nearest, here: slice) -> np.ndarray:  # fp32 [Q]
    """What a bound must not be above, for a candidate to come among the nearest of a query."""
    above = np.nextafter(nearest.squares[here, -1].astype(np.float32), np.float32(np.inf))
    limits: np.ndarray = np.minimum(above, np.finfo(np.float32).max)  # inf: not a candidate
    return limits


def _squares(
    queries: np.ndarray, candidates: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:  # fp64 [M]
    """Squared distances of pairs, each summed by itself so that equal pairs give equal bits."""
    result = np.empty(len(row))
    step = max(1, _CHUNK // max(1, queries.shape[1]))
    for at in range(0, len(row), step):
        difference = queries[row[at : at + step]] - candidates[column[at : at + step]]
        result[at : at + step] = np.square(difference, out=difference).sum(1)
    return result


def search_faiss(rows: Rows, nearest: Nearest) -> None:
    """Find the nearest of every row by FAISS, up to what its cells miss."""
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
    wanted = min(nearest.k + 1, len(usable))  # itself among them
    for first in range(0, len(usable), _QUERIES):
        _, found = index.search(vectors[first : first + _QUERIES], wanted)
        row, place = np.nonzero((found >= 0) & (found != first + np.arange(len(found))[:, None]))
        column = found[row, place]
        squares = np.square(vectors[first + row].astype(np.float64) - vectors[column]).sum(1)
        nearest.offer(usable[first + row], usable[column], squares)
