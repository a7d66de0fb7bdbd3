"""Data sets whose samples end, stop or leave the process that reads them; importable in spawned workers."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

FATES = ("exit", "kill", "segfault", "hang", "spin")


def meet(fate: str) -> None:
    """Do to the calling process what `fate` says."""
    if fate == "exit":
        os._exit(3)
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's own handler would tell of it
        os.kill(os.getpid(), signal.SIGSEGV)
    if fate == "hang":
        time.sleep(3600)
    if fate == "spin":  # as a decoder in C does: no other thread of the process runs
        re.match(r"(a+)+$", "a" * 99 + "b")
    raise OSError(fate)


class Hostile(Dataset):
    """`(image, class)`; the samples named in `fates` meet theirs.

    With `once`, a folder, each only the first time that it is read.
    """

    def __init__(self, count: int, fates: dict[int, str], once: Path | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 1, 8, 8, generator=generator)
        self.fates = fates
        self.once = once

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        fate = self.fates.get(index)
        if fate is not None and (self.once is None or self._first(index)):
            meet(fate)
        return self.images[index], index % 3

    def _first(self, index: int) -> bool:
        try:
            (self.once / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def children(process: int | None = None) -> set[int]:
    """Child processes, zombies as well."""
    process = os.getpid() if process is None else process
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process:
            found.add(int(stat.parent.name))
    return found
