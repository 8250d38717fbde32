"""The emulator of CUDA (tests/emulation) refuses what a GPU may not refuse, and lets pass what is right."""

import ctypes
import re

import emulated
import pytest
import torch

THREADS = 64


class Task(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("n", ctypes.c_int), ("out", ctypes.c_void_p), ("in_", ctypes.c_void_p)]


class Faults:
    def __init__(self, library):
        self.library = library
        library.fault_text.restype = library.fault_name.restype = ctypes.c_char_p

    def run(self, kind, blocks=(1, 1, 1), threads=THREADS, shared=4 * THREADS, out=4 * THREADS, n=None):
        """("" or what was refused, the buffer written)."""
        written, read = torch.zeros(out, dtype=torch.int32), torch.arange(THREADS, dtype=torch.int32)
        task = Task(kind, out if n is None else n, written.data_ptr(), read.data_ptr())
        starts = (ctypes.c_uint64 * 2)(written.data_ptr(), read.data_ptr())
        self.library.emulation_buffers(2, starts, (ctypes.c_uint64 * 2)(4 * out, 4 * THREADS))
        remembered = (ctypes.c_int * 2)()
        error = self.library.fault_run(ctypes.byref(task), *blocks, threads, shared, remembered)
        assert list(remembered) == [error, 0]  # remembered until it is asked for
        return (f"{self.name(error)}: {self.library.fault_text(error).decode()}" if error else ""), written

    def name(self, error):
        return self.library.fault_name(error).decode()


@pytest.fixture(scope="module")
def built(pytestconfig):
    path = emulated.build(pytestconfig.cache.mkdir("emulated"), emulated.EMULATION / "faults.cu")
    if path is None:
        pytest.skip("no C++ compiler")
    return emulated.load(path, ctypes.CDLL)


@pytest.fixture(params=[0, 1, 2, 3, 4])
def faults(request, built):
    """In several orders of warps and lanes: what is wrong is refused in all of them."""
    built.emulation_reset(1, emulated.SHARED["sm_90"], request.param, 0)
    yield Faults(built)
    built.emulation_reset(1, emulated.SHARED["sm_90"], 0, 0)


def test_what_is_right_runs(faults):
    said, out = faults.run(0)
    assert said == ""
    own = torch.arange(THREADS)
    assert torch.equal(out[:THREADS], (own + 1) % THREADS + 1)
    assert torch.equal(out[2 * THREADS : 3 * THREADS], own // 32 * 32 + (own + 1) % 32)
    assert faults.run(0, blocks=(2, 1, 1))[0] == ""
    assert faults.run(6)[0] == ""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (1, r"(reads byte \d+ of shared memory, which (nobody wrote|thread \d+ wrote with no barrier)|which a thread)"),
        (2, r"(writes byte \d+ of shared memory, which .* read|reads byte \d+ .* wrote) with no barrier"),
        (3, r"(reads byte \d+ of shared memory, which (nobody wrote|thread \d+ wrote)|writes byte .* lane \d+ read)"),
        (4, r"(reads byte \d+ of shared memory, which thread \d+ wrote|writes byte .* lane \d+ read) with no barrier"),
        (5, r"(reads byte \d+ of shared memory, which (nobody wrote|thread \d+ wrote)|writes byte .* lane \d+ read)"),
        (7, r"writes byte \d+ of shared memory, which thread \d+ wrote with no barrier"),
        (8, r"reads byte 0 of shared memory, which nobody wrote"),
        (9, r"comes to (a vote|__syncwarp) \(line \d+, mask ffffffff\), lane \d+ waits at (a vote|__syncwarp)"),
        (10, r"comes to __syncwarp .*, lane \d+ (waits .*at __syncwarp \(line \d+, mask|has left)"),
        (11, r"comes to (a vote|__syncwarp) .*, lane \d+ (waits at (a vote|__syncwarp)|has left)"),
        (12, r"with mask fffffffe, which leaves it out"),
        (13, r"(leaves while lane \d+ waits for it at a vote|lane 5 has left)"),
        (14, r"(threads wait for it at __syncthreads|comes to __syncthreads .*, \d+ threads have left)"),
        (15, r"comes to __syncthreads in line \d+, thread \d+ waits at that in line \d+"),
        (16, r"(comes to __syncthreads|comes to a vote|nobody can go on)"),
        (17, r"writes 4 bytes at 256 of shared memory, which has 256"),
        (18, r"reads 4 bytes at 256 of a buffer of 256"),
        (20, r"writes 4 bytes at -4 of a buffer"),
        (23, r"not aligned"),
        (24, r"a sum overflows an int"),
        (25, r"comes to a matrix product \(line \d+, mask ffffffff\), lane \d+ waits at a matrix product"),
        (26, r"a matrix product overflows an int"),
    ],
)
def test_what_is_wrong_is_named(faults, kind, said):
    text, _ = faults.run(kind)
    assert text.startswith("cudaErrorLaunchFailure: fault_kernel, block (0, 0, 0), warp ")
    assert_matches(text, said)
    assert faults.run(0)[0] == ""  # and the next launch is a new one


def assert_matches(text, pattern):
    assert re.search(pattern, text), text


def test_a_buffer_ends_where_it_ends(faults):
    assert_matches(faults.run(19, out=THREADS)[0], "writes 4 bytes at 256 of a buffer of 256")


def test_blocks_do_not_write_one_place(faults):
    assert_matches(
        faults.run(21, blocks=(2, 1, 1))[0], r"block \([01], 0, 0\).* that another thread of this launch wrote"
    )
    assert_matches(faults.run(22)[0], r"reads byte \d+ of a buffer that another thread of this launch wrote")


def test_locals_begin_as_poison(faults):
    said, out = faults.run(27, out=THREADS, n=2)
    assert said == ""
    assert out[:2].tolist() == [0, 1]
    assert out[2] != 2  # nor what stood on the stack
    assert out[2] == out[3]


def test_limits_of_a_launch(faults):
    for blocks in ((1, 65536, 1), (1, 1, 65536), (0, 1, 1)):
        assert_matches(faults.run(99, blocks=blocks)[0], "cudaErrorInvalidConfiguration: fault_kernel: the grid")
    assert_matches(faults.run(99, threads=1056)[0], "cudaErrorInvalidConfiguration: .* 32 to 1024 threads")
    assert faults.run(99, threads=1024)[0] == ""
    assert faults.run(99, blocks=(70000, 1, 1), threads=32)[0] == ""


def test_shared_memory_beyond_48_kb_must_be_allowed_on_each_device(built):
    faults = Faults(built)
    built.emulation_reset(2, emulated.SHARED["sm_80"], 0, 0)
    assert faults.run(99, shared=48 * 1024)[0] == ""
    assert_matches(faults.run(99, shared=50 * 1024)[0], "asks for 51200 bytes of shared memory, 49152 are allowed")
    assert faults.name(built.fault_allow(0, 200 * 1024)) == "cudaErrorInvalidValue"
    assert built.fault_allow(0, 100 * 1024) == 0
    assert faults.run(99, shared=100 * 1024)[0] == ""
    assert built.fault_allow(0, 60 * 1024) == 0  # the last one counts, not the largest
    assert_matches(faults.run(99, shared=100 * 1024)[0], "61440 are allowed")
    assert built.fault_allow(1, 100 * 1024) == 0
    assert faults.run(99, shared=100 * 1024)[0] == ""
    assert faults.name(built.fault_allow(2, 1024)) == "cudaErrorInvalidDevice"
    assert built.fault_allow(0, 0) == 0
    built.emulation_reset(1, emulated.SHARED["sm_90"], 0, 0)


def test_registers_of_a_block_must_fit(built):
    faults = Faults(built)
    built.emulation_registers(b"fault_kernel", 65)
    try:
        assert_matches(faults.run(99, threads=1024)[0], "cudaErrorLaunchOutOfResources: .* registers")
        assert faults.run(99, threads=512)[0] == ""
    finally:
        built.emulation_registers(b"fault_kernel", 0)
