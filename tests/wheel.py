"""Runs an installed wheel from an empty folder: the C++ engine is in it, and the command line makes images.

python -I tests/wheel.py, with the interpreter of an environment that holds the wheel and what it depends on.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import patchscore as ps
from patchscore import _native

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    for module in (ps, _native):
        assert ROOT / "patchscore" not in Path(module.__file__).parents, f"{module.__file__} is the source tree's"

    with tempfile.TemporaryDirectory() as folder:
        command = "sample fashion-mnist --labels all --limit 100 -n 2 --steps 10 --engine sliding --out out"
        program = Path(sys.executable).with_name("patchscore")
        subprocess.run([program, *command.split()], cwd=folder, check=True)
        run = Path(folder) / "out"
        images = np.load(run / "samples.npy")
        batches = (run / "batches.jsonl").read_text()
    assert images.shape == (2, 1, 28, 28), images.shape
    assert np.isfinite(images).all()
    assert np.ptp(images) > 1, "the images are flat"
    assert "sliding" in batches, "another engine served"
    print(f"patchscore {ps.__version__}: two images from the installed wheel")


if __name__ == "__main__":
    main()
