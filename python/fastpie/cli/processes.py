"""The processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["torchrun"]


@contextmanager
def torchrun(device: str) -> Iterator[tuple[int, str]]:
    """Rank and device of this process; joins the others if torchrun has started it."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0, device
        return
    import torch

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()
