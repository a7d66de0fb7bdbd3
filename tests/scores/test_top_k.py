"""`RunningTopK`: what a stream leaves, ranks merged, and states taken up again."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

import fastpie.ops
from fastpie import FastpieError
from fastpie.dual.output import DualOutput
from fastpie.mining.scoring import Scorer
from fastpie.scores import RunningTopK
from top_k_cases import assert_state, ids_of, scores_of, sorted_at_once


def test_keeps_the_hardest_of_a_stream() -> None:
    top = RunningTopK(5)
    assert [len(x) for x in top.result()] == [0, 0]
    top.update(torch.tensor([0.5, torch.nan, 2.0]), first_id=10)
    values, ids = top.result()
    assert values.tolist() == [2.0, 0.5]
    assert ids.tolist() == [12, 10]
    scores = scores_of("ties", 1, 500)
    for begin in range(0, 500, 30):
        top.update(scores[0, begin : begin + 30], torch.arange(begin, min(500, begin + 30)) + 100)
    stream = torch.cat([torch.tensor([[0.5, 2.0]]), scores], 1)
    ids = torch.cat([torch.tensor([10, 12]), torch.arange(100, 600)])
    assert_state(*top.result(), sorted_at_once(5, stream, ids))


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_merged_in_any_order_keep_what_one_keeps(ranks: int) -> None:
    scores, ids = scores_of("ties", 1, 700), ids_of("shuffled", 700)
    parts = [RunningTopK(40) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        part.update(scores[:, rank::ranks], ids[rank::ranks])
    for order in (range(ranks), reversed(range(ranks))):
        whole = RunningTopK(40)
        for rank in order:
            whole.merge(parts[rank])
        assert_state(*whole.result(), sorted_at_once(40, scores, ids))


def test_merges_with_one_that_is_not_full_and_of_another_size() -> None:
    small, large = RunningTopK(2), RunningTopK(6)
    small.update(torch.tensor([3.0]), first_id=0)
    large.update(torch.tensor([1.0, 4.0, 2.0]), first_id=1)
    large.merge(small)
    assert [x.tolist() for x in large.result()] == [[4.0, 3.0, 2.0, 1.0], [2, 0, 3, 1]]
    small.merge(large)
    assert [x.tolist() for x in small.result()] == [[4.0, 3.0], [2, 0]]


def test_a_saved_state_is_a_copy_and_goes_on_where_it_was(tmp_path) -> None:
    scores = scores_of("special", 1, 90)
    top = RunningTopK(8)
    top.update(scores[:, :50], first_id=0)
    torch.save(top.state_dict(), tmp_path / "top.pt")
    state = top.state_dict()
    top.update(scores[:, 50:], first_id=50)
    other = RunningTopK(8)
    other.update(torch.full((9,), 1e9), first_id=0)  # forgotten
    for saved in (state, torch.load(tmp_path / "top.pt", weights_only=True)):
        other.load_state_dict(saved)
        other.update(scores[:, 50:], first_id=50)
        assert_state(*other.result(), top.result())


def test_results_are_no_views_of_the_state() -> None:
    top = RunningTopK(2)
    top.update(torch.tensor([1.0, 2.0]), first_id=0)
    values, ids = top.result()
    top.update(torch.tensor([3.0]), first_id=2)
    assert values.tolist() == [2.0, 1.0]
    assert ids.tolist() == [1, 0]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("levels", [1, 4])
def test_ranks_by_the_hardness_of_the_mined_table(levels: int, task: str, labelled: bool) -> None:
    n, classes = 300, 6
    dense, pruned = torch.randn(n, classes), torch.randn(levels, n, classes)
    multiclass = task == "multiclass"
    labels = torch.arange(n) % classes if multiclass else (torch.rand(n, classes) < 0.4).float()
    given = labels if labelled else None
    top = RunningTopK(n)
    fastpie.ops.disagreement_top_k(dense, pruned, given, task, values=top.values, ids=top.ids)
    scorer = Scorer(task, [0.1 * (i + 1) for i in range(levels)], True, labelled)
    out = DualOutput(dense, pruned, None)
    rows, columns, problems, _ = scorer.score(out, given, range(n), range(n))
    assert rows == list(range(n))
    assert problems == []
    hardness = torch.from_numpy(pa.array(columns["hardness"]).to_numpy().copy())
    assert_state(*top.result(), sorted_at_once(n, hardness[None], torch.arange(n)))


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3"])
def test_k_that_is_no_positive_integer_is_refused(k: object) -> None:
    with pytest.raises(FastpieError, match="positive integer"):
        RunningTopK(k)


def test_ids_must_come_in_exactly_one_way() -> None:
    top = RunningTopK(2)
    with pytest.raises(FastpieError, match="either"):
        top.update(torch.zeros(2))
    with pytest.raises(FastpieError, match="either"):
        top.update(torch.zeros(2), torch.arange(2), first_id=0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"values": torch.zeros(3)}, "ids"),
        ({"values": torch.zeros(2), "ids": torch.arange(2)}, "k = 3"),
        ({"values": torch.zeros(3), "ids": torch.zeros(3)}, "int64"),
        ({"values": torch.zeros(3, dtype=torch.float64), "ids": torch.arange(3)}, "float32"),
    ],
)
def test_states_that_are_none_are_refused(state: dict, message: str) -> None:
    top = RunningTopK(3)
    with pytest.raises(FastpieError, match=message):
        top.load_state_dict(state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_devices_can_be_mixed_between_states() -> None:
    scores, ids = scores_of("ties", 1, 400), ids_of("repeated", 400)
    on_gpu, on_cpu = RunningTopK(30, "cuda"), RunningTopK(30)
    on_gpu.update(scores[:, :200].cuda(), ids[:200].cuda())
    on_cpu.update(scores[:, 200:], ids[200:])
    on_cpu.merge(on_gpu)
    assert_state(*on_cpu.result(), sorted_at_once(30, scores, ids))
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert on_gpu.values.is_cuda
    assert_state(*on_gpu.result(), on_cpu.result())
