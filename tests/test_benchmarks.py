"""The results say what they are of, and what is written of them comes from them alone."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchscore import cli

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import bench
import paper
import report
import scaling

RESULTS = sorted((report.results.ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_names_machine_versions_commit_and_date(path):
    record = json.loads(path.read_text())
    for name in ("what", "machine", "commit", "date"):
        assert isinstance(record[name], str), name
        assert record[name]
    assert {"patchscore", "torch", "python"} <= set(record["versions"])
    assert path.stem in report.COMMANDS or path.stem.startswith("gpu-")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of its own, beside results that are not there yet."""
    monkeypatch.setattr(report.results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report.results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    path = tmp_path / "page.md"
    path.write_text("Samples\n\n<!-- end_to_end -->\n<!-- /end_to_end -->\n\n<!-- gpu -->\n<!-- /gpu -->\n")
    monkeypatch.setattr(report, "PAGES", (path,))
    return path


def write_result(page, seconds):
    common = {"setting": "cifar10-20000", "images": 16, "extrapolated": False, "r2_median": 1.0, "r2_least": 1.0}
    rows = [
        {**common, "method": "sliding, exact", "seconds": 400.0},
        {**common, "method": "pruned", "seconds": seconds},
    ]
    about = {"machine": "a machine", "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-01"}
    (page.parent / "results" / "end_to_end.json").write_text(json.dumps({**about, "steps": 20, "rows": rows}))


def test_what_has_no_result_is_marked_as_not_measured(page, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    made = page.read_text()
    assert made.count("*Not measured*") == 2
    assert "python benchmarks/gpu.py" in made
    write_result(page, 80.0)
    report.main()
    made = page.read_text()
    assert "| pruned | 80 s (0.2) | 1.0000 (1.0000) | not measured |  |" in made
    assert made.count("*Not measured*") == 1


def test_the_check_fails_where_text_and_results_differ(page, monkeypatch):
    write_result(page, 80.0)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()
    before = page.read_text()
    page.write_text(before.replace("| 80 s ", "| 70 s "))
    with pytest.raises(SystemExit, match=r"page\.md"):
        report.main()
    page.write_text(before)
    write_result(page, 81.0)
    with pytest.raises(SystemExit, match=r"page\.md"):
        report.main()
    assert page.read_text() == before


def test_exponents_are_those_of_the_powers_they_are_fitted_to():
    rows = [
        {
            "series": "side",
            "engine": "sliding",
            "x": x,
            "seconds_median": 3e-4 * x**2.5,
            "memory_mib": 0.0,
            "pairs": x**4,
        }
        for x in (16, 32, 128)
    ]
    (fit,) = scaling.fits(rows)
    assert fit["seconds"] == pytest.approx(2.5)
    assert fit["pairs"] == pytest.approx(4)
    assert "memory" not in fit
    assert scaling.fits(rows[:2]) == []


def test_the_resource_that_binds_takes_the_time():
    rows = paper.larger_banks()
    assert {row["windows"] for row in rows} == {1e9, 1e10}
    for row in rows:
        assert row["seconds"] == max(row["costs"].values()) == row["costs"][row["binds"]]
        assert row["pairs"] == row["windows"] * (64 - row["k"] + 1) ** 2
    alone = {(r["windows"], r["k"], r["engine"]): r["seconds"] for r in rows if r["gpus"] == 1}
    for row in rows:
        if row["gpus"] == 8:
            assert row["seconds"] < alone[row["windows"], row["k"], row["engine"]] / 7


def test_derived_figures_say_so():
    for block in (report.gpu.on_paper, report.gpu.expected_steps):
        assert "not measured" in block()


# Running them.


def test_bench_runs_what_there_is_with_options_that_there_are():
    everything = argparse.Namespace(images="i", fashion_mnist="f", indexes="x")
    nothing = argparse.Namespace(images=None, fashion_mnist=None, indexes=None)
    commands = [command for command, _ in (*bench.full(everything), *bench.gpu(everything), *bench.full(nothing))]
    for script, *options in [*commands, *bench.SHORT]:
        source = (bench.HERE / script).read_text()
        for option in (option for option in options if option.startswith("--")):
            assert f'"{option}"' in source, (script, option)
    scripts = {script for script, *_ in commands}
    assert scripts == {command.split()[0] for command in report.COMMANDS.values()}
    lacking = {script for (script, *_), lacks in bench.full(nothing) if lacks}
    assert {"pruned_cpu.py", "end_to_end.py", "classification.py", "fused_precision.py"} <= lacking


def test_results_go_where_they_are_asked_and_a_failure_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.py").write_text("import os, pathlib; pathlib.Path(os.environ['PATCHSCORE_RESULTS'], 'x').touch()")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "SHORT", (("good.py",),))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path)])
    bench.main()
    assert (tmp_path / "x").exists()
    monkeypatch.setattr(bench, "SHORT", (("bad.py",), ("good.py",)))
    with pytest.raises(SystemExit, match=r"bad\.py"):
        bench.main()


def test_bench_from_a_wheel_says_in_one_line_where_to_get_it(tmp_path, monkeypatch):
    module = sys.modules["patchscore.cli.bench"]  # the attribute of that name is the command
    monkeypatch.setattr(module, "__file__", str(tmp_path / "patchscore" / "cli" / "bench.py"))
    done = CliRunner().invoke(cli.main, ["bench"])
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1
    assert "sdist" in done.output
