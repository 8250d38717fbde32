"""Every benchmark of the project, one after another: `patchscore bench` and `make bench` run this.

In short (under five minutes): rates of the exact engines beside peers, whole samples, scaling; tables on the terminal,
JSON and PNG in --out. --full runs all that writes a file of benchmarks/results/ and for which the inputs are given,
in its place unless --out says otherwise, and then remakes the pages; --gpu the GPU's. What cannot run says what it
lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SHORT = (
    ("exact_cpu.py", "--short"),
    ("end_to_end.py", "--short"),
    ("scaling.py", "--short"),
)


def full(given: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """Commands, and what each lacks on this machine, or nothing."""
    images = "" if given.images else "--images, CIFAR-10's training images"
    indexes = "" if given.indexes else "--indexes, a folder with 40 GB to spare"
    fashion = "" if given.fashion_mnist else "--fashion-mnist, the folder of its four IDX files"
    no_faiss = "" if importlib.util.find_spec("faiss") else "FAISS, pip install 'patchscore[cpu]'"
    no_photographs = no_faiss or ("" if importlib.util.find_spec("skimage") else "scikit-image, for its photographs")
    no_triton = "" if importlib.util.find_spec("triton") else "Triton, pip install 'patchscore[gpu]'"
    no_diffusers = "" if importlib.util.find_spec("diffusers") else "diffusers, pip install 'patchscore[diffusers]'"
    no_cuda = "" if shutil.which("nvcc") and shutil.which("nvdisasm") else "nvcc and nvdisasm, of the CUDA toolkit"
    idx = Path(given.fashion_mnist or "")
    held_out = [str(idx / f"t10k-{part}.gz") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    cifar = str(given.images)
    train = ("--images", cifar) if given.images else ()
    where = ("--indexes", str(given.indexes))
    yield ("accuracy.py",), ""
    yield ("exact_cpu.py", *train), ""
    yield ("scaling.py", *train), ""
    yield ("mapped.py", cifar, "--gib", "12", "--limit-gib", "4", "--max-windows", "16000000"), images
    yield ("scale.py", "--images", cifar), images
    yield ("adapters.py",), no_diffusers
    yield ("moments.py", cifar), images
    yield ("gaussian.py", "fashion-mnist"), ""
    yield ("gaussian.py", "cifar10", cifar), images
    yield ("guidance.py",), ""
    yield ("nearest_cut.py",), no_photographs
    yield ("theories.py", "fashion-mnist"), ""
    shipped = "examples/fashion-mnist-resnet-zeros.safetensors"
    yield ("league.py", "fashion-mnist-resnet", shipped, "fashion-mnist"), ""
    circular = "a network trained with --padding-mode circular, of examples/train_cnn.py"
    yield ("circular.py", "fashion-mnist", "NETWORK", "fashion-mnist"), circular
    yield ("classification.py", *held_out), fashion
    yield ("theory.py", "fashion-mnist", "examples/fashion-mnist-resnet-zeros.safetensors", "fashion-mnist"), ""
    yield ("scales.py", "cifar10", cifar, "--limit", "1000"), images
    yield ("fused_precision.py", cifar), images
    yield ("compile_report.py",), no_triton
    yield ("sass.py",), no_cuda
    yield ("pruned_cpu.py", *train, *where), images or indexes or no_faiss
    yield ("pruned_policy.py", *train), images or no_faiss
    yield ("pruned_attack.py", *train), images or no_faiss
    yield ("latents.py", *train), images or no_faiss
    sixty = str(idx / "train-images-idx3-ubyte.gz")
    yield ("many_samples.py", sixty), fashion or no_faiss
    inputs = ("--cifar10", cifar, "--fashion-mnist", sixty, *where)
    yield ("end_to_end.py", *inputs), images or fashion or indexes or no_faiss


def gpu(given: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], str]]:
    import torch

    options = ["--images", str(given.images)] if given.images else []
    yield ("gpu.py", *options), "" if torch.cuda.is_available() else "a CUDA device"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything that the inputs allow; hours")
    parser.add_argument("--gpu", action="store_true", help="the benchmark of the GPU")
    parser.add_argument(
        "--out", type=Path, help="folder of results; out-bench, with --full and --gpu the project's own"
    )
    parser.add_argument("--images", type=Path, help="CIFAR-10: a folder with a subfolder a class, or a tar of it")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--indexes", type=Path, help="folder where indexes are kept or built")
    given = parser.parse_args()
    commands = [(command, "") for command in SHORT]
    if given.full or given.gpu:
        commands = [*(full(given) if given.full else ()), *(gpu(given) if given.gpu else ())]
    out = given.out or (None if given.full or given.gpu else Path("out-bench").resolve())
    environment = dict(os.environ) if out is None else {**os.environ, "PATCHSCORE_RESULTS": str(out)}

    failed, missing, start = [], [], time.perf_counter()
    for (script, *options), lacks in commands:
        if lacks:
            missing.append(f"{script}: {lacks}")
            continue
        print(f"\n== {script} {' '.join(options)}", flush=True)
        began = time.perf_counter()
        code = subprocess.call([sys.executable, str(HERE / script), *options], cwd=ROOT, env=environment)
        print(f"== {script}: {time.perf_counter() - began:.0f} s{f', exit code {code}' if code else ''}", flush=True)
        failed += [script] * (code != 0)
    if out is None:
        subprocess.call([sys.executable, str(HERE / "report.py")], cwd=ROOT)
    for what in missing:
        print(f"not measured, it lacks: {what}")
    where = "benchmarks/results and docs" if out is None else str(out)
    print(f"\n{time.perf_counter() - start:.0f} s: JSON and plots in {where}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
