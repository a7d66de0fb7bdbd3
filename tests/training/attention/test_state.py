"""What attention has mined: in a checkpoint, and on several processes."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from attending import Labelled, change
from fastpie import FastpieError
from fastpie.training.attention.attention import Attention
from recording import Small

OPTIONS: dict[str, Any] = {"batch_size": 8, "warmup": 1, "every": 1}


def data(count: int = 50, **options: Any) -> Labelled:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return Labelled(images, labels, {7: OSError("gone"), 21: OSError("gone")}, **options)


@pytest.mark.parametrize("guard", ["margin", "probe"])
def test_a_resumed_attention_goes_on_with_the_same_bits(guard: str) -> None:
    model = Small()
    attention = Attention(model, data(), guard=guard, per="label", **OPTIONS)
    for epoch in range(2):
        change(model, epoch)
        attention.step(epoch)
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    at_two = attention.table()
    weights = [t.clone() for t in model.state_dict().values()]
    change(model, 2)
    attention.step(2)

    resumed = Attention(Small(), data(), guard=guard, per="label", **OPTIONS)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert resumed.epochs == [0, 1]
    assert resumed.table().equals(at_two)
    assert resumed.errors["sample_id"].to_pylist() == attention.errors["sample_id"].to_pylist()
    again = Small()
    for tensor, value in zip(again.state_dict().values(), weights, strict=True):
        tensor.copy_(value)
    resumed = Attention(again, data(), guard=guard, per="label", **OPTIONS)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    change(again, 2)
    resumed.step(2)
    assert resumed.table().equals(attention.table())
    ids = data().sample_ids
    assert torch.equal(resumed.weights(ids), attention.weights(ids))
    assert torch.equal(resumed.hard(ids), attention.hard(ids))


def test_a_state_from_before_the_first_mining_takes_it_back() -> None:
    model, ids = Small(), data().sample_ids
    attention = Attention(model, data(), **OPTIONS)
    state = attention.state_dict()
    attention.step(0)
    assert (attention.weights(ids) != 1).any()
    attention.load_state_dict(state)
    assert (attention.weights(ids) == 1).all()
    assert not attention.hard(ids).any()


def test_how_to_attend_may_change_and_what_was_mined_may_not() -> None:
    model = Small()
    attention = Attention(model, data(), backend="reference", **OPTIONS)
    attention.step(0)
    state = attention.state_dict()
    other = Attention(
        model, data(), backend="reference", attend="weights", fraction=0.1, every=3, warmup=1,
        batch_size=8,
    )  # fmt: skip
    other.load_state_dict(state)
    assert other.table()["attention"].equals(attention.table()["attention"])
    for options, message in (
        ({"score": "js"}, "score: 'margin_pruned' in the state, 'js' now"),
        ({"sparsity": 0.3}, "sparsities"),
        ({"per": "label"}, "per: None in the state"),
        ({"guard": None}, "guard: 'margin_pruned' in the state"),
        ({"momentum": 0.1}, "momentum"),
    ):
        other = Attention(model, data(), backend="reference", **OPTIONS, **options)
        with pytest.raises(FastpieError, match=message):
            other.load_state_dict(state)
    with pytest.raises(FastpieError, match=r"the state of an Attention made .* data: '50 samples"):
        Attention(model, data(49), backend="reference", **OPTIONS).load_state_dict(state)
    with pytest.raises(FastpieError, match="format 'fastpie-attention-1', but got None"):
        attention.load_state_dict({})


def test_the_kernels_of_a_state_are_chosen_again() -> None:
    attention = Attention(Small(), data(), **OPTIONS)
    attention.step(0)
    state = attention.state_dict()
    assert state["plan"]["backend"] == "cpu"
    attention.load_state_dict({**state, "plan": {"backend": "reference"}})
    attention.step(1)
    assert attention.state_dict()["plan"] == {"backend": "reference"}


# ---------------------------------------------------------------------- several processes


def mined(model: nn.Module, rank: int, guard: str) -> tuple[list[Any], Attention]:
    """Table and weights after each of three minings of a model that differs from rank to rank."""
    attention = Attention(model, data(), guard=guard, per="label", **OPTIONS)
    found = []
    for epoch in range(3):
        change(model, epoch + 100 * rank)
        assert attention.step(epoch)
        ids = data().sample_ids
        found.append((attention.table(), attention.weights(ids), attention.hard(ids)))
    return found, attention


def one_of_two(rank: int, folder: Path, model: nn.Module, queue: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    results = []
    for guard in ("margin", "probe"):
        torch.manual_seed(0)
        found, attention = mined(model, rank, guard)
        results.append(
            ([(t, w.tolist(), h.tolist()) for t, w, h in found], attention.errors.to_pylist())
        )
    queue.put((rank, results))
    dist.destroy_process_group()


def test_two_processes_mine_what_one_mines(tmp_path: Path, restore_threads: None) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    model = Small()
    processes = [
        context.Process(target=one_of_two, args=(rank, tmp_path, model, queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for number, guard in enumerate(("margin", "probe")):
        alone, attention = mined(model, 0, guard)
        for _, of_rank in results:
            found, errors = of_rank[number]
            for (table, weights, hard), (one, w, h) in zip(found, alone, strict=True):
                assert table.equals(one)
                assert weights == w.tolist()
                assert hard == h.tolist()
            assert errors == attention.errors.to_pylist()
