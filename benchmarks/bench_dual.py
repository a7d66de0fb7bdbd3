"""Whole networks: the dual forward against two passes of everybody else.

Each provider is a process of its own (`worker.py`, `peers.py`). They take turns, pass by pass; the
others are stopped (SIGSTOP) meanwhile, so that no spinning thread of theirs takes a core. A turn
begins with a pass that is not timed: the others have left the caches to it cold. A turn of a
provider whose pass is short holds several passes. Before anything is timed, each provider's outputs
are held against PyTorch's in fp32.

Rows of `benchmarks/results/dual-forward-<machine>.json` with a `ratio` are comparisons; rows without
one describe a provider: setting, seconds to compile with empty and with filled caches, peak memory
(while it was opened, and while it ran), and for the engine `report`.

The goals, one command each (run alone on the machine; `make peers` first, --help for the rest):

    python -m benchmarks.bench_dual --networks resnet50 --batches 1 8 16 32
    python -m benchmarks.bench_dual --networks resnet50 --batches 1 8 16 32 --precision bf16
    python -m benchmarks.bench_dual --networks densenet121 --batches 1 8 16 32
    python -m benchmarks.bench_dual --networks resnet50 --ladder --peers fastpie compile eager
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastpie
from benchmarks import harness, networks, peers

ROOT = Path(__file__).parent.parent
WHAT = "dual-forward"
LADDER = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
PEERS = (
    "fastpie", "compile", "eager", "eager-contiguous", "onnxruntime", "openvino", "deepsparse",
    "compile-autotune",
)  # fmt: skip
READ_ONNX = ("onnxruntime", "openvino", "deepsparse")
COMPILE = ("fastpie", "compile", "compile-autotune")  # have caches on disk
PACKAGES = ("monai", "numpy")  # a peer's own version is in its setting

# Largest deviation from PyTorch in fp32, relative to the largest output: a provider beyond it
# computes something else. PyTorch's own bf16 is off by .05 at most on these networks.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}

# A turn lasts at least this long.
TURN = 0.05


class ProviderError(RuntimeError):
    """A worker could not do what it was asked."""


class Worker:
    """A provider in a process of its own, stopped whenever nothing is asked of it."""

    def __init__(self, name: str, log: Path, caches: Path) -> None:
        module = ["benchmarks.peers", "serve", name]
        if name == "deepsparse":
            module = ["benchmarks.deepsparse_server"]
        self.name = name
        self.log = log
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                [_python(name), "-m", *module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env={**os.environ, **peers.environment(name, caches)},
                start_new_session=True,  # helpers that it starts are stopped and ended with it
            )

    def close(self) -> None:
        """End it and whatever it started."""
        self._signal(signal.SIGKILL)
        self.process.communicate()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Wake the worker, ask, and stop it again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise ProviderError(f"{self.name} ended (exit {self.process.wait()}): ...{tail}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ProviderError(f"{self.name}: {answer['error']}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Mode:
    """One thing that a worker can be timed at, with the length of its turns."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name = worker, name
        worker.ask("run", mode=name, passes=1, settle=False)
        seconds = worker.ask("run", mode=name, passes=1, settle=False)["seconds"]
        self.passes = max(1, math.ceil(TURN / max(seconds, 1e-6)))

    def __call__(self) -> float:
        """One turn: seconds of one pass."""
        answer = self.worker.ask("run", mode=self.name, passes=self.passes, settle=True)
        return float(answer["seconds"])


def pairs(modes: Sequence[str]) -> list[tuple[str, str]]:
    """Which provider is put against which baseline, of those that were measured."""
    found = []
    for mode in modes:
        if mode.endswith((" passes", " passes, not scored")) or (
            mode.startswith(("one torch.compile", "one eager")) and mode.endswith(" pass")
        ):
            found.append(("fastpie-dual", mode))
        if mode.endswith(" pruned pass") or mode == "one torch.compile pass":
            found.append(("fastpie-pruned", mode))
        if mode == "fastpie-dual":
            found.append(("fastpie-scoring", mode))
    return [(provider, mode) for provider, mode in found if provider in modes]


def measure(case: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every provider on one case; rows for the results file."""
    with tempfile.TemporaryDirectory(prefix="fastpie-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        chosen = [peer for peer in options.peers if _applies(peer, case)]
        expected = _prepare(case, folder, onnx=any(peer in READ_ONNX for peer in chosen))
        spec = {
            "folder": str(folder),
            "precision": case["precision"],
            "task": networks.task_of(case["network"]),
            "threads": torch.get_num_threads(),
            "backend": options.backend,
        }
        rows: list[dict[str, Any]] = []
        modes: dict[str, Mode] = {}
        workers: dict[str, Worker] = {}
        for peer in chosen:
            try:
                described, worker, offered = _open(peer, spec, folder, expected, stack, options)
                modes.update({mode: Mode(worker, mode) for mode in offered})
            except (ProviderError, OSError) as error:
                _say(f"{peer} is left out: {error}")
                continue
            workers[peer] = worker
            rows.append({**case, **described})
        if not modes:
            return []
        _say(f"  measuring {', '.join(modes)}")
        timings = harness.interleave(
            modes, repeats=options.repeats, seconds=options.seconds, timed=lambda mode: mode()
        )
        for row in rows:
            worker = workers[row["provider"]]
            row["memory_mib"]["running"] = worker.ask("memory")["running"]
            if row["provider"] == "fastpie":
                row["report"] = worker.ask("report")["report"]
    rows += [harness.row(case, timings, ours, other) for ours, other in pairs(list(modes))]
    if "fastpie-dual" not in modes:  # peers among themselves: their times, against the first
        first, *others = modes
        rows += [harness.row(case, timings, other, first) for other in others]
    return rows


def _open(
    peer: str,
    spec: dict[str, Any],
    folder: Path,
    expected: dict[str, np.ndarray],
    stack: ExitStack,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], Worker, list[str]]:
    """A worker with its models compiled and its outputs checked; cold first where that differs."""
    caches, log = folder / f"{peer}-caches", folder / f"{peer}.log"
    outputs = folder / f"{peer}.npz"
    seconds: dict[str, float | None] = {"cold": None, "cached": None}
    memory: dict[str, float | None] = {}
    if peer in COMPILE and options.cold:
        _say(f"  compiling {peer}, empty caches")
        with closing(Worker(peer, log, caches)) as worker:
            seconds["cold"] = worker.ask("open", **spec, outputs=str(outputs))["compile_seconds"]
            memory["opening_cold"] = worker.ask("memory")["opening"]
        _say(f"    {seconds['cold']:.1f} s")
    _say(f"  opening {peer}")
    worker = stack.enter_context(closing(Worker(peer, log, caches)))
    answer = worker.ask("open", **spec, outputs=str(outputs))
    seconds["cached" if seconds["cold"] is not None else "cold"] = answer["compile_seconds"]
    memory["opening"] = worker.ask("memory")["opening"]
    with np.load(outputs) as got:
        for name, want in expected.items():
            error = float(np.abs(got[name] - want).max() / np.abs(want).max())
            if not error <= TOLERANCE[spec["precision"]]:
                raise ProviderError(f"its {name} outputs differ from PyTorch's by {error:.3g}")
    described = {
        "provider": peer,
        "setting": answer["setting"],
        "compile_seconds": seconds,
        "memory_mib": memory,
    }
    return described, worker, answer["modes"]


def _prepare(case: dict[str, Any], folder: Path, *, onnx: bool) -> dict[str, np.ndarray]:
    """Leave models and input in the folder; return what the outputs must be."""
    model, _ = networks.build(case["network"])
    masks = networks.masks_for(model, case["sparsity"], case["scope"], case["kind"])
    dual = fastpie.DualModel(model, masks)
    generator = torch.Generator().manual_seed(1)
    # Statistics of its own, as `mine` gives it: under the dense ones a deep pruned network fades.
    dual.recalibrate([torch.randn(8, *case["size"], generator=generator)])
    x = torch.randn(case["batch"], *case["size"], generator=generator)
    torch.save(dual, folder / "dual.pt")
    np.save(folder / "x.npy", x.numpy())
    if onnx:
        command = [_python("onnxruntime"), "-m", "benchmarks.peers", "export", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            _say(f"no ONNX export, so none of {READ_ONNX}: {done.stderr[-2000:]}")
    with torch.no_grad():
        out = dual.eval()(x)
    return {"dense": out.dense.numpy(), "pruned": out.pruned.numpy()}


def _applies(peer: str, case: dict[str, Any]) -> bool:
    if isinstance(case["sparsity"], list) and peer in READ_ONNX:
        _say(f"{peer} is left out: exported for one level only")
        return False
    if case["precision"] == "bf16" and peer in ("onnxruntime", "deepsparse"):
        _say(f"{peer} is left out: no bf16 on CPUs")
        return False
    return True


def _python(peer: str) -> str:
    """The Python of a peer: those of `make peers` where they are, else this one."""
    root = Path(os.environ.get("FASTPIE_PEERS") or "/tmp/fastpie-peers")
    environment = {"deepsparse": "deepsparse", "onnxruntime": "onnx", "openvino": "onnx"}.get(peer)
    python = root / environment / "bin" / "python" if environment else None
    return str(python) if python is not None and python.exists() else sys.executable


def identity(row: dict[str, Any]) -> list[Any]:
    """What tells rows of the results file apart."""
    keys = ("network", "batch", "size", "precision", "sparsity", "scope", "kind")
    return [row[key] for key in keys] + [row["provider"], row.get("baseline")]


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Network by network, every combination that was asked for."""
    sparsities: list[Any] = [LADDER] if options.ladder else options.sparsities
    for network, precision, scope, sparsity, batch in itertools.product(
        options.networks, options.precision, options.scope, sparsities, options.batches
    ):
        size = list(networks.NETWORKS[network].size)
        if options.size is not None:
            size[1:] = [options.size] * (len(size) - 1)
        yield {
            "network": network,
            "batch": batch,
            "size": size,
            "precision": precision,
            "sparsity": sparsity,
            "scope": scope,
            "kind": options.kind,
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--networks", nargs="+", default=["resnet50"], choices=list(networks.NETWORKS))
    add("--batches", nargs="+", type=int, default=[16])
    add("--sparsities", nargs="+", type=float, default=[0.9])
    add("--ladder", action="store_true", help="the ladder of ten levels, .5 to .95, instead")
    add("--scope", nargs="+", default=["layer"], choices=["layer", "global"])
    add("--kind", default="magnitude", choices=["magnitude", "random", "trained-like"])
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    add(
        "--peers",
        nargs="+",
        default=PEERS[:-1],
        choices=PEERS,
        help="providers; default: %(default)s",
    )
    add("--backend", default="auto", help="of the engine")
    add("--repeats", type=int, default=15, help="rounds at most")
    add("--seconds", type=float, default=120.0, help="begin no round after this long, once five")
    add("--no-cold", dest="cold", action="store_false", help="compile once, not with empty caches")
    add("--size", type=int, help="side of the images, to try things out")
    add("--out", type=Path, help="folder of the results file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure case by case; each is in the results file when it is done."""
    options = parse(arguments)
    for case in cases(options):
        _say(", ".join(f"{key} {value}" for key, value in case.items()))
        rows = measure(case, options)
        path = harness.merge_results(WHAT, rows, identity, packages=PACKAGES, folder=options.out)
        for row in rows:
            if "ratio" in row:
                print(
                    f"  {row['provider']} {row['seconds']['p50'] * 1e3:.2f} ms: {row['ratio']}x "
                    f"{row['baseline']} ({row['baseline_seconds']['p50'] * 1e3:.2f} ms)",
                    flush=True,
                )
        _say(f"{path}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
