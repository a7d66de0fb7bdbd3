"""Random numbers as functions of where they are drawn, so that nothing has to be kept to go on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastpie.dual.inputs import random_state

__all__ = ["generators_kept", "seed_everything", "seed_of", "seed_reading"]


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^63) from numbers of at least 0, the same on every machine.

    NumPy's `SeedSequence`, whose hash is promised never to change: about 8 microseconds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_reading(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU): those that augmentations use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what data sets use
    torch.default_generator.manual_seed(seed)  # not those of devices: a forked worker has none


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on all devices."""
    seed_reading(seed)
    torch.manual_seed(seed)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators, the device's too, back at the end to where they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    restore = random_state(torch.empty(0, device=device))
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        restore()
