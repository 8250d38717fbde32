"""How the files beside this one were made, once, by version 0.1.0 (commit 483a3f3); run in an empty folder.

They are small files of every kind that 0.1.0 wrote. tests/test_old_files.py opens them.
"""

import subprocess
import sys

import numpy as np

import patchscore as ps
from patchscore.networks import ResNet, save_network

assert ps.__version__ == "0.1.0"

coarse = np.random.default_rng(0).normal(size=(8, 1, 3, 3))
fine = coarse.repeat(3, axis=2).repeat(3, axis=3) + 0.2 * np.random.default_rng(1).normal(size=(8, 1, 9, 9))
images = ((fine * 0.4).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
np.savez_compressed("bank.npz", images=images, labels=np.arange(8) % 2, class_names=np.array(["cat", "dog"]))
ps.ScaleTable([0.3, 3.0], [3, 5], "small").save("table.json")
save_network(ResNet(1, (0, 1), 2, 1, "zeros"), "network.safetensors", {"made": "for a test"})


def patchscore(*words):
    subprocess.run([sys.executable, "-m", "patchscore.cli", *map(str, words)], check=True)


options = ("--table", "table.json", "--steps", 4, "--batch-size", 2, "-n", 3, "--labels", "all")
patchscore("index", "bank.npz", "--patch-sizes", "3,5", "--cells", 16, "--rank", 4, "--out", "index")
patchscore("sample", "bank.npz", *options, "--out", "run")
patchscore("explain", "run", "--image", "0", "--levels", 1)
patchscore("sample", "bank.npz", *options, "--index", "index", "--budget", 0.5, "--out", "run-with-index")
network = ("network.safetensors", "--steps", 4, "-n", 2, "--labels", "none")
patchscore("calibrate", "bank.npz", *network, "--patch-sizes", "3,5", "--out", "calibrated")
patchscore("compare", "bank.npz", *network, "--table", "table.json", "--no-baselines", "--out", "compared")
