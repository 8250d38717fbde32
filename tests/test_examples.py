"""Every example runs as it stands, and does what its first line says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import patchscore as ps
from patchscore.adapters.network import from_network
from patchscore.networks import load_network

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name, *arguments):
    # One after another on few cores: more threads than these only get in each other's way.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_diffusers_pipeline_in_fifteen_lines(tmp_path):
    pytest.importorskip("diffusers.pipelines.ddim.pipeline_ddim", reason="diffusers cannot be imported")
    run("diffusers_pipeline.py", tmp_path / "out.png")
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (56, 28)
    assert len(picture.convert("L").getcolors()) > 20
    code = (EXAMPLES / "diffusers_pipeline.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line]) <= 15


def test_guidance_draws_its_grid(tmp_path):
    run("guidance.py", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (4 * 30 * 3 + 6, 4 * 30 * 3 + 6)


def test_classification_is_mostly_right():
    *lines, verdict = run("classification.py").splitlines()
    assert len(lines) == 20
    assert int(verdict.split()[0]) >= 12  # chance is 2


def test_errors_fall_with_the_budget():
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    errors = [float(value) for value in re.findall(r"rms ([\d.]+)", run("pruned.py"))]
    assert len(errors) == 4
    assert errors[0] > errors[-1]


def test_engines_agree():
    *lines, _choice = run("engines.py").splitlines()
    worst = [float(line.split("worst pixel ")[1].split()[0]) for line in lines if "worst pixel" in line]
    assert len(worst) >= 2
    assert max(worst) < 1e-3


def test_a_network_trains_and_is_compared(tmp_path):
    run("train_cnn.py", "fashion-mnist", tmp_path / "n.safetensors", "--limit", 40, "--width", 8, "--images", 64)
    network, notes = load_network(tmp_path / "n.safetensors")
    assert notes["images_seen"] == 64
    bank = ps.PatchBank.open("fashion-mnist", limit=40)
    found = ps.compare(from_network(network, bank.shape), ps.IdealScore(bank), n=2, steps=4, progress=False)
    assert found.rows()[0]["n"] == 2


def test_every_example_is_run_here():
    tests = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in tests


def test_synthesis_draws_a_tile_a_landscape_and_a_wider_one(tmp_path):
    run("synthesis.py", tmp_path / "out.png", 0.2)
    picture = Image.open(tmp_path / "out.png").convert("RGB")
    assert picture.width > 300
    assert len(picture.getcolors(2**24)) > 1000


def test_restoration_undoes_a_blur(tmp_path):
    lines = run("restoration.py", "--out", tmp_path / "out.png", "--limit", 60, "--steps", 6).splitlines()
    found = {line.split("  ")[0]: [float(x) for x in re.findall(r"(-?[\d.]+) dB", line)] for line in lines}
    assert set(found) == {"inpainting", "4x super-resolution", "deblurring"}
    # So few patches fill no hole well, but they undo a blur.
    degraded, _, restored = found["deblurring"]
    assert restored > degraded
    assert Image.open(tmp_path / "out.png").width > 12 * 28
