"""Builds patchscore._native, the C++ engines, where a compiler is at hand; without one the package still installs.

All other metadata is in pyproject.toml.
"""

from glob import glob

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension

    extensions = [
        Pybind11Extension(
            "patchscore._native",
            ["csrc/bindings.cpp", "csrc/sliding_cpu.cpp", "csrc/lists_cpu.cpp"],
            depends=glob("csrc/*.h"),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
except ImportError:
    extensions = []

setup(ext_modules=extensions)
