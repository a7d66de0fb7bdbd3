"""Samples into fixed batches: every slot filled, whatever single samples hold."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from fastpie import FastpieError
from fastpie.mining.plan import Plan
from fastpie.mining.reading import Batch, Kind, Reader, Sample, parse_item, path_of, shapes_of

Case = namedtuple("Case", ["image", "label", "sample_id"])


def read_all(
    data: Any,
    *,
    shape: Any,
    batch_size: int | None = None,
    workers: int | None = None,
    labelled: bool = True,
    **options: Any,
) -> list[Batch]:
    """Every batch, in the data set's own order."""
    reader = Reader(data, batch_size=batch_size, num_workers=workers)
    count = len(reader.dataset)
    plan = Plan([f"{i:03d}" for i in range(count)], list(range(count)), reader.batch_size)
    like = Kind(shape, [] if labelled else None)
    positions = [plan.positions(b) for b in range(plan.batches)]
    return list(reader.read(plan, positions, like=like, **options))


def forms(image: Tensor, label: int, sample_id: str) -> dict[str, Any]:
    return {
        "tuple": (image, label, sample_id),
        "list": [image, label, sample_id],
        "dict": {"image": image, "label": label, "sample_id": sample_id, "age": 61},
        "namedtuple": Case(image, label, sample_id),
    }


# ---------------------------------------------------------------------- single items


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "namedtuple"])
def test_items_with_all_three(form: str) -> None:
    image = torch.ones(1, 2, 2)
    sample = parse_item(forms(image, 4, "a")[form])
    assert sample.image is image
    assert (sample.label, sample.sample_id) == (4, "a")


@pytest.mark.parametrize(
    "item",
    [
        torch.ones(2),
        (torch.ones(2),),
        [torch.ones(2)],
        {"image": torch.ones(2)},
        np.ones(2, np.float32),
    ],
)
def test_items_with_an_image_alone(item: Any) -> None:
    sample = parse_item(item)
    assert shapes_of(sample.image) == [[2]]
    assert sample[1:] == (None, None)


def test_an_image_and_a_label() -> None:
    assert parse_item((torch.ones(2), 1))[1:] == (1, None)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ((), "0 elements"),
        ((1, 2, 3, 4), "4 elements"),
        ({"img": 1}, "'image'"),
        ("x.png", "str"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_other_items_are_refused(item: Any, words: str) -> None:
    with pytest.raises(FastpieError, match=words):
        parse_item(item)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "namedtuple"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_all_their_slots(
    form: str, workers: int, samples: Any, images: Callable[..., Tensor]
) -> None:
    x = images(7)
    items: list[Any] = [forms(image, i, f"id{i}")[form] for i, image in enumerate(x)]
    items[1] = OSError("gone")
    batches = read_all(samples(items), shape=[[1, 8, 8]], batch_size=3, workers=workers)
    assert [b.positions for b in batches] == [[0, 2], [3, 4, 5], [6]]
    for batch in batches:
        assert batch.images.shape == (3, 1, 8, 8)
        assert batch.labels.shape == (3,)
        for position, slot in zip(batch.positions, batch.slots, strict=True):
            assert torch.equal(batch.images[slot], x[position])
            assert batch.labels[slot] == position
    (problem,) = batches[0].problems
    assert (problem.position, problem.stage) == (1, "read")
    assert "OSError" in problem.error
    assert "gone" in problem.error
    assert not any(b.problems for b in batches[1:])


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "namedtuple"])
def test_a_collate_function_of_the_users_sees_only_his_items(
    form: str, samples: Any, images: Callable[..., Tensor]
) -> None:
    """Filled slots are items of the same kind: the function need not know of them."""

    def collate(items: list[Any]) -> Any:
        if form == "dict":
            return {
                "image": torch.stack([i["image"] for i in items]) * 2,
                "label": torch.tensor([i["label"] for i in items]),
                "ages": [i["age"] for i in items],
            }
        if form == "namedtuple":
            items = [(i.image, i.label, i.sample_id) for i in items]
        x, y, _ = zip(*items, strict=True)
        return torch.stack(x) * 2, torch.tensor(y)

    x = images(5)
    items: list[Any] = [forms(image, i, f"id{i}")[form] for i, image in enumerate(x)]
    items[0] = ValueError("broken")
    loader = DataLoader(samples(items), batch_size=3, collate_fn=collate)
    first, last = read_all(loader, shape=[[1, 8, 8]])
    assert (first.positions, last.positions) == ([1, 2], [3, 4])
    assert torch.equal(first.images[first.slots], x[1:3] * 2)
    assert torch.equal(last.images[last.slots], x[3:] * 2)
    assert last.images.shape[0] == 3
    assert len(first.problems) == 1
    assert last.problems == []


def test_a_collate_function_that_fails_costs_its_batch_only(
    samples: Any, images: Callable[..., Tensor]
) -> None:
    def collate(items: list[Any]) -> Any:
        if any(label == 2 for _, label in items):
            raise RuntimeError("no twos")
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])

    data = samples([(x, i) for i, x in enumerate(images(6))])
    batches = read_all(DataLoader(data, 2, collate_fn=collate), shape=[[1, 8, 8]])
    assert [b.positions for b in batches] == [[0, 1], [], [4, 5]]
    assert [(p.position, p.stage) for p in batches[1].problems] == [(2, "collate"), (3, "collate")]
    assert "no twos" in batches[1].problems[0].error


def test_images_of_several_tensors(samples: Any, images: Callable[..., Tensor]) -> None:
    x, z = images(3), torch.arange(3.0).unsqueeze(1)
    data = samples([((x[i], z[i]), i) for i in range(3)])
    (batch,) = read_all(data, shape=[[1, 8, 8], [1]], batch_size=4)
    assert [tuple(leaf.shape) for leaf in batch.images] == [(4, 1, 8, 8), (4, 1)]
    assert torch.equal(batch.images[1][batch.slots], z)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["tensor", "array", "second of two"])
def test_images_that_are_not_finite(
    value: float, kind: str, samples: Any, images: Callable[..., Tensor]
) -> None:
    x = images(3)
    bad = x[1].clone()
    bad[0, 3, 4] = value
    rows: list[Any] = [x[0], bad, x[2]]
    shape = [[1, 8, 8]]
    if kind == "array":
        rows = [row.numpy() for row in rows]
    elif kind == "second of two":
        rows, shape = [(x[0], row) for row in rows], shape * 2
    (batch,) = read_all(samples([(row, 0) for row in rows]), shape=shape, batch_size=3)
    assert batch.positions == [0, 2]
    (problem,) = batch.problems
    assert (problem.position, problem.stage) == (1, "image")
    assert "1 NaN or infinite of 64" in problem.error
    for leaf in batch.images if kind == "second of two" else [batch.images]:
        assert leaf.isfinite().all()


def test_images_of_another_shape(samples: Any, images: Callable[..., Tensor]) -> None:
    x = images(3)
    data = samples([(x[0], 0), (x[1, :, :4], 1), (x[2], 2)])
    (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=3)
    assert batch.positions == [0, 2]
    assert "[1, 8, 8]" in batch.problems[0].error
    assert "[1, 4, 8]" in batch.problems[0].error


def test_images_of_another_structure(samples: Any, images: Callable[..., Tensor]) -> None:
    x = images(2)
    (batch,) = read_all(samples([(x[0], 0), ((x[1], x[1]), 1)]), shape=[[1, 8, 8]], batch_size=2)
    assert batch.positions == [0]
    assert batch.problems[0].stage == "image"


def test_missing_labels(samples: Any, images: Callable[..., Tensor]) -> None:
    x = images(3)
    data = samples([(x[0], 5), (x[1],), {"image": x[2]}])
    (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=3)
    assert batch.positions == [0]
    assert [(p.position, p.stage) for p in batch.problems] == [(1, "label"), (2, "label")]
    (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=3, labelled=False)
    assert batch.positions == [0, 1, 2]
    assert batch.labels is None


def test_a_batch_of_which_nothing_is_readable(samples: Any, images: Callable[..., Tensor]) -> None:
    data = samples([OSError("a"), "not an item", (images(1)[0], 1)])
    first, second = read_all(data, shape=[[1, 8, 8]], batch_size=2)
    assert first.images is None
    assert [p.position for p in first.problems] == [0, 1]
    assert second.positions == [2]


# ---------------------------------------------------------------------- what is borrowed


def test_the_loader_lends_its_settings(samples: Any, images: Callable[..., Tensor]) -> None:
    data = samples([(x, i) for i, x in enumerate(images(5))])
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    batches = read_all(loader, shape=[[1, 8, 8]])
    assert [b.positions for b in batches] == [[0, 1, 2, 3], [4]]
    assert Reader(loader, batch_size=2).batch_size == 2
    sampler = torch.utils.data.BatchSampler(range(5), 3, drop_last=False)
    assert Reader(DataLoader(data, batch_sampler=sampler)).batch_size == 3
    assert Reader(data).batch_size == 64


def test_a_loader_that_does_not_batch(samples: Any, images: Callable[..., Tensor]) -> None:
    """DataLoader(batch_size=None) has a collate function for single items; it cannot be lent."""
    data = samples([(x, i) for i, x in enumerate(images(3))])
    (batch,) = read_all(DataLoader(data, batch_size=None), shape=[[1, 8, 8]])
    assert batch.positions == [0, 1, 2]


def test_worker_init_functions_find_the_data_set() -> None:
    """The pattern of torch's own documentation: a worker opens its files in worker_init_fn."""

    class Opened(Dataset):
        offset = 0

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return torch.full((1, 8, 8), float(index + self.offset)), 0

    def init(worker: int) -> None:
        torch.utils.data.get_worker_info().dataset.offset = 100

    loader = DataLoader(Opened(), batch_size=2, num_workers=1, worker_init_fn=init)
    (batch,) = read_all(loader, shape=[[1, 8, 8]])
    assert batch.images[:, 0, 0, 0].tolist() == [100, 101]


def test_data_without_an_order_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield torch.ones(1, 8, 8), 0

    class NoLength(Dataset):
        def __getitem__(self, index: int) -> Any:
            return torch.ones(1, 8, 8), 0

    for data in (Stream(), DataLoader(Stream()), NoLength(), iter([1, 2])):
        with pytest.raises(FastpieError, match="map-style"):
            Reader(data)


def test_read_one(samples: Any) -> None:
    reader = Reader(samples([(torch.ones(2), 1), KeyError("x"), None]))
    assert isinstance(reader.read_one(0), Sample)
    assert "KeyError" in str(reader.read_one(1))
    assert "NoneType" in str(reader.read_one(2))


# ---------------------------------------------------------------------- paths for the errors table


def test_paths() -> None:
    class Folder(Dataset):
        def __init__(self) -> None:
            self.samples = [("a.png", 0), ("b.png", 1)]

        def __len__(self) -> int:
            return 2

    assert path_of(Folder(), 1) == "b.png"
    assert path_of(Subset(Folder(), [1, 0]), 0) == "b.png"
    assert path_of([1, 2], 0) is None


def test_no_path_where_the_data_set_holds_tensors(samples: Any) -> None:
    """An attribute of the right name that holds images is no path to write into a table."""
    data = samples([])
    data.samples = [(torch.ones(1, 8, 8), 0)]
    assert path_of(data, 0) is None
