"""The command line: stdout, stderr and exit codes are the contract."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastpie
from fastpie.demo import small_resnet

MODEL = "fastpie.demo:small_resnet"


@pytest.fixture
def fastpie_cli(monkeypatch, capfd):
    """Calls the entry point in this process (a new one imports torch for seconds)."""

    def call(*arguments, cwd=None):
        from fastpie import cli

        monkeypatch.setattr(sys, "argv", ["fastpie", *map(str, arguments)])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=stop.value.code or 0, stdout=out, stderr=err)

    return call


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A checkpoint, twenty images, one of them empty, and a manifest."""
    root = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    save_file(small_resnet().state_dict(), root / "w.safetensors")
    torch.save(small_resnet().state_dict(), root / "w.pt")
    generator = np.random.default_rng(0)
    lines = ["path,label"]
    for i in range(20):
        Image.fromarray(generator.integers(0, 256, (9, 9), dtype=np.uint8)).save(root / f"{i}.png")
        lines.append(f"{i}.png,{i % 10}")
    (root / "3.png").write_bytes(b"")
    (root / "data.csv").write_text("\n".join(lines) + "\n")
    return root


def mine_arguments(project, out):
    return [
        "mine", "--model", MODEL, "--weights", project / "w.safetensors", "--data",
        project / "data.csv", "--labels", "label", "--size", "8", "--channels", "1", "--out", out,
    ]  # fmt: skip


def test_a_pattern_says_its_own_sparsity(fastpie_cli, tmp_path):
    call = ["prune", "--model", MODEL, "--out", tmp_path / "m.st", "--method", "2:4", "--json"]
    done = fastpie_cli(*call)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsities"] == [0.5]
    assert not fastpie.Masks.load(tmp_path / "m.st").is_ladder
    assert fastpie_cli(*call, "--sparsity", "0.5").returncode == 0
    assert "0.5 of the pattern" in fastpie_cli(*call, "--sparsity", "0.3").stderr


def test_mine_writes_a_run_and_prints_data_to_stdout(fastpie_cli, project, tmp_path):
    done = fastpie_cli(*mine_arguments(project, tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["samples"], result["errors"]) == (19, 1)
    assert "balanced accuracy on 19 samples" in done.stderr
    assert "near chance" in done.stderr
    run = fastpie.MiningResult(tmp_path / "run")
    assert run.table.num_rows == 19
    assert run.errors.to_pylist()[0]["path"].endswith("3.png")
    assert (tmp_path / "run" / "report.html").read_text().count("<img") >= 1
    assert result["hardest"] == run.select(0.05)


def test_mine_takes_masks_and_report_opens_the_run_again(fastpie_cli, project, tmp_path):
    masks = tmp_path / "m.safetensors"
    done = fastpie_cli(
        "prune", "--model", MODEL, "--weights", project / "w.pt", "--out", masks,
        "--sparsity", "0.5", "--scope", "layer", "--exclude", "0", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsities"] == [0.5]
    assert "0.weight" not in fastpie.Masks.load(masks)
    out = tmp_path / "run"
    done = fastpie_cli(*mine_arguments(project, out), "--masks", masks, "--no-report")
    assert done.returncode == 0, done.stderr
    assert not (out / "report.html").exists()
    assert "js" in pq.read_table(next((out / "scores").glob("*.parquet"))).column_names
    done = fastpie_cli("report", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 19


def test_a_user_s_own_module_in_the_working_folder_is_found(fastpie_cli, project, tmp_path):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\ndef build(classes):\n    return nn.Linear(3, classes)\n"
    )
    done = fastpie_cli(
        "prune", "--model", "mynet:build", "--model-args", '{"classes": 4}', "--out", "m.st", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"] == 12


def test_doctor_says_what_is_usable(fastpie_cli, project):
    done = fastpie_cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["kernels"]}
    assert rows["cpu"]["usable"]
    assert found["cpu"]["in_use"] in found["cpu"]["instruction_sets"]
    for name in ("cuda", "triton", "cudnn graph"):
        assert rows[name]["usable"] is (rows[name]["reason"] is None)
    text = fastpie_cli("doctor").stdout
    assert "Kernels" in text
    extra = "fastpie[cudnn]"
    assert (extra in text) is (extra in (rows["cudnn graph"]["reason"] or ""))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mine"], 2, "Missing option"),
        (["nonsense"], 2, "No such command"),
        (["prune", "--model", "nocolon", "--out", "x"], 2, "package.module:factory"),
        (["prune", "--model", MODEL, "--model-args", "[1", "--out", "x"], 2, "JSON object"),
        (["prune", "--model", MODEL, "--sparsity", "a", "--out", "x"], 2, "numbers"),
        (["prune", "--model", MODEL, "--sparsity", "1.5", "--out", "x"], 1, "[0, 1)"),
        (["prune", "--model", "no.such:thing", "--out", "x"], 1, "no"),
        (["prune", "--model", "json:loads", "--out", "x"], 1, "network"),
        (
            ["prune", "--model", MODEL, "--weights", "none.safetensors", "--out", "x"],
            1,
            "no such file",
        ),
        (["report", "no-run"], 1, "run.json"),
        (["prune", "--model", "fastpie:prune", "--out", "x"], 1, "build a network"),
    ],
)
def test_failures_say_why_and_exit_with_their_code(fastpie_cli, arguments, code, message, tmp_path):
    done = fastpie_cli(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_pickle_is_refused_without_the_flag(fastpie_cli, project, tmp_path):
    torch.save({"state_dict": small_resnet()}, tmp_path / "evil.pt")
    arguments = [
        "prune",
        "--model",
        MODEL,
        "--weights",
        tmp_path / "evil.pt",
        "--out",
        tmp_path / "m",
    ]
    done = fastpie_cli(*arguments)
    assert done.returncode == 1
    assert "--unpickle" in done.stderr


def test_a_run_of_another_configuration_is_refused(fastpie_cli, project, tmp_path):
    assert fastpie_cli(*mine_arguments(project, tmp_path / "run")).returncode == 0
    done = fastpie_cli(*mine_arguments(project, tmp_path / "run"), "--batch-size", "8")
    assert done.returncode == 1
    assert "batch_size: 64 in the folder, 8 now" in " ".join(done.stderr.split())


def test_the_installed_command_and_the_module_are_the_same_program():
    for command in (["-m", "fastpie"], ["-c", "import fastpie.cli; fastpie.cli.main()"]):
        done = subprocess.run(
            [sys.executable, *command, "report", "no-run"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert "Expected a run folder" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--channels", "3"], 1, "take images of shape [3, 8, 8]"),
        (["--device", "nonsense"], 1, "--device"),
        (["--size", "8,9,10,11"], 2, "--size"),
        (["--size", "nan"], 2, "--size"),
        (["--labels", "label,path"], 1, "multilabel"),
    ],
)
def test_wrong_data_options_say_so(fastpie_cli, project, tmp_path, options, code, message):
    done = fastpie_cli(*mine_arguments(project, tmp_path / "run"), *options)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_other_preprocessing_or_labels_are_another_configuration(fastpie_cli, project, tmp_path):
    assert fastpie_cli(*mine_arguments(project, tmp_path / "run")).returncode == 0
    done = fastpie_cli(*mine_arguments(project, tmp_path / "run"), "--mean", "0.5")
    assert done.returncode == 1
    assert "samples:" in done.stderr


def test_report_of_a_run_with_a_note_of_the_user_s(fastpie_cli, tmp_path):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(9, 4), torch.arange(9) % 3)
    for number, note in enumerate(({"data": "ours"}, {"fastpie.cli": "ours"})):
        run = tmp_path / str(number)
        fastpie.mine(
            torch.nn.Linear(4, 3), data, run, sample_ids=range(9), note=note, progress=False
        )
        assert fastpie_cli("report", run).returncode == 0
