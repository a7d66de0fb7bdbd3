"""How fast a run is and where its time goes: images a second, stages, what the GPU does."""

from __future__ import annotations

import csv
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastpie._extras import load_extra
from fastpie.errors import FastpieError

__all__ = ["GPU_COLUMNS", "LOGS", "STAGES", "GpuMonitor", "Telemetry", "TensorBoardLog"]

LOGS = ("csv", "tensorboard")
"""Where the rows go."""

STAGES = ("wait", "copy", "forward", "score", "write")
"""For data, to the device, both models, the scores, parts to disk. They overlap."""

GPU_COLUMNS = ("gpu_utilisation", "gpu_power_w", "gpu_memory_gib")
"""Percent, watts, GiB in use by anybody."""

_COLUMNS = ("seconds", "samples", "images_per_second", *STAGES, *GPU_COLUMNS)
_PERIOD = 1.0  # seconds between two looks at the GPU; NVML's utilisation is the mean of about one


class Telemetry:
    """Measures a run and logs a row a part; may be used by several threads.

    The columns of a row: `seconds` since the start; `samples` so far, those of earlier starts
    included; `images_per_second` of the part; seconds of the part in each of `STAGES`; `gpu_utilisation`
    (percent), `gpu_power_w` and `gpu_memory_gib` (in use by anybody), means over the part, empty without
    a GPU and where NVML does not tell.
    """

    def __init__(
        self,
        folder: Path | None = None,
        log: str | None = None,
        *,
        rank: int = 0,
        device: str | torch.device = "cpu",
        done: int = 0,
    ) -> None:
        """Start to measure.

        Args:
            folder: the run folder; the log is `log/rank-<rank>.csv` or `log/tensorboard/rank-<rank>` in it.
            log: "csv", "tensorboard" (the extra `fastpie[tensorboard]`) or None for a summary only.
            rank: of this process.
            device: that computes.
            done: samples that were scored before, in a run that is resumed.

        Raises:
            FastpieError: for another `log`, one without a folder or that cannot be written, or without
                the extra that it needs.
        """
        if log is not None and (log not in LOGS or folder is None):
            raise FastpieError(f"Expected `log` to be one of {LOGS}, in a folder, but got {log!r}.")
        self._device = torch.device(device)
        self._log: Any = None
        if folder is not None and log == "csv":
            self._log = _CsvLog(folder / "log" / f"rank-{rank}.csv")
        elif folder is not None and log == "tensorboard":
            path = folder / "log" / "tensorboard" / f"rank-{rank}"
            self._log = TensorBoardLog(path, done, "samples", _group_of)
        self._gpu = GpuMonitor(self._device) if self._device.type == "cuda" else None
        self._lock = threading.Lock()
        self._total = dict.fromkeys(STAGES, 0.0)
        self._at_part = dict(self._total)  # as it was when the last part ended
        self._events: deque[tuple[str, Any, Any]] = deque()
        self._done, self._samples = done, 0
        self._start = self._last = time.perf_counter()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """`with telemetry.stage("wait"): ...` counts the block to a stage.

        A GPU computes "forward" after the block: there the time is the GPU's, between the first and
        the last of what the block issues to the current stream.

        Raises:
            FastpieError: for a name that is not in `STAGES`.
        """
        if name not in self._total:
            raise FastpieError(f"Expected a stage of {STAGES}, but got {name!r}.")
        if name == "forward" and self._gpu is not None:
            return self._recorded(name)
        return _Stage(self, name)

    def events(self, name: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Count the time between two recorded events (with `enable_timing`) to a stage, when it is known.

        Nothing waits for the GPU: what has not happened yet is counted to a later part.
        """
        with self._lock:
            self._events.append((name, start, end))

    def part(self, samples: int) -> None:
        """End a part of so many samples: log its row.

        Raises:
            FastpieError: the log cannot be written.
        """
        gpu = dict.fromkeys(GPU_COLUMNS) if self._gpu is None else self._gpu.of_part()
        with self._lock:
            self._resolve()
            now = time.perf_counter()
            self._samples += samples
            row = {
                "seconds": now - self._start,
                "samples": self._done + self._samples,
                "images_per_second": samples / max(now - self._last, 1e-9),
                **{name: self._total[name] - self._at_part[name] for name in STAGES},
                **gpu,
            }
            self._last, self._at_part = now, dict(self._total)
            if self._log is not None:
                self._log.write(row)

    def summary(self) -> dict[str, Any]:
        """The run so far, as far as this process has made it.

        Returns:
            `images` of the parts that ended, `seconds`, `images_per_second`, `stages` (seconds by
            name), and `gpu`: the means of `gpu_utilisation` (percent) and `gpu_power_w` and the most
            `gpu_memory_gib`, or None without one.
        """
        with self._lock:
            self._resolve()
            seconds = time.perf_counter() - self._start
            return {
                "images": self._samples,
                "seconds": seconds,
                "images_per_second": self._samples / max(seconds, 1e-9),
                "stages": dict(self._total),
                "gpu": None if self._gpu is None else self._gpu.of_run(),
            }

    def close(self) -> None:
        """Close the log and stop looking at the GPU."""
        if self._gpu is not None:
            self._gpu.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._total[name] += seconds

    @contextmanager
    def _recorded(self, name: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events(name, start, end)

    def _resolve(self) -> None:
        """Count what the GPU has finished."""
        while self._events and self._events[0][2].query():
            name, start, end = self._events.popleft()
            self._total[name] += start.elapsed_time(end) / 1e3


class _Stage:
    """A block that is timed; a class because a generator takes three times as long."""

    __slots__ = ("name", "start", "telemetry")

    def __init__(self, telemetry: Telemetry, name: str) -> None:
        self.telemetry = telemetry
        self.name = name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.telemetry._add(self.name, time.perf_counter() - self.start)


class _CsvLog:
    """Rows appended one at a time, so that a crash costs at most the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header = ",".join(_COLUMNS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
            if len(lines) == 1:  # nothing, or a header torn by a crash
                path.write_bytes(b"")
            self._file = path.open("a", newline="", encoding="utf-8")
            if len(lines) > 1 and lines[-1]:  # a row torn by a crash
                self._file.write("\n")
            if header.encode() not in lines[:-1]:
                self._file.write(f"{header}\n")
            self._file.flush()
        except OSError as error:
            raise _not_written(path, error) from error
        self._writer = csv.DictWriter(self._file, _COLUMNS, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        try:
            self._writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            )
            self._file.flush()
        except OSError as error:
            raise _not_written(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # of a row that could not be written, of which was told
            self._file.close()


def _group_of(column: str) -> str:
    return "stage" if column in STAGES else "gpu" if column in GPU_COLUMNS else "mine"


class TensorBoardLog:
    """Scalars by a number that grows from row to row."""

    def __init__(self, path: Path, done: int, step: str, group: Callable[[str], str]) -> None:
        """Open the log.

        Args:
            path: its folder.
            done: the last row that counts; what a crash left beyond it is shown no more.
            step: the column that the others are drawn over.
            group: the heading that a column is shown under.

        Raises:
            FastpieError: without the extra `fastpie[tensorboard]`, or if it cannot be written.
        """
        load_extra("tensorboard", "tensorboard", "log='tensorboard'")
        from torch.utils.tensorboard import SummaryWriter

        self._path, self._step, self._group = path, step, group
        try:
            self._writer: Any = SummaryWriter(os.fspath(path), purge_step=done + 1)
        except OSError as error:
            raise _not_written(path, error) from error

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; None is left out."""
        try:
            for name, value in row.items():
                if value is not None and name != self._step:
                    tag = f"{self._group(name)}/{name.removeprefix('gpu_')}"
                    self._writer.add_scalar(tag, value, row[self._step])
            self._writer.flush()
        except OSError as error:
            raise _not_written(self._path, error) from error

    def close(self) -> None:
        """Close the log."""
        self._writer.close()


def _not_written(path: Path, error: OSError) -> FastpieError:
    return FastpieError(
        f"Expected to write the log {path}, but: {error}. Make room or choose no log, and run the same "
        "command again."
    )


class GpuMonitor:
    """Asks NVML every second, in a thread; what it does not answer is None."""

    def __init__(self, device: torch.device) -> None:
        """Begin to look at a GPU."""
        self._lock = threading.Lock()
        self._part: dict[str, list[float]] = {name: [] for name in GPU_COLUMNS}
        self._latest: dict[str, float | None] = dict.fromkeys(GPU_COLUMNS)
        self._sum = dict.fromkeys(GPU_COLUMNS, 0.0)
        self._count = dict.fromkeys(GPU_COLUMNS, 0)
        self._most = dict.fromkeys(GPU_COLUMNS, 0.0)
        self._looks = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(device,), name="fastpie-gpu", daemon=True
        )
        self._thread.start()

    def of_part(self) -> dict[str, float | None]:
        """Means since the last call, or the latest where there is none."""
        with self._lock:
            part, self._part = self._part, {name: [] for name in GPU_COLUMNS}
            return {
                name: sum(values) / len(values) if values else self._latest[name]
                for name, values in part.items()
            }

    def of_run(self) -> dict[str, float | None]:
        """Means since the beginning, of the memory the most."""
        with self._lock:
            found = {
                n: self._sum[n] / self._count[n] if self._count[n] else None for n in GPU_COLUMNS
            }
            if self._count["gpu_memory_gib"]:
                found["gpu_memory_gib"] = self._most["gpu_memory_gib"]
            return found

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join(5.0)  # a driver that hangs must not keep the run from ending

    def _watch(self, device: torch.device) -> None:
        try:
            import pynvml

            nvml: Any = pynvml
            nvml.nvmlInit()
        except Exception:
            return
        try:
            # The driver counts GPUs without CUDA_VISIBLE_DEVICES; the UUID means the same to both.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            while True:
                self._look(nvml, handle)
                self._looks += 1
                if self._stopped.wait(_PERIOD):
                    return
        except Exception:
            return  # no such GPU for NVML: the columns stay empty
        finally:
            nvml.nvmlShutdown()

    def _look(self, nvml: Any, handle: Any) -> None:
        asked: dict[str, Callable[[], Any]] = {
            "gpu_utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu_memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        }
        for name, ask in asked.items():
            try:
                value = float(ask())
            except nvml.NVMLError:  # not for this GPU, or not now
                with self._lock:
                    self._latest[name] = None
                continue
            with self._lock:
                self._latest[name] = value
                self._part[name].append(value)
                self._sum[name] += value
                self._count[name] += 1
                self._most[name] = max(self._most[name], value)
