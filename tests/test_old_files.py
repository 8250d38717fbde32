"""Files that version 0.1.0 wrote (tests/data/v0.1.0/make.py made them) are opened, or refused with a way out."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import patchscore as ps
from patchscore.calibrate import Calibration
from patchscore.cli import main
from patchscore.networks import load_network

OLD = Path(__file__).parent / "data" / "v0.1.0"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the files, in the working folder."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


SAMPLE = ("sample", "bank.npz", "--table", "table.json", "--steps", 4, "--batch-size", 2, "-n", 3, "--labels", "all")


def test_an_index_is_refused_with_the_command_that_builds_it_again(old):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    bank = ps.PatchBank.open("bank.npz")
    message = r"index: index format 2, this version reads 4; .* patchscore index SOURCE --patch-sizes 3,5 --out index-4"
    with pytest.raises(ValueError, match=message):
        ps.PatchIndex.open("index", bank)
    words = ("index", "bank.npz", "--cells", 16, "--rank", 4, "--patch-sizes", "3,5", "--out")
    refused = run(*words, "index")
    assert refused.exit_code == 2
    assert "index format 2" in refused.stderr
    assert run(*words, "index-4").exit_code == 0
    assert ps.PatchIndex.open("index-4", bank).patch_sizes == [3, 5]


def test_a_table_a_network_and_a_calibration_are_read(old):
    table = ps.ScaleTable.load("table.json")
    assert (table.name, list(table.sigmas), list(table.sizes)) == ("small", [0.3, 3.0], [3, 5])
    network, notes = load_network("network.safetensors")
    assert notes == {"made": "for a test"}
    assert network.config["classes"] == [0, 1]
    found = Calibration.load("calibrated/calibration.json")
    assert found.patch_sizes == (3, 5)
    before = found.agreement.tolist()
    words = ("bank.npz", "network.safetensors", "--steps", 4, "-n", 3, "--labels", "none", "--patch-sizes", "3,5")
    assert run("calibrate", *words, "--out", "calibrated").exit_code == 0
    after = Calibration.load("calibrated/calibration.json").agreement
    assert after[:, :2].tolist() == before
    assert after.shape[1] == 3


def test_a_run_is_explained_where_it_lies(old):
    before = json.loads((old / "run" / "run.json").read_text())
    result = run("explain", "run", "--image", "all", "--levels", 2)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output  # the images come out as they are in samples.npz
    after = json.loads((old / "run" / "run.json").read_text())
    assert [entry["image"] for entry in after["memorisation"]["samples"]] == [0, 1, 2]
    assert {name: after[name] for name in before if name != "memorisation"} == {
        name: before[name] for name in before if name != "memorisation"
    }
    assert run("explain", "run", "--image", 1, "--levels", 1).exit_code == 0


def test_a_run_with_an_index_is_explained_once_the_index_is_built_again(old):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    refused = run("explain", "run-with-index", "--levels", 1)
    assert refused.exit_code == 2
    assert "index format 2" in refused.stderr
    words = ("bank.npz", "--cells", 16, "--rank", 4, "--patch-sizes", "3,5", "--out", "index-4")
    assert run("index", *words).exit_code == 0
    result = run("explain", "run-with-index", "--levels", 1, "--index", "index-4")
    assert result.exit_code == 0, result.output
    assert "is not there" not in result.output


def test_a_run_is_not_continued_but_replaced_on_demand(old):
    before = {p: p.read_bytes() for p in (old / "run").iterdir()}
    result = run(*SAMPLE, "--out", "run")
    assert result.exit_code == 2
    assert "holds a run of patchscore 0.1.0" in result.stderr
    assert "choose another --out, or --overwrite" in result.stderr
    assert {p: p.read_bytes() for p in before} == before

    (old / "run" / "notes.txt").write_text("mine")
    (old / "run" / "0017.png").write_bytes(before[old / "run" / "0000.png"])  # of a batch that was cut
    assert run(*SAMPLE, "--out", "run", "--overwrite").exit_code == 0
    assert {p.name for p in (old / "run").iterdir()} == {
        *(".lock", "notes.txt", "run.json", "batches.jsonl", "samples", "samples.npy"),
        *("grid.png", "trajectory.npz", "trajectory.png"),
    }
    assert len(list((old / "run" / "samples").iterdir())) == 3
