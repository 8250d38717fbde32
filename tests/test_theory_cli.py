"""patchscore calibrate and compare: what they write, and one line for everything that goes wrong."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore.cli import main
from patchscore.networks import ResNet, save_network


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A bank in a file, an untrained network in another, and a module with entry points, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    images = smooth_images(12, 1, 10, 10).numpy()
    np.savez("bank.npz", images=images, labels=np.arange(12) % 2)
    save_network(ResNet(1, (0, 1), 4, 1, "circular"), "net.safetensors", {})
    (tmp_path / "entrypoint_of_test.py").write_text(
        "import patchscore as ps\n"
        "def local(bank):\n    return ps.LocalScore(bank, ps.ScaleTable([0.5, 2.0], [3, 7]))\n"
        "def wrong(bank):\n    return 3\n"
    )
    return tmp_path


def run(command, *arguments):
    return CliRunner().invoke(main, [command, *map(str, arguments)], catch_exceptions=False)


def test_calibrate_then_compare_an_entry_point(data):
    words = ["bank.npz", "entrypoint_of_test:local", "--steps", 6, "-n", 2]
    done = run("calibrate", *words, "--patch-sizes", "3,5,7", "--out", "c")
    assert done.exit_code == 0, done.output
    table = ps.ScaleTable.load("c/table.json")
    assert set(table.sizes) <= {3, 5, 7}
    assert Image.open("c/calibration.png").width > 100
    again = run("calibrate", *words, "--patch-sizes", "3,5,7", "--out", "c", "--summary", "mode")
    assert again.exit_code == 0

    done = run("compare", *words, "--table", "c/table.json", "--out", "d")
    assert done.exit_code == 0, done.output
    report = json.loads((data / "d" / "comparison.json").read_text())
    assert [row["machine"] for row in report["rows"]] == ["els-zeros", "els-circular", "local", "ideal", "gaussian"]
    for picture in ("pairs.png", "scatter.png"):
        assert Image.open(data / "d" / picture).width > 100
    assert f"{report['rows'][0]['r2_median']:.3f}" in done.output


def test_a_checkpoint_brings_its_padding(data):
    done = run("compare", "bank.npz", "net.safetensors", "--steps", 4, "-n", 1, "--table", 3, "--no-baselines")
    assert done.exit_code == 0, done.output
    assert "els-circular" in done.output
    assert not (data / "compared" / "scatter.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate", "bank.npz", "nowhere"], "module:function"),
        (["calibrate", "bank.npz", "no_such_module:f"], "no_such_module"),
        (["calibrate", "bank.npz", "entrypoint_of_test:nothing"], "nothing"),
        (["compare", "bank.npz", "entrypoint_of_test:wrong"], "takes one that returns a denoiser"),
        (["compare", "bank.npz", "bank.npz"], "not a usable network"),
        (["compare", "absent.npz", "net.safetensors"], "absent.npz"),
        (["calibrate", "bank.npz", "net.safetensors", "--patch-sizes", "3,x"], "--patch-sizes"),
        (["calibrate", "bank.npz", "net.safetensors", "--patch-sizes", "4"], "patch_sizes: got 4"),
        (["calibrate", "bank.npz", "net.safetensors", "-n", "0"], "n: got 0"),
        (["compare", "bank.npz", "net.safetensors", "--memory-limit", "0"], "--memory-limit"),
        (["compare", "bank.npz", "net.safetensors", "--table", "3", "--labels", "9"], "unknown label"),
    ],
)
def test_mistakes_are_told_in_one_line(data, words, message):
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("patchscore: error")]) == 1
