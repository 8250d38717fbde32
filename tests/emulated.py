"""The CUDA kernels as plain C++ on the CPU (tests/emulation), in place of the library that nvcc builds."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import torch

from patchscore.engines.sliding import cuda

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "emulation"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block may have: CUDA programming guide, technical specifications."""
STRICT = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
INSTRUMENTED = ["-fsanitize=thread", "-fsanitize=signed-integer-overflow,alignment", "-ftrivial-auto-var-init=pattern"]


def build(folder, source=ROOT / "csrc" / "sliding" / "sliding.cu"):
    """Path of the emulated library of a CUDA source, or None without a C++ compiler. What was built is kept."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    common = [compiler, "-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", *STRICT, "-I", str(EMULATION)]
    emulator = _built(folder, [*common, "-O3", "-c", "-x", "c++"], EMULATION / "emulator.cpp")
    kernels = _built(folder, [*common, "-O1", *INSTRUMENTED, "-c", "-x", "c++"], Path(source))
    library = kernels.with_name(kernels.name + emulator.name + ".so")
    if not library.exists():
        # Without the sanitizers' libraries: the emulator answers their calls.
        _make([compiler, "-shared", str(kernels), str(emulator), "-ldl", "-pthread"], library)
    return library


def _built(folder, command, source):
    """What a command makes of a source; named by all that goes into it."""
    texts = [str(command).encode(), source.read_bytes(), *(path.read_bytes() for path in sorted(EMULATION.glob("*.h")))]
    made = Path(folder) / hashlib.sha256(b"".join(texts)).hexdigest()[:16]
    if not made.exists():
        with open(source) as text:
            # From standard input, so that "cuda_device.h" is the emulation's.
            _make([*command, "-"], made, stdin=text, cwd=EMULATION)
    return made


def _make(command, made, **options):
    """Another process may make the same: a file appears whole."""
    own = made.with_name(f"{made.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(own)], check=True, **options)
    own.replace(made)


def load(path, source=cuda.load):
    """The library at `path`; its launches are refused where their registers would not fit."""
    library = source(str(path))
    library.emulation_reset.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    library.emulation_blocks.restype = ctypes.c_uint64
    library.emulation_registers.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.emulation_buffers.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    for kernel, count in registers().items():
        library.emulation_registers(kernel.encode(), count)
    return library


def registers():
    """Registers a thread by kernel, on the target that takes most: the report of benchmarks/sass.py."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sliding_cuda_sass.json").read_text())["kernels"]
    return {row["kernel"]: max(r["registers"] for r in rows if r["kernel"] == row["kernel"]) for row in rows}


class Emulation:
    """The engine runs on tensors of the CPU; a launch may touch only the tensors whose pointers it was given."""

    def __init__(self, library, monkeypatch):
        self.library, self.sizes, self.launches = library, {}, []
        data_ptr, run = torch.Tensor.data_ptr, cuda._run
        empty, empty_like = torch.empty, torch.empty_like

        def recorded_pointer(tensor):
            pointer = data_ptr(tensor)
            assert tensor.is_contiguous(), "a kernel is given a tensor that does not lie in one piece"
            self.sizes[pointer] = tensor.numel() * tensor.element_size()
            return pointer

        def bounded_run(name, task, device):
            self.launches.append(name)
            self.bound(task)
            run(name, task, device)

        def poison(tensor):
            if tensor.dtype == torch.bool:
                return tensor
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        monkeypatch.setattr(cuda, "library", library)
        monkeypatch.setattr(torch.Tensor, "data_ptr", recorded_pointer)
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: poison(empty(*shape, **options)))
        monkeypatch.setattr(torch, "empty_like", lambda other, **options: poison(empty_like(other, **options)))
        monkeypatch.setattr(cuda, "_run", bounded_run)
        self.reset()

    def bound(self, task):
        """The buffers of this thread's next launch: those the task points to."""
        pointers = [getattr(task, name) for name, kind in task._fields_ if kind is ctypes.c_void_p]
        pointers = [pointer for pointer in pointers if pointer]
        array = ctypes.c_uint64 * len(pointers)
        sizes = array(*(self.sizes[pointer] for pointer in pointers))
        self.library.emulation_buffers(len(pointers), array(*pointers), sizes)

    def reset(self, devices=1, shared=SHARED["sm_90"], seed=0, only_checks=False):
        """What the machine is; by `seed` blocks, warps and lanes run forward (0), backward (1) or at random."""
        self.library.emulation_reset(devices, shared, seed, only_checks)


def seed_of(name):
    """A test's own order."""
    return zlib.crc32(name.encode())
