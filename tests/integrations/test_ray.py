"""Mining on a local Ray: the bits of one process, whoever does what, and whoever dies."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastpie
from fastpie.errors import FastpieError
from fastpie.integrations import ray as on_ray
from fastpie.integrations.ray import mine_on_ray

ray = pytest.importorskip("ray")
# Ray's own, of its own settings; what it says of our calls is an error as everywhere.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Four cores that Ray believes in, however many there are; nothing is sent home or left there."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(
        secrets.token_hex(32)
    )  # without one, Ray would make one for all of this user's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            num_cpus=4,
            num_gpus=0,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def _one_thread(_cluster: None) -> Iterator[None]:
    """As an actor of one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int = 0) -> fastpie.DualModel:
    """BatchNorm, two levels; made of torch's own classes, which every node can import."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 3),
        )
    return fastpie.DualModel(net.eval(), fastpie.prune(net, [0.3, 0.7]))


def samples(count: int = 26, deadly: int | None = None, marker: Path | None = None) -> Dataset[Any]:
    """Images, labels and ids; sample 5 cannot be read.

    `deadly` kills the process that reads it: once if there is a `marker`, a file that says that it
    has; else always.
    """

    class Samples(Dataset[Any]):  # local, or it would not travel: nodes cannot import test modules
        def __init__(self) -> None:
            self.sample_ids = [f"s{i:02d}" for i in range(count)]

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise OSError("gone")
            if index == deadly and not (marker and marker.exists()):
                if marker:
                    marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
            return image, index % 3, self.sample_ids[index]

    return Samples()


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """begun(dual): a run of seven parts, of which the first is scored; by `fastpie.mine`."""

    def make(dual: Any = None, **options: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("fastpie.mining.session._PART_SECONDS", 0.0)
            result = fastpie.mine(
                dual or model(), samples(), tmp_path / "begun", batch_size=4, limit=4, **options
            )
        assert result.record["batches_per_part"] == 1
        return result.path

    return make


def same(one: fastpie.MiningResult, two: fastpie.MiningResult) -> bool:
    return one.table.equals(two.table) and one.errors.equals(two.errors)


def tiny_parts(dual: fastpie.DualModel) -> Callable[[], fastpie.DualModel]:
    """A function that builds a model on a node and has its process cut parts of one batch."""

    def build() -> fastpie.DualModel:
        from fastpie.mining import session

        session._PART_SECONDS = 0.0
        return dual

    return build


# ---------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_any_number_of_actors_gives_the_bits_of_one_process(actors: int, tmp_path: Path) -> None:
    plain = fastpie.mine(model(), samples(), tmp_path / "plain", batch_size=4, keep_logits=True)
    data = DataLoader(samples(), 4) if actors == 1 else samples  # a function opens it on the node
    result = mine_on_ray(
        tiny_parts(model()),
        data,
        tmp_path / "ray",
        actors=actors,
        batch_size=4,
        keep_logits=True,
        note={"by": "ray"},
    )
    assert result.record["batches_per_part"] == 1
    assert result.record["note"] == {"by": "ray"}
    assert result.record["versions"] == plain.record["versions"]
    assert same(result, plain)
    assert result.errors["sample_id"].to_pylist() == ["s05"]
    assert len(result) == 25
    for mine, theirs in zip(result.logits(), plain.logits(), strict=True):
        assert (mine == theirs).all()
    assert (tmp_path / "ray" / "errors.parquet").exists()


def test_several_models_are_mined_in_groups(tmp_path: Path) -> None:
    duals = [model(0), model(1)]
    plain = fastpie.mine(duals, samples(), tmp_path / "plain", batch_size=4)
    result = mine_on_ray(
        duals, samples(), tmp_path / "ray", actors=1, batch_size=4, models_at_once=1
    )
    assert same(result, plain)
    assert len(result.members) == 2


# ---------------------------------------------------------------------- resuming


def test_a_run_of_one_process_goes_on_on_ray_and_back(
    begun: Callable[..., Path], tmp_path: Path
) -> None:
    folder = begun()
    first = (folder / "scores/part-000000.parquet").stat().st_mtime_ns
    some = mine_on_ray(
        model(), samples(), folder, actors=(1, 2), batch_size=4, num_workers=1, limit=8
    )
    assert len(some) + len(some.errors) == 12  # of whole parts
    result = fastpie.mine(model(), samples(), folder, batch_size=4)
    assert same(result, fastpie.mine(model(), samples(), tmp_path / "plain", batch_size=4))
    assert (folder / "scores/part-000000.parquet").stat().st_mtime_ns == first
    written = sorted(p.stat().st_mtime_ns for p in folder.glob("scores/*"))
    again = mine_on_ray(model(), samples(), folder, batch_size=4)  # nothing is left to do
    assert same(again, result)
    assert sorted(p.stat().st_mtime_ns for p in folder.glob("scores/*")) == written


def test_other_threads_than_the_run_began_with_are_told(begun: Callable[..., Path]) -> None:
    folder = begun()
    with pytest.warns(UserWarning, match="other versions.*threads.*2"):
        result = mine_on_ray(
            model(), samples(), folder, actors=1, num_cpus=2, batch_size=4, limit=4
        )
    assert len(result) == 7


# ---------------------------------------------------------------------- what goes wrong


def test_an_actor_that_is_killed_loses_no_row(begun: Callable[..., Path], tmp_path: Path) -> None:
    folder, marker = begun(), tmp_path / "killed"
    data = samples(deadly=14, marker=marker)
    result = mine_on_ray(model(), data, folder, actors=1, batch_size=4)
    assert marker.exists()
    assert same(result, fastpie.mine(model(), samples(), tmp_path / "plain", batch_size=4))
    ids = result.table["sample_id"].to_pylist() + result.errors["sample_id"].to_pylist()
    assert sorted(ids) == [f"s{i:02d}" for i in range(26)]


def test_a_sample_that_kills_every_actor_ends_the_run(
    begun: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_ATTEMPTS", 1)
    folder = begun()
    with pytest.raises(FastpieError, match=r"1 in a row died over part 5.*num_workers=1"):
        mine_on_ray(model(), samples(deadly=22), folder, actors=1, batch_size=4)
    result = fastpie.mine(model(), samples(), folder, batch_size=4)
    assert same(result, fastpie.mine(model(), samples(), tmp_path / "plain", batch_size=4))


def test_an_error_of_an_actor_is_the_cause(begun: Callable[..., Path]) -> None:
    folder = begun()
    (folder / "plan.json").write_text("{torn")
    with pytest.raises(FastpieError, match=r"plan of the run in .*plan\.json") as caught:
        mine_on_ray(model(), samples(), folder, actors=1, batch_size=4)
    assert "_stored_plan" in str(caught.value.__cause__)  # the traceback of the actor
    with pytest.raises(
        FastpieError, match=r"configuration of the run.*batch_size: 4 in the folder"
    ):
        mine_on_ray(model(), samples(), folder, batch_size=8)

    def no_data() -> Any:
        raise RuntimeError("the share is not mounted")

    with pytest.raises(FastpieError, match="raised RuntimeError: the share is not mounted"):
        mine_on_ray(model(), no_data, folder, batch_size=4)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FastpieError, match="`actors` to be n or"):
        mine_on_ray(model(), samples(), tmp_path, actors=0)
    with pytest.raises(FastpieError, match="`task` to be one of"):
        mine_on_ray(model(), samples(), tmp_path, task="detection")
    with pytest.raises(FastpieError, match="at least one model"):
        mine_on_ray([], samples(), tmp_path)
    data: Any = samples()
    data.handle = (_ for _ in ())
    with pytest.raises(FastpieError, match="can be pickled, or functions that build and open"):
        mine_on_ray(model(), data, tmp_path)
    # Every process has a memory of its own.
    with pytest.raises(FastpieError, match="all processes must see the same folder"):
        mine_on_ray(model(), samples(), "memory://on-ray", actors=1, batch_size=4)


def test_the_folder_is_locked_while_the_driver_works(tmp_path: Path) -> None:
    from fastpie.mining.lock import RunLock

    lock = RunLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(FastpieError, match="another run is writing to it"):
            mine_on_ray(model(), samples(), tmp_path, batch_size=4)
    finally:
        lock.release()


def test_ctrl_c_stops_and_can_be_resumed(begun: Callable[..., Path], tmp_path: Path) -> None:
    folder = begun(recalibrate=False)
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import time, torch, ray, fastpie, importlib.util
        spec = importlib.util.spec_from_file_location("cases", {__file__!r})
        cases = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cases)
        def slow():
            data = cases.samples()
            class Slow(type(data)):
                def __getitem__(self, index):
                    time.sleep(0.5)
                    return super().__getitem__(index)
            return Slow()
        data = slow()
        torch.set_num_threads(1)
        ray.init(address={ray.get_runtime_context().gcs_address!r})
        cases.mine_on_ray(
            cases.model(), data, {str(folder)!r}, actors=1, batch_size=4, recalibrate=False
        )
        """)
    )
    driver = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("scores/part-*"))) < 2 and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode not in (0, None), said
    assert "KeyboardInterrupt" in said
    done = len(list(folder.glob("scores/part-*.parquet")))
    assert 2 <= done < 7, said
    result = fastpie.mine(model(), samples(), folder, batch_size=4, recalibrate=False)
    plain = fastpie.mine(model(), samples(), tmp_path / "p", batch_size=4, recalibrate=False)
    assert same(result, plain)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(FastpieError, match=r"pip install 'fastpie\[ray\]'"):
        mine_on_ray(model(), samples(), tmp_path)
