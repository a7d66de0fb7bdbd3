"""The operator `top_k_update` on each device: the same bits as one sort, however a stream is cut."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpie import _C, FastpieError, ops
from fastpie.ops import _native, reference
from fastpie.ops.disagreement import SCORES
from fastpie.ops.top_k import native_arguments
from top_k_cases import (
    KINDS,
    Update,
    assert_state,
    check_against_twin,
    check_stream,
    ids_of,
    new_state,
    scores_of,
    sorted_at_once,
)

on_a_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Implementation(NamedTuple):
    update: Update
    device: str


def _twin(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    state = reference.top_k_update(values, ids, scores, new_ids, first_id)
    values.copy_(state[0])
    ids.copy_(state[1])


def _cuda(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    if (reason := _native.cuda_unusable_reason()) is not None:
        pytest.skip(reason)
    arguments, _alive = native_arguments(values, ids, scores, new_ids, first_id)
    _native.call(_C.top_k_update_cuda, *arguments, _native.cuda_stream(values))


def _emulated(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    arguments, _alive = native_arguments(values, ids, scores, new_ids, first_id)
    _native.call(_C.top_k_update_cuda, *arguments, 0)


def _triton(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    _native.triton_kernels().top_k_update(values, ids, scores, new_ids, first_id)


@pytest.fixture(
    params=[
        pytest.param(Implementation(ops.top_k_update, "cpu"), id="cpu"),
        pytest.param(Implementation(_twin, "cpu"), id="twin"),
        pytest.param(
            Implementation(_emulated, "cpu"), id="emulated", marks=pytest.mark.cuda_emulated
        ),
        pytest.param(Implementation(_cuda, "cuda"), id="cuda", marks=on_a_gpu),
        pytest.param(Implementation(_triton, "cuda"), id="triton", marks=on_a_gpu),
    ]
)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return request.param


# ---------------------------------------------------------------------------- the state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 10, 4096])
def test_a_stream_leaves_what_one_sort_of_it_gives(
    implementation: Implementation, k: int, kind: str
) -> None:
    update, device = implementation
    for n, cuts in ((7, [3]), (300, []), (5000, [64, 128, 129, 2500])):
        check_stream(update, k, scores_of(kind, 1, n), None, cuts, device)


@pytest.mark.parametrize("kind", ["ascending", "shuffled", "repeated", "extreme"])
@pytest.mark.parametrize("k", [1, 37, 4096])
def test_ids_decide_among_equal_scores(implementation: Implementation, k: int, kind: str) -> None:
    update, device = implementation
    for scores in (scores_of("ties", 1, 3000), scores_of("constant", 1, 3000)):
        check_stream(update, k, scores, ids_of(kind, 3000), [1, 1000, 1700], device)


@pytest.mark.parametrize("kind", ["plain", "ties", "special"])
@pytest.mark.parametrize("levels", [2, 4, 11])
def test_the_mean_over_the_levels_counts(
    implementation: Implementation, levels: int, kind: str
) -> None:
    update, device = implementation
    scores = scores_of(kind, levels, 900)
    check_stream(update, 50, scores, None, [300], device)
    # Levels of a larger tensor, rows that are not contiguous.
    spaced = torch.empty(levels, 1800)[:, ::2].copy_(scores)
    check_stream(update, 50, spaced, None, [300], device)


@pytest.mark.parametrize("k", [1, 333, 4096])
def test_batch_against_the_twin(implementation: Implementation, k: int) -> None:
    update, device = implementation
    if update is _twin:
        pytest.skip("this is the twin")
    for kind in KINDS:
        for n in (1, 4500):
            check_against_twin(update, k, scores_of(kind, 2, n), ids_of("repeated", n), device)


@pytest.mark.parametrize("kind", ["plain", "ties", "special"])
def test_cuts_and_order_of_the_stream_do_not_show(
    implementation: Implementation, kind: str
) -> None:
    update, device = implementation
    scores, ids = scores_of(kind, 1, 4000), ids_of("repeated", 4000)
    expected = sorted_at_once(100, scores, ids)
    for batch in (1, 63, 1024, 4000) if device == "cuda" else (97, 4000):
        order = torch.randperm(4000)
        values, places = new_state(100, device)
        for begin in range(0, 4000, batch):
            part = order[begin : begin + batch]
            update(values, places, scores[:, part].to(device), ids[part].to(device), 0)
        assert_state(values, places, expected)


def test_larger_states_than_any_tile(implementation: Implementation) -> None:
    update, device = implementation
    check_stream(update, 5003, scores_of("ties", 1, 8000), None, [4000], device)


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (0, 4)])
def test_nothing_to_take_in(implementation: Implementation, shape: tuple[int, int]) -> None:
    update, device = implementation
    values, ids = new_state(3, device)
    update(values, ids, torch.ones(1, 2, device=device), None, 5)
    update(values, ids, torch.empty(shape, device=device), None, 0)
    assert_state(values, ids, (torch.tensor([1, 1, -torch.inf]), torch.tensor([5, 6, -1])))


@pytest.mark.cuda_emulated
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("k", [3, 1500])
def test_order_of_threads_does_not_show(k: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPIE_EMULATOR_SEED", str(seed))
    for kind in ("ties", "special"):
        check_stream(_emulated, k, scores_of(kind, 1, 3000), ids_of("repeated", 3000), [30, 1055])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_replays_in_a_cuda_graph() -> None:
    batch, ids = torch.zeros(2, 64, device="cuda"), torch.zeros(64, dtype=torch.int64).cuda()
    values, places = new_state(100, "cuda")
    ops.top_k_update(values, places, batch, ids)  # loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.top_k_update(values, places, batch, ids)
    values.fill_(-torch.inf)
    places.fill_(-1)
    scores = scores_of("ties", 2, 640)
    for begin in range(0, 640, 64):
        batch.copy_(scores[:, begin : begin + 64])
        ids.copy_(torch.arange(begin, begin + 64))
        graph.replay()
    assert_state(values, places, sorted_at_once(100, scores, torch.arange(640)))


# ---------------------------------------------------------------------------- inside torch


def test_operator_passes_torch_opcheck() -> None:
    for new_ids in (None, torch.tensor([3, 9, 4])):
        arguments = (*new_state(5), torch.randn(2, 3), new_ids, 7)
        torch.library.opcheck(torch.ops.fastpie.top_k_update.default, arguments)


def test_operator_compiles_into_one_graph() -> None:
    def take(values: Tensor, ids: Tensor, dense: Tensor, pruned: Tensor, first: int) -> Tensor:
        return 2 * ops.disagreement_top_k(dense, pruned, values=values, ids=ids, first_id=first)

    compiled = torch.compile(take, backend="aot_eager", fullgraph=True)
    state, expected = new_state(9), new_state(9)
    for first in (0, 6, 12):
        logits = torch.randn(6, 5), torch.randn(2, 6, 5)
        torch.testing.assert_close(
            compiled(*state, *logits, first), take(*expected, *logits, first), equal_nan=True
        )
        assert_state(*state, expected)


# ---------------------------------------------------------------------------- with the scores


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("score", [None, "flip", "damage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_a_batch_and_takes_it_in(
    dtype: torch.dtype, score: str | None, task: str, device: str
) -> None:
    state, expected = new_state(10, device), new_state(10, device)
    for first in range(0, 60, 20):
        dense, pruned = (
            torch.randn(20, 4).to(device, dtype),
            torch.randn(3, 20, 4).to(device, dtype),
        )
        dense[first // 20] = torch.nan
        multiclass = task == "multiclass"
        labels = torch.arange(20) % 5 if multiclass else (torch.rand(20, 4) < 0.3).float()
        labels = labels.to(device)
        for given in (labels, None) if score != "damage" else (labels,):
            name = score or ("js" if given is None else "loss_pruned")
            got = ops.disagreement_top_k(
                dense,
                pruned,
                given,
                task,
                values=state[0],
                ids=state[1],
                first_id=first,
                score=score,
            )
            wanted = ops.disagreement(dense, pruned, given, task)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
            by = wanted[SCORES.index(name)].float()
            ops.top_k_update(*expected, by, first + torch.arange(20, device=device))
            assert_state(*state, tuple(x.cpu() for x in expected))
    assert not state[0].isnan().any()


def test_scores_stay_differentiable() -> None:
    dense, pruned = torch.randn(4, 3, requires_grad=True), torch.randn(1, 4, 3)
    values, ids = new_state(2)
    scores = ops.disagreement_top_k(dense, pruned, values=values, ids=ids)
    scores[SCORES.index("kl")].sum().backward()
    assert dense.grad.abs().sum() > 0
    assert not values.requires_grad


# ---------------------------------------------------------------------------- bad input

V, I, S = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(5)
REFUSED = {
    "empty_state": ((V[:0], I[:0], S), "k >= 1"),
    "matrix_state": ((V[None], I[None], S), r"\[k\]"),
    "double_state": ((V.double(), I, S), "float32.*float64"),
    "ids_of_another_shape": ((V, I[:2], S), r"\[3\].*\[2\]"),
    "ids_of_another_dtype": ((V, I.int(), S), "int64.*int32"),
    "strided_state": ((torch.zeros(6)[::2], I, S), "contiguous"),
    "state_with_gradients": ((torch.zeros(3, requires_grad=True), I, S), "requires_grad"),
    "scores_of_three_dimensions": ((V, I, S[None, None]), r"\[L, n\].*\[1, 1, 5\]"),
    "scores_of_another_dtype": ((V, I, S.bfloat16()), "float32.*bfloat16"),
    "new_ids_of_another_shape": ((V, I, S, I), r"\[5\].*\[3\]"),
    "new_ids_of_another_dtype": ((V, I, S, S), "int64.*float32"),
    "mixed_devices": ((V, I, S.to("meta")), "device"),
    "float_first_id": ((V, I, S, None, 1.0), "integer.*1.0"),
    "tensor_first_id": ((V, I, S, None, torch.tensor(1)), "integer"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(FastpieError, match=message):
        ops.top_k_update(*arguments)


@pytest.mark.parametrize("score", ["loss", "spearman", "margin_pruned", "loss_pruned", "damage"])
def test_scores_that_cannot_rank_are_refused(score: str) -> None:
    with pytest.raises(FastpieError, match=f"'js'.*{score}"):
        ops.disagreement_top_k(
            torch.zeros(2, 3), torch.zeros(1, 2, 3), values=V.clone(), ids=I.clone(), score=score
        )


def test_a_batch_that_is_refused_leaves_the_state_as_it_was() -> None:
    values, ids = new_state(3)
    for new_ids in (I, S):
        with pytest.raises(FastpieError, match="new_ids"):
            ops.disagreement_top_k(
                torch.randn(5, 3), torch.randn(1, 5, 3), values=values, ids=ids, new_ids=new_ids
            )
    assert_state(values, ids, new_state(3))
