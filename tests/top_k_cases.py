"""Streams that each implementation of `top_k_update` is tried on; all must give the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastpie.ops import reference

Update = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], None]

KINDS = ["plain", "ties", "special", "ascending", "descending", "constant", "nothing"]


def scores_of(kind: str, levels: int, n: int) -> Tensor:  # fp32 [levels, n]
    """Fresh random scores of one kind."""
    scores = torch.randn(levels, n)
    if kind == "ties":  # -0 and 0 among them
        return (2 * scores).round() / 4
    if kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, -0.0])
        hit = torch.rand(levels, n) < 0.3
        scores[hit] = values[torch.randint(0, len(values), (int(hit.sum()),))]
    elif kind in ("ascending", "descending"):
        scores = scores.sort(descending=kind == "descending").values
    elif kind == "constant":
        scores[:] = 0.25
    elif kind == "nothing":
        scores[:] = torch.nan
        scores[:, ::2] = -torch.inf
    return scores


def ids_of(kind: str, n: int) -> Tensor:  # int64 [n]
    """Ids that ascend, that come in any order, of which many are equal, or that are extreme."""
    if kind == "ascending":
        return torch.arange(7, 7 + n)
    if kind == "shuffled":
        return torch.randperm(n) - n // 2
    if kind == "repeated":
        return torch.randint(0, max(1, n // 3), (n,))
    extremes = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 2**32])
    return extremes[torch.randint(0, len(extremes), (n,))]


def new_state(k: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    return (
        torch.full((k,), -torch.inf, device=device),
        torch.full((k,), -1, dtype=torch.int64, device=device),
    )


def sorted_at_once(k: int, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The state after a stream, by a sort of Python objects: no tensor operation orders anything."""
    levels = scores.shape[0]
    samples = []
    for column, sample_id in zip(scores.double().t().tolist(), ids.tolist(), strict=True):
        total = 0.0
        for score in column:
            total += score
        samples.append((total / levels, sample_id))
    # Rounding to fp32 first: what ties there is in the order of the ids.
    means = torch.tensor([mean for mean, _ in samples], dtype=torch.float64).float().tolist()
    samples = [(m, i) for m, (_, i) in zip(means, samples, strict=True) if m > -torch.inf]
    samples.sort(key=lambda sample: (-sample[0], sample[1]))
    samples = (samples + [(-torch.inf, -1)] * k)[:k]
    values, places = zip(*samples, strict=True)
    return torch.tensor(values), torch.tensor(places)


def assert_state(values: Tensor, ids: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """The same bits."""
    assert torch.equal(ids.cpu(), expected[1])
    assert torch.equal(values.cpu().view(torch.int32), expected[0].view(torch.int32))


def check_stream(
    update: Update,
    k: int,
    scores: Tensor,  # [L, n]
    ids: Tensor | None,
    cuts: list[int],
    device: str | torch.device = "cpu",
) -> None:
    """Feed a stream in batches that end at `cuts`, against one sort of everything.

    The state lies within larger tensors, whose other elements must stay as they are.
    """
    values, places = (torch.cat([x, y, x]) for x, y in zip(new_state(3), new_state(k), strict=True))
    values[:3], values[-3:], places[:3], places[-3:] = 5.0, 5.0, 55, 55
    values, places = values.to(device), places.to(device)
    first_id = 2**40
    for begin, end in itertools.pairwise([0, *cuts, scores.shape[1]]):
        batch = scores[:, begin:end].to(device)
        batch_ids = None if ids is None else ids[begin:end].to(device)
        update(values[3:-3], places[3:-3], batch, batch_ids, first_id + begin)
    if ids is None:
        ids = first_id + torch.arange(scores.shape[1])
    assert_state(values[3:-3], places[3:-3], sorted_at_once(k, scores, ids))
    assert (torch.cat([values[:3], values[-3:]]) == 5).all()
    assert (torch.cat([places[:3], places[-3:]]) == 55).all()


def check_against_twin(
    update: Update, k: int, scores: Tensor, ids: Tensor | None, device: str | torch.device = "cpu"
) -> None:
    """One update of a state that is partly filled, against the twin."""
    values, places = reference.top_k_update(*new_state(k), torch.randn(1, k // 2 + 1), None, -3)
    expected = reference.top_k_update(values, places, scores, ids, 11)
    values, places = values.to(device), places.to(device)
    update(values, places, scores.to(device), None if ids is None else ids.to(device), 11)
    assert_state(values, places, expected)
