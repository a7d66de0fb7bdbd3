"""What a run tells of its speed: stages, rows of a log, the GPU, and what a crash leaves of them."""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fastpie import FastpieError
from fastpie.mining.telemetry import STAGES, Telemetry


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- stages


def test_stages_add_up() -> None:
    telemetry = Telemetry()
    for _ in range(3):
        with telemetry.stage("wait"):
            time.sleep(0.02)
    with telemetry.stage("score"):
        time.sleep(0.05)
    telemetry.part(30)
    telemetry.part(12)
    summary = telemetry.summary()
    assert summary["images"] == 42
    assert 0.06 <= summary["stages"]["wait"] <= summary["seconds"]
    assert 0.05 <= summary["stages"]["score"] <= summary["seconds"]
    assert [summary["stages"][name] for name in ("copy", "forward", "write")] == [0, 0, 0]
    assert summary["images_per_second"] == pytest.approx(42 / summary["seconds"])
    assert summary["gpu"] is None
    telemetry.close()


def test_a_stage_that_raises_counts() -> None:
    telemetry = Telemetry()
    with suppress(KeyError), telemetry.stage("write"):
        time.sleep(0.02)
        raise KeyError
    assert telemetry.summary()["stages"]["write"] >= 0.02


def test_stages_of_several_threads() -> None:
    telemetry = Telemetry()
    counted = [0.0, 0.0, 0.0]

    def work(thread: int) -> None:
        for _ in range(4000):
            telemetry._add("write", 2.0**-10)
            counted[thread] += 2.0**-10
            with telemetry.stage("score"):
                pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert telemetry.summary()["stages"]["write"] == sum(counted)


def test_a_stage_costs_little() -> None:
    telemetry = Telemetry()

    def once() -> float:
        start = time.perf_counter()
        for _ in range(2000):
            with telemetry.stage("wait"):
                pass
        return (time.perf_counter() - start) / 2000

    assert min(once() for _ in range(20)) < 2e-6


# ---------------------------------------------------------------------- csv


def test_rows_of_a_csv(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, "csv", rank=3)
    path = tmp_path / "log" / "rank-3.csv"
    with telemetry.stage("forward"):
        time.sleep(0.02)
    telemetry.part(10)
    (first,) = rows_of(path)  # there at once
    with telemetry.stage("copy"):
        time.sleep(0.02)
    telemetry.part(5)
    telemetry.close()
    first, second = rows_of(path)
    assert (first["samples"], second["samples"]) == ("10", "15")
    assert float(first["forward"]) >= 0.02
    assert float(first["copy"]) == float(second["forward"]) == 0
    assert float(second["copy"]) >= 0.02
    length = float(second["seconds"]) - float(first["seconds"])
    assert float(second["images_per_second"]) == pytest.approx(5 / length, rel=0.01)
    assert second["gpu_utilisation"] == second["gpu_power_w"] == second["gpu_memory_gib"] == ""
    assert list(first) == ["seconds", "samples", "images_per_second", *STAGES, *list(first)[-3:]]


HEADER = (
    "seconds,samples,images_per_second,wait,copy,forward,score,write,"
    "gpu_utilisation,gpu_power_w,gpu_memory_gib\n"
)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ("", HEADER),
        (HEADER, HEADER),
        (HEADER[:20], HEADER),
        (HEADER[:-1], HEADER),
        (HEADER + "1,2,3,4,5,6,7,8,,,\n", HEADER + "1,2,3,4,5,6,7,8,,,\n"),
        (HEADER + "1,2,3,4,5,6,7,8,,,\n9,1", HEADER + "1,2,3,4,5,6,7,8,,,\n9,1\n"),
        ("older,columns\n1,2\n", "older,columns\n1,2\n" + HEADER),
    ],
)
def test_a_log_goes_on(left: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "log" / "rank-0.csv"
    path.parent.mkdir()
    path.write_text(left)
    for done in (100, 107):
        telemetry = Telemetry(tmp_path, "csv", done=done)
        telemetry.part(7)
        telemetry.close()
    text = path.read_text()
    assert text.startswith(expected)
    added = text[len(expected) :].splitlines()
    assert [line.split(",")[1] for line in added] == ["107", "114"]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(FastpieError, match=r"log.*same command again"):
        Telemetry(tmp_path, "csv")
    telemetry = Telemetry(tmp_path / "run", "csv")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, telemetry._log._file.fileno())
    os.close(full)
    with pytest.raises(FastpieError, match=r"No space left.*Make room"):
        telemetry.part(3)
    telemetry.close()


@pytest.mark.parametrize(("folder", "log"), [(None, "csv"), (Path("x"), "wandb")])
def test_logs_that_are_refused(folder: Path | None, log: str) -> None:
    with pytest.raises(FastpieError, match=rf"csv.*tensorboard.*{log}"):
        Telemetry(folder, log)
    with pytest.raises(FastpieError, match=r"wait.*but got 'coffee'"):
        Telemetry().stage("coffee")


# ---------------------------------------------------------------------- TensorBoard


def test_scalars_for_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    telemetry = Telemetry(tmp_path, "tensorboard", rank=1)
    with telemetry.stage("wait"):
        time.sleep(0.02)
    telemetry.part(8)
    telemetry.part(8)
    telemetry.close()
    folder = tmp_path / "log" / "tensorboard" / "rank-1"
    resumed = Telemetry(tmp_path, "tensorboard", rank=1, done=8)  # the second part was lost
    resumed.part(4)
    resumed.close()
    found = event_accumulator.EventAccumulator(str(folder)).Reload()
    scalars = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert set(scalars) == {
        "mine/seconds", "mine/images_per_second", *(f"stage/{name}" for name in STAGES),
    }  # fmt: skip
    assert [event.step for event in scalars["stage/wait"]] == [8, 12]
    assert scalars["stage/wait"][0].value >= 0.02


def test_tensorboard_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(FastpieError, match=r"fastpie\[tensorboard\]"):
        Telemetry(tmp_path, "tensorboard")
    Telemetry(tmp_path, "csv").close()


# ---------------------------------------------------------------------- a GPU that is none


class NvmlError(Exception):
    pass


class Event:
    """Of a GPU whose clock the test sets; an event happens when the test says so."""

    now = 0.0
    happened: ClassVar[set[int]] = set()
    made: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.number = len(Event.made)
        Event.made.append(self)

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.number in Event.happened

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """gpu(**answers): a fake NVML whose answers are numbers or exceptions."""

    def make(**answers: Any) -> Any:
        def answer(name: str) -> Any:
            value = answers[name]
            if isinstance(value, list):
                value = value.pop(0) if len(value) > 1 else value[0]
            if isinstance(value, Exception):
                raise value
            return value

        fake: Any = ModuleType("pynvml")
        fake.NVMLError = NvmlError
        fake.running = 0

        def init() -> None:
            answer("init")
            fake.running += 1

        def shutdown() -> None:
            fake.running -= 1

        def handle(uuid: str) -> str:
            assert uuid == "GPU-1234"
            return answer("handle") and "the second"

        def asked(name: str, given: str) -> Any:
            assert given == "the second"
            assert fake.running == 1
            return answer(name)

        answers = {
            "init": 1, "handle": 1, "use": 50, "watts": 300.5, "gib": 10.0, **answers
        }  # fmt: skip
        fake.nvmlInit, fake.nvmlShutdown = init, shutdown
        fake.nvmlDeviceGetHandleByUUID = handle
        fake.nvmlDeviceGetUtilizationRates = lambda h: SimpleNamespace(gpu=asked("use", h))
        fake.nvmlDeviceGetPowerUsage = lambda h: asked("watts", h) * 1000
        fake.nvmlDeviceGetMemoryInfo = lambda h: SimpleNamespace(used=int(asked("gib", h) * 2**30))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    def properties(device: torch.device) -> Any:
        assert device == torch.device("cuda:1")
        return SimpleNamespace(uuid="1234")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("fastpie.mining.telemetry._PERIOD", 0.005)
    Event.now, Event.happened, Event.made = 0.0, set(), []
    return make


def looked(telemetry: Telemetry, times: int) -> None:
    until = time.monotonic() + 10
    while telemetry._gpu._looks < times:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_what_the_gpu_does(gpu: Callable[..., Any], tmp_path: Path) -> None:
    nvml = gpu(use=[10, 30, 80], gib=[1, 7, 4])
    telemetry = Telemetry(tmp_path, "csv", device="cuda:1")
    looked(telemetry, 8)
    telemetry.part(3)
    telemetry.part(3)
    summary = telemetry.summary()
    telemetry.close()
    assert nvml.running == 0
    assert not [t for t in threading.enumerate() if t.name == "fastpie-gpu"]
    assert summary["gpu"]["gpu_power_w"] == pytest.approx(300.5)
    assert summary["gpu"]["gpu_memory_gib"] == 7
    assert 40 < summary["gpu"]["gpu_utilisation"] < 80
    first, second = rows_of(tmp_path / "log" / "rank-0.csv")
    assert 40 < float(first["gpu_utilisation"]) < 80
    assert float(second["gpu_utilisation"]) == 80
    assert float(first["gpu_power_w"]) == pytest.approx(300.5)
    assert 1 < float(first["gpu_memory_gib"]) < 7


@pytest.mark.parametrize("wrong", ["init", "handle", "missing", "bug"])
def test_nvml_that_is_of_no_use(
    wrong: str, gpu: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(**({wrong: NvmlError("driver not loaded")} if wrong in ("init", "handle") else {}))
    if wrong == "missing":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if wrong == "bug":
        monkeypatch.delattr(sys.modules["pynvml"], "nvmlDeviceGetPowerUsage")
    telemetry = Telemetry(tmp_path, "csv", device="cuda:1")
    telemetry._gpu._thread.join(10)
    telemetry.part(3)
    assert telemetry.summary()["gpu"]["gpu_power_w"] is None
    telemetry.close()
    (row,) = rows_of(tmp_path / "log" / "rank-0.csv")
    assert row["gpu_power_w"] == ""
    assert row["samples"] == "3"


def test_what_nvml_does_not_tell_of_this_gpu(gpu: Callable[..., Any], tmp_path: Path) -> None:
    gpu(watts=NvmlError("not supported"), use=[20, NvmlError("lost")])
    telemetry = Telemetry(tmp_path, "csv", device="cuda:1")
    looked(telemetry, 5)
    telemetry.part(3)
    telemetry.part(3)
    summary = telemetry.summary()["gpu"]
    telemetry.close()
    assert summary == {"gpu_utilisation": 20, "gpu_power_w": None, "gpu_memory_gib": 10}
    first, second = rows_of(tmp_path / "log" / "rank-0.csv")
    assert (first["gpu_utilisation"], second["gpu_utilisation"]) == ("20", "")
    assert first["gpu_power_w"] == second["gpu_power_w"] == ""


def test_the_forward_pass_of_a_gpu_is_the_gpus_time(
    gpu: Callable[..., Any], tmp_path: Path
) -> None:
    gpu()
    telemetry = Telemetry(tmp_path, "csv", device="cuda:1")
    for milliseconds in (200, 500):
        with telemetry.stage("forward"):
            Event.now += milliseconds
    copied = Event(enable_timing=True), Event(enable_timing=True)
    copied[0].record()
    Event.now += 40
    copied[1].record()
    telemetry.events("copy", *copied)
    telemetry.part(1)  # nothing has happened yet, and nobody waits
    Event.happened |= {0, 1}
    telemetry.part(1)
    Event.happened |= {2, 3, 4, 5}
    telemetry.part(1)
    assert telemetry.summary()["stages"]["forward"] == pytest.approx(0.7)
    telemetry.close()
    rows = rows_of(tmp_path / "log" / "rank-0.csv")
    assert [float(row["forward"]) for row in rows] == pytest.approx([0, 0.2, 0.5])
    assert [float(row["copy"]) for row in rows] == pytest.approx([0, 0, 0.04])
