"""`TwoViews`: what it changes of an item and what it keeps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fastpie import FastpieError
from fastpie.mining.plan import known_sample_ids
from fastpie.training.objectives.views import TwoViews


class Items(Dataset[Any]):
    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def noisy(image: Tensor) -> Tensor:
    return image + torch.randn_like(image)


def negated(image: Tensor) -> Tensor:
    return -image


@pytest.mark.parametrize("make", [tuple, list])
def test_what_stands_behind_the_image_is_kept(make: Any) -> None:
    image = torch.randn(1, 4, 4)
    (a, b), label, name = TwoViews(Items([make([image, 3, "s0"])]), noisy)[0]
    assert (label, name) == (3, "s0")
    assert not torch.equal(a, b)
    state = torch.get_rng_state()
    (a, b), *_ = TwoViews(Items([make([image])]), noisy)[0]
    torch.set_rng_state(state)
    assert torch.equal(a, noisy(image))
    assert torch.equal(b, noisy(image))


def test_dicts_keep_their_other_entries_and_their_own_image() -> None:
    item = {"image": torch.randn(1, 4, 4), "label": 1, "sample_id": "x", "box": [1, 2]}
    before = item["image"]
    got = TwoViews(Items([item]), noisy)[0]
    assert item["image"] is before
    assert len(got["image"]) == 2
    assert {k: v for k, v in got.items() if k != "image"} == {
        k: v for k, v in item.items() if k != "image"
    }


def test_a_bare_image_and_a_second_transform() -> None:
    image = np.ones((2, 2), np.float32)
    ((a, b),) = TwoViews(Items([image]), lambda x: x + 1, lambda x: -x)[0]
    assert (a == 2).all()
    assert (b == -1).all()


def test_a_loader_gives_batches_of_views() -> None:
    images = torch.randn(5, 1, 4, 4)
    items = [(image, i, f"s{i}") for i, image in enumerate(images)]
    (a, b), labels, names = next(iter(DataLoader(TwoViews(Items(items), noisy, negated), 5)))
    assert a.shape == b.shape == (5, 1, 4, 4)
    assert torch.equal(b, -images)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert list(names) == [f"s{i}" for i in range(5)]


def test_attributes_are_those_of_the_data_set() -> None:
    items = [(torch.zeros(1), 0)] * 3
    views = TwoViews(Items(items, sample_ids=["a", "b", "c"], paths=["p", "q", "r"]), noisy)
    assert len(views) == 3
    assert known_sample_ids(views) == ["a", "b", "c"]
    assert known_sample_ids(Subset(views, [2, 0])) == ["c", "a"]
    assert views.paths == ["p", "q", "r"]
    without = TwoViews(Items(items), noisy)
    assert not hasattr(without, "sample_ids")
    assert known_sample_ids(without) is None


def test_it_can_be_copied_and_sent_to_workers() -> None:
    views = TwoViews(Items([(torch.ones(1), 0)], sample_ids=["a"]), negated)
    for other in (copy.copy(views), copy.deepcopy(views), pickle.loads(pickle.dumps(views))):
        assert other.sample_ids == ["a"]
        assert other[0][0][1].item() == -1


def test_bad_input() -> None:
    items = Items([{"picture": 1}, ()])
    with pytest.raises(FastpieError, match="'image'"):
        TwoViews(items, noisy)[0]
    with pytest.raises(FastpieError, match="empty"):
        TwoViews(items, noisy)[1]
    with pytest.raises(FastpieError, match="transform"):
        TwoViews(items, None)
    with pytest.raises(FastpieError, match="second"):
        TwoViews(items, noisy, 3)
    with pytest.raises(FastpieError, match="length"):
        TwoViews(iter([1]), noisy)
