"""Messages between processes: one file in memory each, whose descriptor goes over a socket.

torch's own way leaves the descriptor in the sender, which has to live and to answer when the receiver
wants it: a reader that hangs or dies after a batch then takes that batch, or the receiver, with it. It also
needs room in /dev/shm, of which a container has 64 MiB. Here the descriptor travels with the message.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import socket
import struct
import tempfile
from typing import Any

import torch
from torch import Tensor

__all__ = ["receive", "send"]

_HEADER = struct.Struct("<Q")
_ALIGNMENT = 64  # bytes: of torch's own CPU tensors


def send(link: socket.socket, value: Any) -> None:
    """Send anything that can be pickled; never waits for the receiver.

    Tensors on the CPU arrive as plain tensors, of whatever subclass they were.

    Raises:
        OSError: too many files are open, or there is no room in memory.
        BrokenPipeError: the other process is gone.
        Exception: what cannot be pickled; nothing has been sent then.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(value)
    views = [buffer.raw() for buffer in buffers]
    table = pickle.dumps((pickled.getvalue(), [view.nbytes for view in views]))
    with _file_in_memory() as file:
        file.write(table)
        for view in views:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(view)
        file.flush()
        socket.send_fds(link, [_HEADER.pack(len(table))], [file.fileno()])


def receive(link: socket.socket) -> Any:
    """Wait for the next message.

    Raises:
        EOFError: the other process is gone.
        OSError: too many files are open.
    """
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    header, descriptors, _, _ = socket.recv_fds(link, _HEADER.size, 1, flags)
    if not header:
        raise EOFError
    if not descriptors:  # the system drops what does not fit into the table of open files
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        # Unmapped when the last tensor in it is gone.
        content = mmap.mmap(descriptors[0], 0, mmap.MAP_SHARED)
    finally:
        os.close(descriptors[0])
    view = memoryview(content)
    end = _HEADER.unpack(header)[0]
    pickled, sizes = pickle.loads(view[:end])
    buffers = []
    for size in sizes:
        end += -end % _ALIGNMENT
        buffers.append(view[end : end + size])
        end += size
    return pickle.loads(pickled, buffers=buffers)


def _file_in_memory() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fastpie"), "wb")
    return tempfile.TemporaryFile()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if (
            isinstance(value, Tensor)
            and value.device.type == "cpu"
            and value.layout is torch.strided
            and not value.is_quantized
        ):
            plain = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
            raw: Any = plain.contiguous().reshape(-1).view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(raw), plain.dtype, tuple(plain.shape))
        return NotImplemented


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not memoryview(raw).nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)
