"""Engine `fused`: numbers under Triton's interpreter, code for three GPUs without one, and numbers on a GPU.

Whoever has no Triton skips; whoever has no GPU skips what is marked so. PATCHSCORE_TRITON_CHECK=all (make triton-check)
runs every test of fused_interpreted.py and compiles every configuration, instead of one of each kind.
"""

import concurrent.futures
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_code
from conftest import smooth_images

import patchscore as ps
from patchscore.engines import base
from patchscore.engines.fused import launch, rows
from patchscore.engines.fused.launch import Fused
from patchscore.engines.fused.plan import BIAS_COLUMNS, Plan
from patchscore.engines.reference import Reference

HERE = Path(__file__).parent
CPU = torch.device("cpu")
ALL = os.environ.get("PATCHSCORE_TRITON_CHECK") == "all"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
compiles = [
    needs_triton,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

INTERPRETED = (
    "error",
    # Weights that a pilot foresaw too small overflow in half floats; the tile is then done again.
    "ignore:overflow encountered in:RuntimeWarning",
    "ignore:invalid value encountered in matmul:RuntimeWarning",
    "ignore:invalid value encountered in add:RuntimeWarning",
    "ignore::DeprecationWarning",  # of NumPy and Triton, about each other
)
"""Warnings are errors: a NaN that arises in a kernel is one."""


@pytest.fixture(scope="module")
def interpreted():
    """The numerical tests, started now so that they run beside the compiler."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "fused_interpreted.py"]
    command += [word for rule in INTERPRETED for word in ("-W", rule)]
    command += [] if ALL else ["-m", "not thorough"]
    with subprocess.Popen(
        command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process
        process.kill()


# One of each kind; benchmarks/compile_report.py goes through more.
PLANS = {
    "exact": Plan(27, q_lo=27, exact=True, skip=True),
    "exact, float bank": Plan(27, q_lo=27, p_lo=27, exact=True, skip=True),
    "exact, long rows": Plan(867, q_lo=867, exact=True, skip=True),
    "split queries, skipping": Plan(27, q_lo=27, skip=True),
    "split queries": Plan(147, q_lo=147),
    "two blocks of columns": Plan(75, pilot=True),
    "rank 61": Plan(61, axes=True, pilot=True),
    "axes, eight split": Plan(147, axes=True, q_lo=8, p_lo=8, pilot=True),
    "rank 253": Plan(253, axes=True, pilot=True),
    "rank 317": Plan(317, axes=True, pilot=True),
}


def _compile(job):
    """What the compiler made of one configuration, and what is wrong with its code."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import compile_report

    capability, plan, configuration, ess = job
    kernel = compile_report.compiled(plan, 3, configuration, capability, ess)
    used, _ = compile_report.resources(kernel)
    return used | {
        "limit": compile_report.SHARED_LIMIT[capability],
        "wrong": triton_code.faults(kernel.asm["ttir"], kernel.asm["ptx"]),
    }


def compiled_jobs():
    """Every configuration with ALL, else the first of each plan, each capability in turn."""
    for number, plan in enumerate(PLANS.values()):
        for turn, capability in enumerate((90, 80, 100)):
            for ess in (False, True):
                for configuration in launch.configurations(plan, divmod(capability, 10), ess):
                    if ALL or (turn == number % 2 and not ess):
                        yield capability, plan, configuration, ess
                    if not ALL:
                        break


@pytest.mark.usefixtures("interpreted")
class TestCompiled:
    pytestmark = compiles

    def test_every_configuration_compiles_to_matrix_instructions_without_spills_and_with_64_bit_addresses(self):
        jobs = list(compiled_jobs())
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(_compile, jobs))
        for job, row in zip(jobs, found, strict=True):
            assert row["spilled_bytes"] == 0, (job, row)
            assert row["shared_bytes"] <= row["limit"], (job, row)
            assert row[{90: "wgmma", 80: "mma", 100: "tcgen05"}[job[0]]] > 0, (job, row)
            assert not row["wrong"], job

    def test_the_engines_call_compiles_with_sizes_of_one(self):
        with concurrent.futures.ProcessPoolExecutor(2) as pool:
            assert all(pool.map(_compile_as_called, [PLANS["exact"], PLANS["rank 61"]]))


def _compile_as_called(plan):
    """What Triton's JIT makes of the engine's own call, on a device that is made up: PTX with wgmma or without."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    driver.set_active(device)
    half, single = MockTensor(torch.float16), MockTensor(torch.float32)
    configuration = launch.configurations(plan, (9, 0), False)[0]
    kernel = launch._kernels().posterior_kernel.warmup(
        *(half, single, half, half, single, single),
        *(1, 1, 128, 1, 128, plan.columns, -30.0),
        **launch.kernel_constants(plan, 3, configuration, False),
        num_warps=configuration.warps,
        num_stages=configuration.stages,
        grid=(1, 1),
    )
    return "wgmma" in kernel.asm["ptx"]


@needs_triton
def test_numbers_are_the_references_under_the_interpreter(interpreted):
    output, _ = interpreted.communicate(timeout=1800)
    assert interpreted.returncode == 0, output


def test_the_kernels_keep_what_the_engine_assumes():
    for plan in PLANS.values():
        assert plan.columns % 16 == 0
        assert plan.columns >= plan.bias + BIAS_COLUMNS
        for capability in ((8, 0), (9, 0), (10, 0)):
            for configuration in launch.configurations(plan, capability, False):
                assert rows.PATCH_MULTIPLE % configuration.patches == 0
                assert launch.LARGEST_SPLIT % configuration.patches == 0
                constants = launch.kernel_constants(plan, 3, configuration, True)
                if configuration.block:
                    assert plan.columns % configuration.block == 0
                else:
                    assert constants["KA"] + constants["KB"] == plan.columns
                    for size in (constants["KA"], constants["KB"]):
                        assert size & (size - 1) == 0


def test_without_triton_the_engine_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "patchscore[gpu]" in (Fused().unavailable(torch.device("cuda")) or "")


def test_on_the_cpu_auto_passes_it_over_in_silence_and_a_named_one_warns(recwarn, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(base, "_warned", set())
    bank = ps.PatchBank(smooth_images(2, 1, 6, 6))
    z = bank.chunk(0, 1)
    assert ps.EquivariantLocalScore(bank, 3).estimate(z, 1.0).engine != "fused"
    assert not recwarn.list
    machine = ps.EquivariantLocalScore(bank, 3, engine="fused")
    assert "fused: cannot serve, it does not run on cpu" in machine.explain_choice()
    with pytest.warns(RuntimeWarning, match="'fused' cannot serve: it does not run on cpu"):
        machine.denoise(z, 1.0)


# On a GPU.

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def large_bank():
    return ps.PatchBank(smooth_images(3000, 3, 32, 32), torch.arange(3000) % 10)


def on_gpu(bank, machine, sigma, labels=None, batch=2):
    z = bank.chunk(0, batch)
    z = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    competition = machine.competition(machine.patch_size)
    bank = bank if labels is None else bank.select(labels)
    sigmas = torch.full((batch,), sigma, dtype=torch.float64)
    got = Fused().posterior_sum(z.cuda(), sigmas, bank, competition, 2**31)
    return got, Reference().posterior_sum(z.double().cuda(), sigmas, bank, competition, 2**31)


@pytest.mark.parametrize("sigma", [0.005, 0.05, 0.3, 1.0, 4.0, 30.0, 100.0])
@pytest.mark.parametrize("k", [3, 7, 17])
@pytest.mark.parametrize("mode", ["circular", "zeros"])
class TestOnGpu:
    pytestmark = gpu

    def test_numbers_are_the_references(self, large_bank, mode, k, sigma):
        got, expected = on_gpu(large_bank, ps.EquivariantLocalScore(large_bank, k, padding_mode=mode), sigma)
        assert (got.mean - expected.mean).abs().max() < 1e-3
        torch.testing.assert_close(got.ess, expected.ess, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sigma", [0.02, 1.0, 100.0])
def test_local_scores_and_classes_on_a_gpu(large_bank, sigma):
    got, expected = on_gpu(large_bank, ps.LocalScore(large_bank, 5), sigma, labels=3)
    assert (got.mean - expected.mean).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_takes_fused_on_a_gpu(large_bank):
    machine = ps.EquivariantLocalScore(large_bank, 5, "circular")
    assert machine.estimate(large_bank.chunk(0, 1, device="cuda"), 0.5).engine == "fused"
    # Corners of the zeros mode are `sliding`'s.
    machine = ps.EquivariantLocalScore(large_bank, 5, "zeros")
    assert machine.estimate(large_bank.chunk(0, 1, device="cuda"), 0.5).engine == "fused and sliding"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("mode", "k", "sigma"), [("zeros", 7, 0.5), ("circular", 3, 0.02), ("zeros", 5, 30.0)])
def test_a_cuda_graph_holds_a_dense_call(large_bank, mode, k, sigma):
    machine = ps.EquivariantLocalScore(large_bank, k, mode, engine="fused")
    first, second = (large_bank.chunk(i, i + 4, device="cuda") + 0.1 for i in (0, 4))
    z = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        machine.denoise(z, sigma)  # compiles, tunes, and keeps rows
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = machine.denoise(z, sigma)
    for other in (second, first):
        z.copy_(other)
        graph.replay()
        difference = (recorded - machine.denoise(other, sigma)).abs()
        assert difference[..., k // 2 : -(k // 2), :].max() == 0
        assert difference.max() <= 1.1e-3  # corners, which `sliding` takes where no graph records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_waits_for_the_check_of_pixels_alone(large_bank):
    machine = ps.EquivariantLocalScore(large_bank, 7, "circular", engine="fused")
    z = large_bank.chunk(0, 4, device="cuda")
    machine.denoise(z, 0.5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            machine.denoise(z, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1
