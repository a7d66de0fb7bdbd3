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
from hostile_data import Hostile

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


# ---------------------------------------------------------------------- raw images


class Raw(Dataset):
    """Images of 8 and 16 bits, as `fastpie.data` gives them."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, index: int) -> Any:
        if index == 5:
            raise OSError("gone")
        return self.images[index], index, f"{index:03d}"

    def normalize(self, images: Tensor) -> Tensor:
        return (images.float() / (255 if images.dtype == torch.uint8 else 65535) - 0.4) / 0.3

    def __getitem__(self, index: int) -> Any:
        image, *rest = self.raw(index)
        return self.normalize(image), *rest


def eight_bits(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator))


def sixteen_bits(count: int) -> list[Tensor]:
    generator = np.random.default_rng(1)
    return [
        torch.from_numpy(x)
        for x in generator.integers(0, 65536, (count, 1, 8, 8)).astype(np.uint16)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_images_are_read_and_normalised_as_a_batch(workers: int) -> None:
    x = [*eight_bits(4), *sixteen_bits(3)]  # batches of 8 bits, of both, of 16
    data = Raw([x[i] for i in (0, 1, 2, 3, 4, 4, 5, 6)])
    reader = Reader(data, batch_size=3, num_workers=workers)
    assert reader.raw
    batches = read_all(data, shape=[[1, 8, 8]], batch_size=3, workers=workers, check_ids=True)
    assert [b.images.dtype for b in batches] == [torch.uint8, torch.uint16, torch.uint16]
    assert [p.position for b in batches for p in b.problems] == [5]
    for batch in batches:
        assert batch.images.shape == (3, 1, 8, 8)
        normalised = reader.normalize(batch.images)
        assert normalised.dtype == torch.float32
        for position, slot in zip(batch.positions, batch.slots, strict=True):
            assert torch.equal(normalised[slot], data[position][0])
            assert batch.labels[slot] == position
    one = reader.read_one(0)
    assert torch.equal(one.image, data[0][0])
    assert shapes_of(one.image) == shapes_of(data.raw(0)[0])


def test_every_value_of_8_bits_normalises_alike_in_16() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    data = Raw([ramp, torch.zeros(1, 16, 16, dtype=torch.uint16)])
    (batch,) = read_all(data, shape=[[1, 16, 16]], batch_size=2)
    assert batch.images.dtype == torch.uint16
    assert torch.equal(Reader(data).normalize(batch.images)[0], data[0][0])


def test_raw_images_behind_subsets() -> None:
    data = Subset(Subset(Raw(eight_bits(4)), [3, 2, 1]), torch.tensor([2, 0]))
    assert Reader(data).raw
    (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=2)
    assert batch.images.dtype == torch.uint8
    for slot, index in enumerate((1, 3)):
        assert torch.equal(batch.images[slot], data.dataset.dataset.images[index])
    assert torch.equal(Reader(data).normalize(batch.images)[0], data[0][0])
    assert Reader(Subset(Raw([]), [])).raw  # says so without a sample


def test_images_that_are_not_read_raw() -> None:
    """Where something comes after `raw`, the items are what it makes of them."""

    class Flipped(Raw):
        def __getitem__(self, index: int) -> Any:
            image, *rest = super().__getitem__(index)
            return image.flip(-1), *rest

    class FlippedSubset(Subset):
        def __getitem__(self, index: int) -> Any:
            image, *rest = super().__getitem__(index)
            return image.flip(-1), *rest

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    raw = Raw(eight_bits(3))
    flipped = torch.stack([raw[i][0].flip(-1) for i in range(3)])
    for data in (Flipped(raw.images), FlippedSubset(raw, [0, 1, 2])):
        reader = Reader(data)
        assert not reader.raw
        (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=3)
        assert torch.equal(batch.images, flipped)
        assert reader.normalize(batch.images) is batch.images
    collate = DataLoader(raw, 3, collate_fn=lambda items: torch.stack([x for x, *_ in items]) * 2)
    (batch,) = read_all(collate, shape=[[1, 8, 8]])
    assert not Reader(collate).raw
    assert torch.equal(batch.images, torch.stack([raw[i][0] for i in range(3)]) * 2)


def test_raw_images_of_another_type() -> None:
    data = Raw([*eight_bits(2), torch.ones(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.int16)])
    (batch,) = read_all(data, shape=[[1, 8, 8]], batch_size=4)
    assert batch.positions == [0, 1]
    assert [p.stage for p in batch.problems] == ["image", "image"]
    assert "torch.uint16, but got torch.float32" in batch.problems[0].error
    assert batch.images.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_raw_images_by_way_of_pinned_memory(workers: int) -> None:
    data = Raw([*eight_bits(2), *sixteen_bits(2)])
    for batch in read_all(data, shape=[[1, 8, 8]], batch_size=2, workers=workers, pin_memory=True):
        assert batch.images.is_pinned()
        on_gpu = Reader(data).normalize(batch.images.cuda(non_blocking=True))
        expected = torch.stack([data[p][0] for p in batch.positions])
        torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_in_the_items(workers: int, samples: Any, images: Callable[..., Tensor]) -> None:
    x = images(4)
    items: list[Any] = [(x[0], 0, "000"), (x[1], 0, "other"), (x[2], 0), (x[3], 0, torch.tensor(3))]
    data = samples(items)
    reader = Reader(data, batch_size=4, num_workers=workers)
    plan = Plan(["000", "001", "002", "3"], np.arange(4), 4)
    like = Kind([[1, 8, 8]], [])
    (batch,) = reader.read(plan, [np.arange(4)], like=like, check_ids=True)
    assert batch.positions == [0, 2, 3]
    (problem,) = batch.problems
    assert (problem.stage, problem.error) == ("id", "'001' is now 'other'")
    (batch,) = reader.read(plan, [[0, 1]], like=like)
    assert batch.positions == [0, 1]


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


# ---------------------------------------------------------------------- single samples


def total(sample: Sample) -> float:
    return float(sample.image.sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_of_single_samples(
    workers: int, samples: Any, images: Callable[..., Tensor]
) -> None:
    x = images(7)
    items: list[Any] = [(image, i) for i, image in enumerate(x)]
    items[1], items[4] = OSError("gone"), ("no image", 0)
    reader = Reader(samples(items), num_workers=workers)
    found = list(reader.map(total, [6, 1, 4, 0, 2], chunk=2))
    assert [value for value, reason in found if reason is None] == [
        float(x[i].sum()) for i in (6, 0, 2)
    ]
    assert found[1] == (None, "OSError: gone")
    assert found[2][0] is None
    assert "AttributeError" in found[2][1]


def test_a_function_of_raw_samples() -> None:
    data = Raw(eight_bits(5))
    found = list(Reader(Subset(data, [4, 2])).map(total, [0, 1]))
    assert found == [(float(data.raw(i)[0].sum()), None) for i in (4, 2)]


def test_a_function_of_samples_that_end_their_process(tmp_path: Any) -> None:
    reader = Reader(Hostile(4, {2: "exit"}), num_workers=1)
    found = list(reader.map(total, range(4)))
    assert [reason is None for _, reason in found] == [True, True, False, True]
    assert found[2][1] == "The process that read it ended with exit code 3."
