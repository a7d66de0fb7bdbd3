"""The cache of decoded images: every sample is decoded once, and nothing wrong is ever given back."""

import fcntl
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastpie import FastpieError
from fastpie.data import ImageCache, ManifestDataset, Preprocessing, dataset
from fastpie.data import cache as caching

SHAPE = (3, 40, 50)


def pixels(index, dtype=np.uint8):
    generator = np.random.default_rng(index)
    return generator.integers(0, np.iinfo(dtype).max, SHAPE, dtype=dtype, endpoint=True)


@pytest.fixture
def images(tmp_path):
    return ImageCache(tmp_path / "cache").images("key", 100, SHAPE)


def test_what_was_put_comes_back(images):
    assert images.get(0, "a") is None
    for index, dtype in ((0, np.uint8), (99, np.uint16), (7, np.uint8)):
        assert images.put(index, "a", pixels(index, dtype))
    grey = np.repeat(pixels(3)[:1], 3, axis=0)
    assert images.put(3, "a", grey)
    other = pickle.loads(pickle.dumps(images))
    for index, dtype in ((0, np.uint8), (99, np.uint16), (7, np.uint8)):
        back = other.get(index, "a")
        assert back.dtype == dtype
        assert back.flags.writeable
        np.testing.assert_array_equal(back, pixels(index, dtype))
    np.testing.assert_array_equal(other.get(3, "a"), grey[:1])
    assert other.get(8, "a") is None


def test_small_pixels_take_small_space(tmp_path):
    shape = (3, 224, 224)
    cache = ImageCache(tmp_path)
    images = cache.images("key", 1000, shape)
    grey = np.zeros(shape, np.uint8)
    images.put(500, "a", grey)
    plane = 224 * 224
    assert plane <= cache.used() <= plane + 4 * 4096
    assert (tmp_path / "key" / "pixels-00000").stat().st_size >= 1000 * 6 * plane


def test_a_changed_source_is_another_one(images):
    images.put(0, "size 1", pixels(0))
    assert images.get(0, "size 2") is None
    images.put(0, "size 2", pixels(1))
    assert images.get(0, "size 1") is None
    np.testing.assert_array_equal(images.get(0, "size 2"), pixels(1))


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_SHARD", 100_000)
    images = ImageCache(tmp_path).images("key", 20, SHAPE)
    for index in range(20):
        images.put(index, "a", pixels(index))
    assert len(list(tmp_path.glob("key/pixels-*"))) > 2
    for index in range(20):
        np.testing.assert_array_equal(images.get(index, "a"), pixels(index))


@pytest.mark.parametrize("name", ["index", "pixels-00000"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "empty", "gone", "folder", "noise", "moved"])
def test_damaged_files_are_empty_slots_that_fill_again(images, name, damage):
    for index in range(4):
        images.put(index, "a", pixels(index))
    images.close()
    path = images.folder / name
    content = path.read_bytes()
    if damage == "zeros":
        path.write_bytes(bytes(len(content)))
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 200])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(content)))
    elif damage == "moved":  # every slot holds what belongs to the one before
        step = 32 if name == "index" else images._stride
        path.write_bytes(content[-step:] + content[:-step])
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    for _ in range(2):
        for index in range(4):
            found = images.get(index, "a")
            assert found is None or np.array_equal(found, pixels(index))
            assert images.put(index, "a", pixels(index))
            np.testing.assert_array_equal(images.get(index, "a"), pixels(index))


def test_one_bit_is_noticed(images):
    images.put(5, "a", pixels(5))
    path = images.folder / "pixels-00000"
    with path.open("r+b") as file:
        file.seek(5 * images._stride + 1234)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    assert images.get(5, "a") is None


def fill(images, count, seed):
    order = list(range(count))
    while True:
        random.Random(seed).shuffle(order)
        for index in order:
            images.put(index, "a", pixels(index, np.uint16 if index % 2 else np.uint8))
        seed += 1


def test_processes_fill_it_at_once_and_are_killed(images):
    images.put(0, "a", pixels(0))  # open here already, as before a DataLoader forks
    context = multiprocessing.get_context("fork")
    for round_ in range(4):
        processes = [
            context.Process(daemon=True, target=fill, args=(images, 100, 10 * round_ + n))
            for n in range(3)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        while images.get(1, "a") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * (round_ + 1))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        found = [images.get(index, "a") for index in range(100)]
        assert sum(f is not None for f in found) >= 2
        for index, back in enumerate(found):
            assert back is None or np.array_equal(
                back, pixels(index, np.uint16 if index % 2 else np.uint8)
            )


def test_a_torn_slot_is_decoded_again(images, monkeypatch):
    """Killed between every two writes: pixels without an entry, an entry over half of the pixels."""
    images.put(0, "old", pixels(0))
    images.put(1, "a", pixels(1))
    real = os.pwrite
    for fail_at in (0, 1):
        calls = []

        def pwrite(handle, data, offset, calls=calls, fail_at=fail_at):
            calls.append(offset)
            if len(calls) - 1 == fail_at:
                real(handle, data[: len(data) // 2], offset)
                raise KeyboardInterrupt
            return real(handle, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            images.put(0, "new", pixels(7))
        monkeypatch.setattr(os, "pwrite", real)
        assert images.get(0, "old") is None
        assert images.get(0, "new") is None
    np.testing.assert_array_equal(images.get(1, "a"), pixels(1))
    images.put(0, "new", pixels(7))
    np.testing.assert_array_equal(images.get(0, "new"), pixels(7))


def test_the_limit_holds_and_what_is_there_stays(tmp_path):
    limit = 30 * pixels(0).nbytes
    cache = ImageCache(tmp_path, limit=limit)
    images = cache.images("key", 100, SHAPE)
    kept = [images.put(index, "a", pixels(index)) for index in range(100)]
    assert cache.used() <= limit
    assert 20 <= sum(kept) <= 30
    assert kept == sorted(kept, reverse=True)
    for index in range(sum(kept)):
        np.testing.assert_array_equal(images.get(index, "a"), pixels(index))


def test_older_caches_that_nobody_has_open_make_room(tmp_path):
    limit = 31 * 8192  # slots of two pages; there are to be 36 of them
    cache = ImageCache(tmp_path, limit=limit)
    data = {name: cache.images(name, 10, SHAPE) for name in ("open", "oldest", "older")}
    for age, (name, images) in enumerate(data.items()):
        for index in range(8):
            assert images.put(index, "a", pixels(index))
        if name != "open":
            images.close()
        os.utime(tmp_path / name / "lock", (1000 + age, 1000 + age))
    (tmp_path / ".evicted-x-1").mkdir()  # what a process killed here leaves
    (tmp_path / ".evicted-x-1" / "pixels-00000").write_bytes(bytes(5000))
    new = cache.images("new", 20, SHAPE)
    for index in range(12):
        assert new.put(index, "a", pixels(index))
    assert not (tmp_path / "oldest").exists()
    assert not (tmp_path / ".evicted-x-1").exists()
    assert cache.used() <= limit
    for name in ("open", "older"):
        np.testing.assert_array_equal(data[name].get(7, "a"), pixels(7))
    for index in range(12):
        np.testing.assert_array_equal(new.get(index, "a"), pixels(index))
    assert data["oldest"].get(0, "a") is None  # made anew
    assert (tmp_path / "oldest").exists()


def hold(images, ready, done):
    images.get(0, "a")
    ready.set()
    done.wait(60)


def test_a_cache_that_another_process_has_open_is_not_evicted(tmp_path):
    cache = ImageCache(tmp_path, limit=10**9)
    images = cache.images("key", 10, SHAPE)
    images.put(0, "a", pixels(0))
    images.close()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(daemon=True, target=hold, args=(images, ready, done))
    process.start()
    assert ready.wait(60)
    assert cache.evict(10**9) == 0
    done.set()
    process.join()
    assert cache.evict(10**9) >= pixels(0).nbytes
    assert not (tmp_path / "key").exists()


def test_eviction_while_the_lock_is_awaited(tmp_path):
    """Who waits for the lock of a cache that is being removed makes a new one."""
    images = ImageCache(tmp_path).images("key", 10, SHAPE)
    images.put(0, "a", pixels(0))
    images.close()
    lock = os.open(tmp_path / "key" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    context = multiprocessing.get_context("fork")
    process = context.Process(daemon=True, target=images.put, args=(1, "a", pixels(1)))
    process.start()
    time.sleep(0.2)
    (tmp_path / "key").rename(tmp_path / ".evicted-key")
    os.close(lock)
    process.join(60)
    assert process.exitcode == 0
    assert images.get(0, "a") is None
    np.testing.assert_array_equal(images.get(1, "a"), pixels(1))


def test_a_full_disk_warns_once_and_the_run_goes_on(images, monkeypatch):
    images.put(0, "a", pixels(0))
    real = os.pwrite
    written = []

    def pwrite(handle, data, offset):
        if sum(written) > 3000:
            raise OSError(28, "No space left on device")
        written.append(real(handle, data[:1000], offset))  # a disk that fills up takes a part
        return written[-1]

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.warns(UserWarning, match=r"No space left.*goes on"):
        assert not images.put(1, "a", pixels(1))
    assert not images.put(2, "a", pixels(2))  # a second warning would be an error
    assert images.get(1, "a") is None
    np.testing.assert_array_equal(images.get(0, "a"), pixels(0))


def limited(images, queue):
    """A file that cannot grow, by the kernel: EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = [images.put(index, "a", pixels(index)) for index in range(3)]
    queue.put((kept, len(caught), images.get(0, "a") is None))


def test_a_file_that_cannot_grow(images):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(daemon=True, target=limited, args=(images, queue))
    process.start()
    assert queue.get(timeout=60) == ([False] * 3, 1, True)
    process.join()


def test_a_folder_that_cannot_be_made_is_left_out(tmp_path):
    (tmp_path / "file").write_text("x")
    images = ImageCache(tmp_path / "file").images("key", 10, SHAPE)
    with pytest.warns(UserWarning, match="decodes what is not in it"):
        assert images.get(0, "a") is None
    assert not images.put(0, "a", pixels(0))


def test_other_shapes_and_limits_are_refused(images, tmp_path):
    with pytest.raises(FastpieError, match="shape"):
        images.put(0, "a", pixels(0)[:1])
    with pytest.raises(FastpieError, match="uint8"):
        images.put(0, "a", pixels(0).astype(np.float32))
    with pytest.raises(FastpieError, match="limit"):
        ImageCache(tmp_path, limit=0)
    with pytest.raises(IndexError):
        images.put(100, "a", pixels(0))


# ---- the data set ----


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(8):
        bits = np.uint16 if index % 2 else np.uint8
        array = generator.integers(0, np.iinfo(bits).max, (30, 20), dtype=bits)
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    rows = "".join(f"{index}.png,{index % 3}\n" for index in range(8))
    (tmp_path / "data.csv").write_text("path,label\n" + rows)
    return tmp_path / "data.csv"


@pytest.fixture
def count_decodes(monkeypatch):
    decoded = []
    real = dataset.decode

    def decode(file, *args):
        decoded.append(file.name)
        return real(file, *args)

    monkeypatch.setattr(dataset, "decode", decode)
    return decoded


def opened(source, cache=None, **options):
    preprocessing = Preprocessing(**{"size": (16, 12), "mean": [0.5], "std": [0.2], **options})
    return ManifestDataset(source, labels="label", preprocessing=preprocessing, cache=cache)


def test_an_image_is_decoded_once(source, tmp_path, count_decodes):
    plain = [opened(source)[i] for i in range(8)]
    count_decodes.clear()
    for _ in range(2):
        data = opened(source, tmp_path / "cache")
        for i, (image, label, sample_id) in enumerate(plain):
            raw = data.raw(i)
            assert raw[0].dtype is (torch.uint16 if i % 2 else torch.uint8)
            assert raw[1:] == (label, sample_id)
            assert torch.equal(data.normalize(raw[0]), image)
            assert torch.equal(data[i][0], image)
    assert len(count_decodes) == 8
    assert torch.equal(data[-1][0], plain[7][0])
    assert len(count_decodes) == 8


def test_a_changed_file_is_decoded_again(source, tmp_path):
    data = opened(source, tmp_path / "cache")
    before = data.raw(0)[0]
    Image.new("L", (30, 20), 77).save(tmp_path / "0.png")
    assert not torch.equal(data.raw(0)[0], before)
    assert data.raw(0)[0].unique().tolist() == [77]
    (tmp_path / "1.png").unlink()
    with pytest.raises(OSError, match=r"1\.png"):
        data.raw(1)


def test_another_way_to_decode_is_another_cache(source, tmp_path, count_decodes):
    for options in ({}, {"channels": 1}, {"window": (0, 100)}, {"size": (15, 12)}):
        opened(source, tmp_path / "cache", **options).raw(0)
    assert len(count_decodes) == 4
    opened(source, tmp_path / "cache", mean=[0.1]).raw(0)  # comes after the cache
    assert len(count_decodes) == 4
    source.write_text("path,label\n1.png,0\n0.png,1\n")
    opened(source, tmp_path / "cache").raw(0)
    assert len(count_decodes) == 5
    source.write_text("path,label,frame\n1.png,0,0\n0.png,1,\n")
    opened(source, tmp_path / "cache").raw(0)
    assert len(count_decodes) == 6


class Raw(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label, sample_id = self.data.raw(index)
        return image.int(), label, sample_id


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_it(source, tmp_path, count_decodes, method):
    data = opened(source, ImageCache(tmp_path / "cache", limit=10**9))
    images = [data.raw(i)[0].int() for i in range(4)]
    workers = 2 if method == "fork" else 1  # each spawned one imports torch
    loader = DataLoader(
        Raw(data), batch_size=2, num_workers=workers, multiprocessing_context=method, shuffle=False
    )
    batches = torch.cat([batch[0] for batch in loader])
    assert torch.equal(batches[:4], torch.stack(images))
    count_decodes.clear()
    assert torch.equal(torch.stack([data.raw(i)[0].int() for i in range(8)]), batches)
    assert count_decodes == []


def test_errors_are_not_cached(source, tmp_path):
    (tmp_path / "2.png").write_bytes(b"broken")
    data = opened(source, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(FastpieError, match=r"2\.png"):
            data.raw(2)
    assert len(data.raw(3)) == 3


def test_a_cache_needs_a_size(source, tmp_path):
    with pytest.raises(FastpieError, match="size"):
        ManifestDataset(source, cache=tmp_path / "cache")


def test_the_fingerprint_is_that_of_labels_and_preprocessing(source):
    prints = {opened(source).fingerprint, opened(source, mean=[0.4]).fingerprint}
    source.write_text(source.read_text().replace("0.png,0", "0.png,2"))
    assert len(prints | {opened(source).fingerprint}) == 3
    assert opened(source).fingerprint == opened(source).fingerprint
    assert opened(source).paths[0] == str(source.parent / "0.png")
    assert list(opened(source).paths[2:4]) == [str(source.parent / f"{i}.png") for i in (2, 3)]
