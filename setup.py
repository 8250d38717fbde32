"""Builds what the machine has compilers for; without any the package still installs.

patchscore._native is the C++ engines; patchscore._sliding_cuda the CUDA kernels, a plain library that Python loads by
ctypes, so that nothing of it depends on torch or on the CUDA runtime torch brings. PATCHSCORE_CUDA=0 leaves it out,
PATCHSCORE_CUDA=1 makes its absence an error; PATCHSCORE_NATIVE=0 leaves the C++ engines out. All other metadata is in
pyproject.toml.
"""

import os
import shutil
import subprocess
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")


class BuildExtensions(build_ext):
    """Knows how to build the extension whose source is CUDA."""

    def build_extension(self, extension):
        if not extension.sources[0].endswith(".cu"):
            return super().build_extension(extension)
        library = self.get_ext_fullpath(extension.name)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "--threads", "2", "-cudart", "static", "-shared"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for target in TARGETS:
            command += ["-gencode", target]
        try:
            subprocess.run([*command, "-o", library, *extension.sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if forced:
                raise
            print(f"the CUDA kernels were not built: {error}")

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self):
        # Only those that were built.
        extensions = self.extensions
        self.extensions = [one for one in extensions if os.path.exists(self._built(one))]
        super().copy_extensions_to_source()
        self.extensions = extensions

    def _built(self, extension):
        name = self.get_ext_filename(self.get_ext_fullname(extension.name))
        return os.path.join(self.build_lib, name)


wanted = os.environ.get("PATCHSCORE_CUDA", "")
nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
forced = wanted == "1"
if wanted not in ("", "0", "1"):
    raise SystemExit(f"PATCHSCORE_CUDA: got {wanted!r}, takes 0 or 1")
if forced and nvcc is None:
    raise SystemExit("PATCHSCORE_CUDA=1, but there is no nvcc on the path or in CUDA_HOME")

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError:
    Pybind11Extension = None

extensions = []
if Pybind11Extension is not None and os.environ.get("PATCHSCORE_NATIVE") != "0":
    # One file at a time, or as many as the variable says; 0: as there are cores.
    ParallelCompile("NPY_NUM_BUILD_JOBS", default=1).install()
    extensions.append(
        Pybind11Extension(
            "patchscore._native",
            ["csrc/bindings.cpp", "csrc/sliding/sliding.cpp", "csrc/pruned/pruned.cpp"],
            depends=glob("csrc/**/*.h", recursive=True),
            cxx_std=17,
            # Vectors wider than a register have no calling convention; functions that take them are inlined.
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    )
if nvcc and wanted != "0":
    extensions.append(
        Extension(
            "patchscore._sliding_cuda",
            ["csrc/sliding/sliding.cu"],
            depends=["csrc/sliding/cuda_device.h"],
            optional=not forced,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
