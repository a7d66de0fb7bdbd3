"""From timings to committed results and the README's table; nothing here asserts a time."""

import json

import pytest

from benchmarks import bench_dual, goals, harness, report

CASE = {
    "network": "tiny", "batch": 2, "size": [3, 32, 32], "precision": "fp32", "sparsity": 0.9,
    "scope": "layer", "kind": "magnitude",
}  # fmt: skip


def timing(seconds):
    return {"p20": seconds, "p50": seconds, "p80": seconds, "repeats": 5}


TIMINGS = {
    "fastpie-dual": timing(2.0),
    "fastpie-pruned": timing(0.5),
    "two torch.compile passes": timing(3.0),
    "one torch.compile pass": timing(1.5),
    "one eager channels_last pass": timing(2.1),
    "one DeepSparse pruned pass": timing(1.0),
    "two DeepSparse passes, not scored": timing(2.2),
    "fastpie-scoring": timing(0.01),
}


def rows_of(case, timings=TIMINGS):
    pairs = bench_dual.pairs(list(timings))
    return [harness.row(case, timings, ours, other) for ours, other in pairs]


def test_who_is_put_against_whom():
    assert set(bench_dual.pairs(list(TIMINGS))) == {
        ("fastpie-dual", "two torch.compile passes"),
        ("fastpie-dual", "one torch.compile pass"),
        ("fastpie-dual", "one eager channels_last pass"),
        ("fastpie-dual", "two DeepSparse passes, not scored"),
        ("fastpie-pruned", "one DeepSparse pruned pass"),
        ("fastpie-pruned", "one torch.compile pass"),
        ("fastpie-scoring", "fastpie-dual"),
    }


def test_results_of_several_runs_are_merged_case_by_case(tmp_path, monkeypatch):
    def merge(rows, command):
        monkeypatch.setattr("sys.argv", ["bench_dual.py", command])
        path = harness.merge_results("dual-forward", rows, bench_dual.identity, folder=tmp_path)
        return json.loads(path.read_text())

    merge(rows_of(CASE), "first")
    other = {**CASE, "batch": 16}
    content = merge(rows_of(other), "second")
    assert len(content["rows"]) == 2 * len(rows_of(CASE))
    assert [run["command"].split()[-1] for run in content["runs"]] == ["first", "second"]
    faster = {**TIMINGS, "fastpie-dual": timing(1.0)}
    content = merge(rows_of(CASE, faster), "third")
    assert len(content["rows"]) == 2 * len(rows_of(CASE))
    assert [run["command"].split()[-1] for run in content["runs"]] == ["second", "third"]
    for row in content["rows"]:
        command = content["runs"][row["run"]]["command"].split()[-1]
        assert command == ("second" if row["batch"] == 16 else "third")
    assert content["command"].endswith("third")
    assert not list(tmp_path.glob("*.tmp"))


def loaded(tmp_path, monkeypatch, rows):
    harness.merge_results("dual-forward", rows, bench_dual.identity, folder=tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return report.load()


def test_the_table_has_a_line_a_case_and_a_column_a_baseline(tmp_path, monkeypatch):
    ladder = {**CASE, "sparsity": [0.5, 0.7, 0.9], "kind": "random", "scope": "global"}
    of_ladder = {"fastpie-dual": timing(0.004), "4 torch.compile passes": timing(0.01)}
    provider = {**CASE, "provider": "fastpie", "report": []}
    rows = [*rows_of(CASE), provider, *rows_of(ladder, of_ladder)]
    loaded_rows = loaded(tmp_path, monkeypatch, rows)
    lines = report.dual_table(loaded_rows).splitlines()
    assert lines[0].split(" | ")[4:] == [
        "two torch.compile passes", "one eager pass", "two DeepSparse passes",
        "pruned alone: DeepSparse |",
    ]  # fmt: skip
    assert lines[2] == "| tiny, fp32 | 0.9 | 2 | 2 s | **1.50x** | 1.05x | 1.10x | 2.00x |"
    assert lines[3] == (
        "| tiny, fp32, random, global | 3 levels, 0.5 to 0.9 | 2 | 4 ms | **2.50x** |  |  |  |"
    )
    report.plot_dual(loaded_rows, tmp_path / "dual.svg")
    assert (
        "one eager channels_last pass" in (tmp_path / "dual.svg").read_text()
        or (tmp_path / "dual.svg").stat().st_size
    )


def test_the_plot_shows_the_case_nearest_to_the_goals(tmp_path, monkeypatch):
    rows = [
        row
        for batch, sparsity in ((8, 0.9), (16, 0.9), (32, 0.9), (16, 0.8))
        for row in rows_of({**CASE, "batch": batch, "sparsity": sparsity})
    ]
    cases = report.dual_cases(loaded(tmp_path, monkeypatch, rows))
    assert len(cases) == 4
    best = max((case[0] for case in cases), key=report._interest)
    assert (best["batch"], best["sparsity"]) == (16, 0.9)


def test_goals_stand_beside_what_was_measured(tmp_path, monkeypatch):
    case = {**CASE, "network": "resnet50", "batch": 16, "size": [3, 224, 224]}
    part = {"model": "dense", "layer": "fc/linear", "kernel": "torch", "images": 0, "over": []}
    other = {**part, "model": "pruned", "images": 16, "seconds": 0.16 * 2048 * 1000 / 97e9}
    described = {"compile_seconds": {"cold": 9.0, "cached": 2.0}, "memory_mib": {"running": 100}}
    rows = [
        *rows_of(case),
        *rows_of({**case, "kind": "random"}, {"fastpie-dual": timing(1)}),
        {**case, "provider": "fastpie", "report": [{**part, "seconds": 1}, other], **described},
        {**case, "provider": "compile", **described},
    ]
    loaded_rows = loaded(tmp_path, monkeypatch, rows)
    lines = goals.goals_table(loaded_rows).splitlines()
    assert lines[2].endswith(
        "| 1.45x | 1.65x | 1.72x | not measured | not measured | 1.50x | not measured |"
    )
    assert lines[3].endswith("| not measured | not measured | 0.95 | not measured |")
    assert "9.0 s, 2.0 s from the cache" in lines[-1]
    layers = goals.layers_table(loaded_rows).splitlines()
    assert layers[0].startswith("Dense pass 1000 ms")
    # As many multiply-adds as a tenth of 16 images has, in a tenth of the time at the peak.
    assert layers[-1].split(" | ")[4] == "10.00"
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n")
    report.fill(document, {"x": "new \\1"})
    assert document.read_text() == "a\n<!-- x:begin -->\nnew \\1\n<!-- x:end -->\nb\n"
    with pytest.raises(ValueError, match=r"page\.md to have a block <!-- y:begin -->"):
        report.fill(document, {"y": ""})


@pytest.mark.timeout(300)
def test_the_harness_measures_workers_and_leaves_out_what_fails(tmp_path, capfd, monkeypatch):
    """Processes of their own, end to end, on a tiny network; DeepSparse is not there."""
    monkeypatch.setenv("FASTPIE_PEERS", str(tmp_path / "none"))
    bench_dual.main(
        [
            "--networks", "tiny", "--size", "9", "--batches", "2", "--repeats", "1", "--no-cold",
            "--peers", "fastpie", "eager", "deepsparse", "--out", str(tmp_path),
        ]
    )  # fmt: skip
    out, err = capfd.readouterr()
    (path,) = tmp_path.glob("dual-forward-*.json")
    rows = json.loads(path.read_text())["rows"]
    described = {row["provider"]: row for row in rows if "ratio" not in row}
    assert set(described) == {"fastpie", "eager"}
    assert described["fastpie"]["compile_seconds"]["cold"] > 0
    assert described["fastpie"]["memory_mib"]["running"] > 10
    assert described["fastpie"]["report"][0]["seconds"] > 0
    pairs = {(row["provider"], row["baseline"]) for row in rows if "ratio" in row}
    assert ("fastpie-dual", "two eager channels_last passes") in pairs
    assert ("fastpie-scoring", "fastpie-dual") in pairs
    assert "deepsparse is left out" in err
    assert "fastpie-dual" in out
