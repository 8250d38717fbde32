"""The CUDA kernels as plain C++ on the CPU (tests/emulation), in place of the library that nvcc builds."""

import os
import shutil
import subprocess
from pathlib import Path

from patchscore.engines.sliding import cuda as sliding_cuda

ROOT = Path(__file__).parent.parent


def build(folder):
    """The library, or None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    library = Path(folder) / "sliding_emulated.so"
    flags = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    with open(ROOT / "csrc" / "sliding" / "sliding.cu") as source:
        # From standard input, so that "cuda_device.h" is the one of the folder it is compiled in.
        command = [compiler, *flags, "-x", "c++", "-o", str(library), "-"]
        subprocess.run(command, stdin=source, cwd=ROOT / "tests" / "emulation", check=True)
    return sliding_cuda.load(str(library))
