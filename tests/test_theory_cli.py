"""patchscore calibrate and compare: what they write, and one line for everything that goes wrong."""

import csv
import json

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import patchscore as ps
from patchscore.cli import main
from patchscore.draw.league import league_page
from patchscore.evaluate import BASELINES, THEORIES
from patchscore.networks import ResNet, load_network, save_network


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
    assert f"{report['rows'][0]['correlation_squared_median']:.3f}" in done.output
    assert {row["machine"] for row in csv.DictReader((data / "d" / "comparison.csv").read_text().splitlines())} == set(
        report["images"]
    )
    assert "against" in done.output


def test_calibrate_without_a_network(data):
    words = ("calibrate", "bank.npz", "--steps", 5, "-n", 3, "--patch-sizes", "3,5,9")
    done = run(*words, "--monotone", "--block", 0, "--out", "c")
    assert done.exit_code == 0, done.output
    table = ps.ScaleTable.load("c/table.json")
    errors = ps.HeldOutErrors.load("c/held-out.json")
    bank = ps.PatchBank.open("bank.npz")
    levels = ps.get_schedule("cosine", 5).ratios[:-1].tolist()
    again = ps.held_out_errors(bank, [3, 5, 9], levels, images=3, block=None, progress=False)
    np.testing.assert_allclose(errors.errors, again.errors, rtol=1e-5)
    assert table == ps.ScaleTable.of_errors(errors, monotone=True)
    assert Image.open("c/calibration.png").width > 100
    for word in ("size", "from", "to", "next"):
        assert any(line.startswith(word) for line in done.output.splitlines())

    np.savez("more.npz", images=smooth_images(4, 1, 10, 10, seed=5).numpy(), labels=np.arange(4) % 2)
    done = run(*words, "--held-out", "more.npz", "--labels", "all", "--out", "d")
    assert done.exit_code == 0, done.output
    settings = ps.HeldOutErrors.load("d/held-out.json").settings
    assert settings["held_out"] == ps.PatchBank.open("more.npz").fingerprint
    assert settings["conditional"]


def test_a_league_of_some_theories_continues_and_grows(data):
    words = ("compare", "bank.npz", "entrypoint_of_test:local", "--steps", 4, "--table", 3, "--out", "league")
    done = run(*words, "-n", 2, "--theories", "pca,ideal", "--no-steps")
    assert done.exit_code == 0, done.output
    report = json.loads((data / "league" / "comparison.json").read_text())
    assert {row["machine"] for row in report["rows"]} == {"pca", "ideal"}
    assert "step_mse_median" not in report["rows"][0]
    assert not (data / "league" / "scatter.png").exists()
    done = run(*words, "-n", 3, "--theories", "all", "--no-steps")
    assert done.exit_code == 0, done.output
    grown = json.loads((data / "league" / "comparison.json").read_text())
    assert grown["rows"][0]["machine"] == "els-zeros"
    assert {row["machine"] for row in grown["rows"]} == set(THEORIES)
    assert grown["images"]["pca"]["mse"][:2] == report["images"]["pca"]["mse"]
    done = run(*words, "-n", 2, "--theories", "pca")
    assert done.exit_code == 2
    assert "holds a comparison of along False, asked for True" in done.output


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_league_page_in_a_browser(data, tmp_path_factory):
    """Sorting by a column and its reverse, another figure, pictures that are there, and nothing fetched."""
    bank = ps.PatchBank.open("bank.npz")
    machines = {"<b>ideal": ps.IdealScore(bank), "local": ps.LocalScore(bank, 5), "gaussian": ps.GaussianScore(bank)}
    found = ps.compare(ps.LocalScore(bank, 3), machines, n=3, steps=4, progress=False)
    (data / "league.html").write_text(league_page(found, "A </script> title", ["a line"]))
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        browser.open((data / "league.html").as_uri())
        assert browser.read("document.querySelector('h1').textContent") == "A </script> title"
        names = "[...document.querySelectorAll('#league tbody tr')].map((row) => row.cells[0].textContent)"
        assert browser.read(names) == found.league()
        heading = "document.querySelectorAll('#league th button')[4]"
        browser.read(f"{heading}.click()")
        assert browser.read(names) == found.league("mse")
        browser.read(f"{heading}.click()")
        assert browser.read(names) == found.league("mse")[::-1]
        assert browser.read(f"{heading}.closest('th').ariaSort") == "descending"
        cells = "[...document.querySelectorAll('#differences tbody tr')].map((row) => row.cells[2].textContent)"
        before = browser.read(cells)
        assert len(before) == 3
        assert before[0].startswith(f"{found.differences()[0]['median']:.3f}")
        browser.read(
            "{const s = document.querySelector('#figure'); s.value = 'mse'; s.dispatchEvent(new Event('change'))}"
        )
        assert browser.read(cells) != before
        assert browser.read("document.querySelectorAll('#chart polyline').length") == 3
        pictures = "[...document.querySelectorAll('.pictures img')].map((image) => image.naturalWidth)"
        assert all(width > 30 for width in browser.read(pictures))
        assert len(browser.read(pictures)) == 4
        assert browser.read("document.querySelectorAll('b').length") == 0
        asked = [event for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
        asked = {event["params"]["request"]["url"].split(":")[0] for event in asked}
        assert asked <= {"file", "data", "about"}


def test_a_checkpoint_brings_its_padding(data):
    done = run("compare", "bank.npz", "net.safetensors", "--steps", 4, "-n", 1, "--table", 3, "--no-baselines")
    assert done.exit_code == 0, done.output
    assert "els-circular" in done.output
    assert not (data / "compared" / "scatter.png").exists()
    # Beside a circular network the machines include the one whose windows wrap.
    done = run("compare", "bank.npz", "net.safetensors", "--steps", 3, "-n", 1, "--table", 3, "--out", "all")
    assert done.exit_code == 0, done.output
    report = json.loads((data / "all" / "comparison.json").read_text())
    assert {row["machine"] for row in report["rows"]} == {*BASELINES, "els-wrapped"}
    done = run("calibrate", "bank.npz", "net.safetensors", "--steps", 3, "-n", 1, "--machine", "wrapped")
    assert done.exit_code == 0, done.output
    assert json.loads((data / "calibrated" / "calibration.json").read_text())["settings"]["machine"] == "wrapped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate", "bank.npz", "nowhere"], "module:function"),
        (["calibrate", "bank.npz", "os:getcwd"], "NETWORK: os:getcwd cannot be called with a bank"),
        (["calibrate", "bank.npz", "no_such_module:f"], "no_such_module"),
        (["calibrate", "bank.npz", "entrypoint_of_test:nothing"], "nothing"),
        (["compare", "bank.npz", "entrypoint_of_test:wrong"], "takes one that returns a denoiser"),
        (["compare", "bank.npz", "bank.npz"], "not a usable network: no whole .safetensors file"),
        (["compare", "absent.npz", "net.safetensors"], "absent.npz"),
        (["calibrate", "bank.npz", "net.safetensors", "--patch-sizes", "3,x"], "--patch-sizes"),
        (["calibrate", "bank.npz", "net.safetensors", "--patch-sizes", "4"], "patch_sizes: got 4"),
        (["calibrate", "bank.npz", "net.safetensors", "-n", "0"], "n: got 0"),
        (["calibrate", "bank.npz", "net.safetensors", "--monotone"], "take no NETWORK"),
        (
            ["calibrate", "bank.npz", "--machine", "wrapped"],
            "--machine: got wrapped, without NETWORK takes els",
        ),
        (["calibrate", "bank.npz", "-n", "0"], "images: got 0"),
        (["calibrate", "bank.npz", "--labels", "1"], "--labels: got 1"),
        (["calibrate", "bank.npz", "--held-out", "absent.npz"], "absent.npz"),
        (["calibrate", "bank.npz", "--patch-sizes", "11", "--padding-mode", "circular"], "patch_sizes: got 11"),
        (["compare", "bank.npz", "net.safetensors", "--memory-limit", "0"], "--memory-limit"),
        (["compare", "bank.npz", "net.safetensors", "--theories", "magic"], "--theories: got 'magic'"),
        (["compare", "bank.npz", "net.safetensors", "--table", "3", "--labels", "9"], "unknown label"),
    ],
)
def test_mistakes_are_told_in_one_line(data, words, message):
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("patchscore: error")]) == 1


def test_auto_labels_ask_the_network(data):
    """A bank with labels and a network without: auto is none, and says so; all is refused with the cause."""
    save_network(ResNet(1, (), 4, 1, "zeros"), "plain.safetensors", {})
    words = ("compare", "bank.npz", "plain.safetensors", "--steps", 4, "-n", 1, "--table", 3, "--no-baselines")
    done = run(*words[0:])
    assert done.exit_code == 0, done.output
    assert "labels none: the network takes none" in done.output
    assert json.loads((data / "compared" / "comparison.json").read_text())["labels"] is None
    done = run(*words, "--labels", "all", "--out", "other")
    assert done.exit_code == 2
    assert "unknown label 0; this network was trained without labels" in done.output
    words = ("compare", "bank.npz", "net.safetensors", *words[3:], "--out", "labelled")
    assert run(*words).exit_code == 0
    assert json.loads((data / "labelled" / "comparison.json").read_text())["labels"] == [0]


def test_an_error_of_the_users_own_code_keeps_its_file_and_line(data):
    (data / "faulty_of_test.py").write_text(
        "def network(bank):\n    deep()\ndef deep():\n    raise ValueError('my own bug')\n"
    )
    done = run("compare", "bank.npz", "faulty_of_test:network", "--steps", 4, "-n", 1, "--table", 3)
    assert done.exit_code == 2
    assert f"my own bug (ValueError at {data / 'faulty_of_test.py'}, line 4)" in done.output
    assert "line" not in run("compare", "bank.npz", "net.safetensors", "--steps", 1).output


def test_a_network_file_that_is_damaged_is_refused_and_takes_no_memory(data):
    whole = (data / "net.safetensors").read_bytes()
    for text, other, message in (
        (b'\\"depth\\": 1', b'\\"depth\\": 1000000000', "was changed since it was written"),
        (b'"config":"{\\"arch', b'"config":"[\\"arch', "not a usable network"),
    ):
        assert text in whole
        head = int.from_bytes(whole[:8], "little")
        changed = whole[8 : 8 + head].replace(text, other)
        changed += b" " * (-len(changed) % 8)
        (data / "bad.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + head :])
        with pytest.raises(ValueError, match=message):
            load_network(data / "bad.safetensors")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (data / "bad.safetensors").write_bytes(content)
        try:
            network, _ = load_network(data / "bad.safetensors")
        except ValueError as error:
            refused += str(data / "bad.safetensors") in str(error)
        else:
            again, _ = load_network(data / "net.safetensors")
            for name, weight in again.state_dict().items():
                assert torch.equal(weight, network.state_dict()[name])
    assert refused >= 90
    # Without a checksum, as 0.1.0 wrote them, sizes that the weights do not have are refused before they are made.
    for size in ("depth", "width"):
        with safe_open(data / "net.safetensors", "pt") as file:
            metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = {**json.loads(metadata["config"]), size: 10**9}
        metadata = {name: value for name, value in metadata.items() if name != "sha256"}
        save_file(weights, data / "huge.safetensors", {**metadata, "config": json.dumps(config)})
        with pytest.raises(ValueError, match="not a usable network"):
            load_network(data / "huge.safetensors")
