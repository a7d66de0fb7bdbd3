"""The cut of the work: order by id, fixed batches, whole parts, a subset that ignores the order."""

from __future__ import annotations

import random
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

from fastpie import FastpieError
from fastpie.data.texts import Texts
from fastpie.mining.plan import Plan, known_sample_ids


def test_samples_are_taken_in_the_order_of_their_ids() -> None:
    plan = Plan.cut(["b", "c", "a"], 2)
    assert plan.sample_ids == ["a", "b", "c"]
    assert plan.order.tolist() == [2, 0, 1]
    assert [plan.positions(b) for b in range(plan.batches)] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("count", "batch_size", "per_part"), [(1, 1, 1), (7, 3, 2), (12, 3, 2), (5, 64, 9), (9, 1, 4)]
)
def test_every_position_is_in_one_batch_and_one_part(
    count: int, batch_size: int, per_part: int
) -> None:
    plan = Plan(Texts(f"{i:03d}" for i in range(count)), np.arange(count), batch_size, per_part)
    batches = [plan.positions(b) for b in range(plan.batches)]
    assert list(chain(*batches)) == list(range(count))
    assert all(len(b) == batch_size for b in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    parts = [list(plan.samples_of(p)) for p in range(plan.parts)]
    assert list(chain(*parts)) == list(range(count))
    for number, part in enumerate(parts):
        assert {plan.part_of(position) for position in part} == {number}
        assert list(chain(*map(plan.positions, plan.batches_of(number)))) == part


def test_ids_are_made_strings() -> None:
    assert Plan.cut([10, 9, 2], 4).sample_ids == ["10", "2", "9"]


def test_the_order_of_the_data_set_changes_nothing() -> None:
    ids = [f"image-{i}" for i in range(50)]
    shuffled = random.Random(3).sample(ids, len(ids))
    one, two = Plan.cut(ids, 8), Plan.cut(shuffled, 8)
    assert one.sample_ids == two.sample_ids
    assert one.fingerprint() == two.fingerprint()
    assert one.lowest_hashes(10) == two.lowest_hashes(10)
    assert [shuffled[i] for i in two.order] == two.sample_ids


def test_the_fingerprint_tells_other_ids() -> None:
    first = Plan.cut(["a", "b"], 1).fingerprint()
    assert first != Plan.cut(["a", "c"], 1).fingerprint()
    assert first != Plan.cut(["a"], 1).fingerprint()
    assert first != Plan.cut(["ab"], 1).fingerprint()


def test_the_subset_is_fixed_by_the_ids_alone() -> None:
    few = Plan.cut([f"{i:04d}" for i in range(200)], 8)
    chosen = {few.sample_ids[p] for p in few.lowest_hashes(20)}
    assert len(chosen) == 20
    assert chosen != set(few.sample_ids[:20])  # not simply the first
    # Without the others, the chosen ones are still the lowest.
    rest = sorted(chosen | set(few.sample_ids[100:]))
    other = Plan.cut(rest, 3)
    assert {other.sample_ids[p] for p in other.lowest_hashes(20)} == chosen
    assert sorted(few.lowest_hashes(999)) == list(range(200))


@pytest.mark.parametrize(
    ("ids", "batch_size", "words"),
    [
        ([], 4, "empty"),
        (["a", "b", "a"], 4, "'a'"),
        ([1, "1"], 4, "unique"),
        (["a", "", "c"], 4, "sample 1"),
        (["a"], 0, "batch size"),
        (["a"], -3, "-3"),
    ],
)
def test_bad_plans(ids: list[Any], batch_size: int, words: str) -> None:
    with pytest.raises(FastpieError, match=words):
        Plan.cut(ids, batch_size)


def test_known_ids_of_an_attribute_and_a_subset(samples: Any) -> None:
    data = samples([0, 1, 2, 3], ["a", "b", "c", "d"])
    assert list(known_sample_ids(data)) == ["a", "b", "c", "d"]
    assert list(known_sample_ids(Subset(data, [3, 1]))) == ["d", "b"]
    assert list(known_sample_ids(Subset(Subset(data, [3, 1]), [1]))) == ["b"]
    assert data.reads == []


def test_known_ids_of_monai_entries() -> None:
    from monai.data import Dataset

    data = Dataset([{"image": "x.png", "sample_id": "p1"}, {"image": "y.png", "sample_id": "p2"}])
    assert list(known_sample_ids(data)) == ["p1", "p2"]


def test_unknown_ids(samples: Any) -> None:
    assert known_sample_ids(samples([0, 1])) is None
    assert known_sample_ids(Subset(samples([0, 1]), [0])) is None
    entries = SimpleNamespace(data=[{"image": 1, "sample_id": "a"}, {"image": 2}])
    assert known_sample_ids(entries) is None


def test_one_known_id_for_each_sample(samples: Any) -> None:
    with pytest.raises(FastpieError, match="each of the 3"):
        known_sample_ids(samples([0, 1, 2], ["a", "b"]))


def test_find_gives_the_place_of_every_id_and_refuses_others() -> None:
    generator = random.Random()
    for count in (1, 2, 3, 64, 257):
        ids = {
            "".join(generator.choices("abé🦴0", k=generator.randint(1, 5))) for _ in range(count)
        }
        plan = Plan.cut(list(ids), 4)
        asked = generator.choices(list(ids), k=40)
        assert [plan.sample_ids[p] for p in plan.find(asked)] == asked
        for unknown in ("", "zz", "a" * 9, "\U0010ffff"):
            if unknown not in ids:
                with pytest.raises(FastpieError, match="not among them"):
                    plan.find([*asked, unknown])
    assert plan.find([]).shape == (0,)
    numbers = Plan.cut(range(300), 4)
    assert numbers.order[numbers.find([299, np.int64(7), "0"])].tolist() == [299, 7, 0]
