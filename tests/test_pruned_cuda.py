"""The GPU half of `pruned`: numbers under Triton's interpreter, code for sm_80 and sm_90, the choice, and a GPU's turn.

Whoever has no Triton or no FAISS skips; whoever has no GPU skips what is marked so.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore import engines
from patchscore.engines import native
from patchscore.engines.fused import launch as fused
from patchscore.engines.pruned import device_index as lists_rows
from patchscore.engines.pruned import triton as pruned_cuda
from patchscore.engines.pruned.device_index import COLUMNS
from patchscore.engines.pruned.triton import TILE
from patchscore.engines.sliding import cuda as sliding_cuda

HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is not installed")
compiles = [
    needs_triton,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import compile_report

    return compile_report


@needs_triton
@needs_faiss
def test_numbers_are_the_references_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-p", "no:cacheprovider", "pruned_interpreted.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout


class TestCompiled:
    pytestmark = compiles

    @pytest.mark.parametrize("capability", [80, 90])
    def test_every_scan_multiplies_in_matrix_units_and_spills_nothing(self, report, capability):
        jobs = [job for job in report.scan_jobs() if job[2] == capability]
        assert {job[0] for job in jobs} == set(COLUMNS)
        for columns, configuration, _, variant in jobs:
            row = report.report_scan(columns, configuration, capability, variant)
            assert row["spilled_bytes"] == 0, row
            assert row["shared_bytes"] <= report.SHARED_LIMIT[capability], row
            assert row["wgmma" if capability == 90 else "mma"] > 0, row

    @pytest.mark.parametrize("capability", [80, 90])
    def test_every_other_kernel_spills_nothing(self, report, capability):
        for name in report.LISTS:
            row = report.report_list(name, capability)
            assert row["spilled_bytes"] == 0, row
            assert row["shared_bytes"] <= report.SHARED_LIMIT[capability], row


def test_sizes_are_what_the_kernels_assume():
    for columns in COLUMNS:
        larger = 1 << (columns.bit_length() - 1)
        rest = columns - larger
        assert rest & (rest - 1) == 0
        assert columns % 16 == 0
        for capability in ((8, 0), (9, 0), (10, 0)):
            assert all(
                configuration.patches == TILE for configuration in pruned_cuda.configurations(columns, capability)
            )
    for channels in (1, 2, 3, 4):
        assert lists_rows.value_columns(channels) >= 2 + 3 * channels
        assert lists_rows.moment_columns(channels) >= 1 + 2 * channels


# The choice.


@pytest.fixture
def indexed(tmp_path):
    pytest.importorskip("faiss")
    bank = ps.PatchBank(smooth_images(8, 3, 9, 9))
    return bank, ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)


@pytest.fixture
def on_cuda(monkeypatch):
    """As if there were a GPU on which all engines could be asked."""
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    monkeypatch.setattr(fused, "_broken", None)
    monkeypatch.setattr(pruned_cuda, "_broken", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sliding_cuda, "unavailable", lambda: None)


def chosen(machine):
    """As `machine.engine_on("cuda")`, which asks for a GPU."""
    return engines.chosen(machine.engines, machine.engine, CUDA, torch.float32).name


def explained(machine):
    return engines.explain_choice(machine.engines, machine.engine, CUDA, torch.float32)


def test_auto_on_cuda_is_fused_and_with_an_index_and_a_budget_pruned(indexed, on_cuda, recwarn):
    bank, index = indexed
    assert chosen(ps.EquivariantLocalScore(bank, 3)) == "fused"
    assert chosen(ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)) == "pruned"
    assert chosen(ps.EquivariantLocalScore(bank, 3, engine="fused", index=index, budget=0.1)) == "fused"
    assert not recwarn.list


def test_without_triton_the_next_engine_serves(indexed, on_cuda, monkeypatch):
    bank, index = indexed

    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(fused, "_kernels", missing)
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)
    assert chosen(machine) == "sliding"
    assert "pruned: cannot serve, Triton is missing" in explained(machine)


def test_after_a_failed_compile_the_next_engine_serves(indexed, on_cuda, monkeypatch):
    bank, index = indexed
    monkeypatch.setattr(pruned_cuda, "_broken", "its kernel failed to compile (ptxas died)")
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)
    assert chosen(machine) == "fused"
    assert "pruned: cannot serve, its kernel failed to compile (ptxas died)" in explained(machine)


def test_more_channels_than_it_takes_are_named(tmp_path, on_cuda):
    pytest.importorskip("faiss")
    bank = ps.PatchBank(smooth_images(6, 5, 9, 9))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    machine = ps.EquivariantLocalScore(bank, 3, index=index, budget=0.1)
    assert chosen(machine) == "fused"
    assert "up to 4 channels, not 5" in explained(machine)


# On a GPU.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    pytest.importorskip("faiss")
    bank = ps.PatchBank(smooth_images(2000, 3, 32, 32), torch.arange(2000) % 10)
    return bank, ps.PatchIndex.build(bank, [3, 7, 17], tmp_path_factory.mktemp("index"), progress=False)


def _rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("mode", ["circular", "zeros"])
    @pytest.mark.parametrize(("k", "sigma"), [(3, 0.05), (3, 0.3), (7, 1.0), (17, 4.0), (7, 30.0)])
    def test_estimates_agree_with_the_exact_engine(self, large, mode, k, sigma):
        bank, index = large
        z = noisy(bank, sigma, 4, dtype=torch.float32).cuda()
        exact = ps.EquivariantLocalScore(bank, k, mode, engine="fused").estimate(z, sigma)
        for budget in (1.0, 0.03):
            machine = ps.EquivariantLocalScore(bank, k, mode, index=index, budget=budget)
            found = machine.estimate(z, sigma)
            assert found.engine in ("pruned", "pruned and sliding")  # corners are exact
            error = found.mean - exact.mean
            assert (error.abs() <= 3 * found.stderr + 1e-3).float().mean() > 0.9
            assert _rms(error) < (0.02 if budget == 1 else 0.1)
        assert found.pairs < 0.1 * exact.pairs

    def test_classes_and_a_tolerance(self, large):
        bank, index = large
        z = noisy(bank, 1.0, 4, dtype=torch.float32).cuda()
        exact = ps.EquivariantLocalScore(bank, 7, engine="fused").denoise(z, 1.0, labels=3)
        found = ps.EquivariantLocalScore(bank, 7, index=index, tolerance=0.02).estimate(z, 1.0, labels=3)
        assert _rms(found.mean - exact) < 0.03

    def test_the_same_seed_gives_the_same_numbers(self, large):
        bank, index = large
        z = noisy(bank, 1.0, 4, dtype=torch.float32).cuda()
        machine = ps.EquivariantLocalScore(bank, 7, index=index, budget=0.02, seed=5)
        first = machine.estimate(z, 1.0)
        for _ in range(3):
            again = machine.estimate(z, 1.0)
            assert torch.equal(first.mean, again.mean)
            assert torch.equal(first.stderr, again.stderr)

    def test_the_host_waits_once_a_part(self, large):
        bank, index = large
        z = noisy(bank, 1.0, 4, dtype=torch.float32).cuda()
        machine = ps.EquivariantLocalScore(bank, 7, "circular", index=index, budget=0.02)
        competition = machine.competition(7)
        sigma = torch.ones(4, dtype=torch.float64)
        machine.pruned.posterior_sum(z, sigma, bank, competition, 2**32)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                machine.pruned.posterior_sum(z, sigma, bank, competition, 2**32)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # The length of the list, and tables of a few numbers that are copied to the device.
        assert sum("synchroniz" in str(warning.message) for warning in caught) < 12

    def test_it_agrees_with_the_scan_on_the_cpu(self, large):
        if native.missing:
            pytest.skip("the C++ extension was not built")
        bank, index = large
        z = noisy(bank, 1.0, 2, dtype=torch.float32)
        machine = ps.EquivariantLocalScore(bank, 7, index=index, budget=0.05)
        here, there = machine.estimate(z.cuda(), 1.0), machine.estimate(z, 1.0)
        spread = (here.stderr.cpu().square() + there.stderr.square()).sqrt()
        assert ((here.mean.cpu() - there.mean).abs() <= 3 * spread + 1e-3).float().mean() > 0.9
