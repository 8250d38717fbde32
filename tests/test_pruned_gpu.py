"""The GPU backend of `pruned`: its kernels interpreted and compiled, the engine on it, and numbers on a GPU.

Whoever has no Triton skips what needs it; whoever has no GPU skips what is marked so. test_pruned.py holds the backend,
with kernels in plain torch (plain_pruned.py), to the contract of the definition and of the CPU's scan.
"""

import concurrent.futures
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_code
from conftest import noisy, smooth_images
from plain_pruned import plain_kernels

import patchscore as ps
from patchscore import native
from patchscore.engines import base, device
from patchscore.engines.pruned import engine, gpu
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.pruned.policy import POLICY
from patchscore.engines.pruned.request import Request

pytest.importorskip("faiss")
if native.missing:
    pytest.skip("the C++ extension was not built", allow_module_level=True)

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ALL = os.environ.get("PATCHSCORE_TRITON_CHECK") == "all"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    bank = ps.PatchBank(smooth_images(200, 3, 10, 10), torch.arange(200) % 2)
    return bank, ps.PatchIndex.build(bank, [3, 5], tmp_path_factory.mktemp("index"), cells=64, progress=False)


@pytest.fixture
def backend():
    """The engine asks the GPU backend, with plain kernels, for images on the CPU."""
    with plain_kernels(), mock.patch.object(Pruned, "_scan", lambda self, request: gpu.scan(request, self.policy)):
        yield
    device.cache.clear()


def pruned(bank, index, k=3, **options):
    return ps.EquivariantLocalScore(bank, k, engine="pruned", index=index, **options)


def exact(bank, k=3):
    return ps.EquivariantLocalScore(bank, k, engine="sliding")


# The kernels.


@needs_triton
def test_the_kernels_are_the_plain_ones_under_the_interpreter():
    rules = ("error", "ignore::DeprecationWarning")  # of NumPy and Triton, about each other
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "pruned_interpreted.py"]
    found = subprocess.run(
        command + [word for rule in rules for word in ("-W", rule)] + ([] if ALL else ["-m", "not thorough"]),
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def _compile(job):
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import compile_report

    capability, name, variant = job
    kernel = compile_report.compiled_pruned(name, variant, capability)
    used, _ = compile_report.resources(kernel)
    return used | {
        "limit": compile_report.SHARED_LIMIT[capability],
        "wrong": triton_code.faults(kernel.asm["ttir"], kernel.asm["ptx"]),
    }


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
def test_every_kernel_compiles_without_spills_and_with_64_bit_addresses():
    jobs = [
        (capability, name, variant)
        for turn, (name, variant) in enumerate([("plan", 0), ("scan", 0), ("scan", 1), ("score", 0), ("scan", 2)])
        for capability in (90, 80, 100)
        if ALL or (turn < 3 and capability == (90, 80, 100)[turn])
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for job, row in zip(jobs, pool.map(_compile, jobs), strict=True):
            assert row["spilled_bytes"] <= 16, (job, row)  # two registers, outside of the loops
            assert row["shared_bytes"] <= row["limit"], (job, row)
            assert not row["wrong"], job


# The engine on it.


@pytest.mark.parametrize(("k", "sigma", "budget"), [(3, 1.0, 0.05), (5, 4.0, 0.1)])
def test_estimates_come_with_errors_that_cover(indexed, backend, k, sigma, budget):
    bank, index = indexed
    z = noisy(bank, sigma, 2, dtype=torch.float32)
    found = pruned(bank, index, k, budget=budget).estimate(z, sigma)
    away = (found.mean - exact(bank, k).denoise(z, sigma)).abs()
    r = k // 2
    assert found.engine.startswith("pruned")
    assert found.stderr[..., r:-r, r:-r].max() > 0
    # The promise of two standard errors, 93% of pixels, less what 2 x 3 x 10^2 correlated ones can scatter.
    assert (away <= 2 * found.stderr + 1e-4).float().mean() >= 0.9
    assert away.max() <= 6 * found.stderr.max() + 1e-4


def request_of(bank, index, budget, **changes):
    """Of the pixels of the interior, k = 3, at sigma = 1."""
    part, machine = index.at(3), ps.EquivariantLocalScore(bank, 3)
    (group,) = (g for g in machine.competition(3).groups if not g.rows.locked and not g.cols.locked)
    windows = engine._windows(noisy(bank, 1.0, dtype=torch.float32)[0], 3, "zeros", group)
    request = Request(part, windows, 1.0, None, len(part.ids), budget, 1, len(group.cols.queries))
    return dataclasses.replace(request, **changes)


def test_no_window_is_known_twice(indexed):
    """Two neighbours may propose the same one, and a third may remember it."""
    request = request_of(*indexed, 0.05)
    request = dataclasses.replace(request, remembered=torch.full((len(request.windows), 16), -1))
    with plain_kernels():
        first = gpu.scan(request, POLICY).remembered
        second = gpu.scan(dataclasses.replace(request, remembered=first), POLICY).remembered
    device.cache.clear()
    for known in (first, second):
        assert (known >= 0).all()
        assert all(len(set(ids)) == len(ids) for ids in known.tolist())


def test_every_window_is_counted_once(indexed):
    """Visits begin anywhere in a cell and wrap around, and most cells' last tile is not full."""
    request = request_of(*indexed, None, columns=0)
    request = dataclasses.replace(request, windows=request.windows[:4])
    with plain_kernels():
        found = gpu.scan(request, POLICY)
    device.cache.clear()
    assert found.sums.pairs == 4 * request.competing
    assert found.sums.stderr.max() == 0


def test_alone_and_in_a_batch_the_same(indexed, backend):
    bank, index = indexed
    z = noisy(bank, 1.0, 2, dtype=torch.float32)
    machine = pruned(bank, index, budget=0.03)
    together = machine.estimate(z, 1.0)
    assert together.stderr.max() > 0
    for item in range(2):
        alone = machine.estimate(z[item : item + 1], 1.0)
        assert torch.equal(alone.mean[0], together.mean[item])
        assert torch.equal(alone.stderr[0], together.stderr[item])


def test_little_memory_changes_no_number(indexed, backend):
    bank, index = indexed
    z = noisy(bank, 1.0, dtype=torch.float32)
    much, little = (pruned(bank, index, budget=0.03, memory_limit=limit).estimate(z, 1.0) for limit in (2**30, 2**21))
    assert much.stderr.max() > 0
    assert torch.equal(much.mean, little.mean)


def test_classes_compete_and_a_tolerance_is_met(indexed, backend):
    bank, index = indexed
    z = noisy(bank, 1.0, dtype=torch.float32)
    label = pruned(bank, index, budget=0.15).estimate(z, 1.5, labels=1)
    truth = exact(bank).denoise(z, 1.5, labels=1)
    assert label.stderr.max() > 0
    assert (label.mean - truth).square().mean().sqrt() <= 3 * label.stderr.square().mean().sqrt()
    found = pruned(bank, index, tolerance=0.05).estimate(z, 1.0)
    assert 0 < found.stderr[..., 1:-1, 1:-1].square().mean().sqrt() <= 0.05
    assert (found.mean - exact(bank).denoise(z, 1.0)).square().mean().sqrt() <= 2 * 0.05


def test_a_trajectory_is_followed(indexed, backend):
    bank, index = indexed
    machine, z = pruned(bank, index, budget=0.05), noisy(bank, 1.0, dtype=torch.float32)
    follower = machine.following()
    first, second = follower.estimate(z, 1.0), follower.estimate(z, 0.9)
    assert any((held._centres >= 0).any() for held in follower.pruned.memory._held.values())
    assert torch.equal(first.mean, machine.estimate(z, 1.0).mean)
    assert not torch.equal(second.mean, machine.estimate(z, 0.9).mean)


def test_pixels_unlike_the_bank_are_not_silently_wrong(indexed, backend):
    bank, index = indexed
    z = 3 * torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 1.0):
        found = pruned(bank, index, budget=0.01).estimate(z, sigma)
        away = (found.mean - exact(bank).denoise(z, sigma)).abs()
        assert ((away > 0.1) & (found.stderr < 0.02)).sum() == 0


def test_a_kernel_that_does_not_compile_leaves_the_sums_to_the_next_engine(indexed, backend, monkeypatch):
    bank, index = indexed
    machine, z = pruned(bank, index, budget=0.1), noisy(bank, 0.5, dtype=torch.float32)

    def refuse(*given, **constants):
        raise gpu.KernelError("no such instruction")

    monkeypatch.setattr(gpu, "started", refuse)
    monkeypatch.setattr(gpu, "_broken", None)
    monkeypatch.setattr(base, "_warned", set())
    with pytest.warns(RuntimeWarning, match="a kernel failed to compile .no such instruction."):
        found = machine.estimate(z, 0.5)
    assert "pruned" not in found.engine
    assert "no such instruction" in (gpu.missing(torch.device("cpu")) or "")


# On a GPU.


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
class TestOnGpu:
    pytestmark = on_gpu

    def test_scans_are_those_of_the_plain_kernels_on_the_cpu(self, indexed, k, sigma, monkeypatch):
        bank, index = indexed
        z = noisy(bank, sigma, dtype=torch.float32)
        machine = pruned(bank, index, k, budget=0.05)
        found = machine.estimate(z.cuda(), sigma)
        assert found.engine.startswith("pruned")
        with plain_kernels():
            monkeypatch.setattr(Pruned, "_scan", lambda self, request: gpu.scan(request, self.policy))
            plain = machine.estimate(z, sigma)
        # Few plans differ, by a tile where a cell stands on a threshold: they share nearly all of their draws.
        away = (found.mean.cpu() - plain.mean).abs()
        assert away.median() <= 1e-4
        assert away.square().mean().sqrt() <= plain.stderr.square().mean().sqrt()

    def test_seeds_decide(self, indexed, k, sigma):
        bank, index = indexed
        z = noisy(bank, sigma, 2, dtype=torch.float32).cuda()
        machine = pruned(bank, index, k, budget=0.05)
        together, alone = machine.estimate(z, sigma), machine.estimate(z[1:], sigma)
        assert torch.equal(together.mean[1:], alone.mean)

    def test_errors_cover(self, indexed, k, sigma):
        bank, index = indexed
        z = noisy(bank, sigma, 4, dtype=torch.float32)
        found = pruned(bank, index, k, budget=0.1).estimate(z.cuda(), sigma)
        away = (found.mean.cpu() - exact(bank, k).denoise(z, sigma)).abs()
        assert (away <= 2 * found.stderr.cpu() + 1e-3).float().mean() >= 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_whole_images_are_drawn_on_a_gpu(indexed):
    bank, _ = indexed
    z = noisy(bank, 2.0, dtype=torch.float32)
    machine = ps.EquivariantLocalScore(bank, 3, engine="pruned", budget=0.5)
    found, truth = machine.estimate(z.cuda(), 2.0), exact(bank).denoise(z, 2.0)
    assert found.mean.is_cuda
    assert ((found.mean.cpu() - truth).abs() <= 4 * found.stderr.cpu() + 1e-3).float().mean() >= 0.98


def test_how_long_a_gpu_takes_grows_with_cells_and_budget(indexed):
    bank, index = indexed
    sigma, competition = torch.ones(1), exact(bank).competition(3)
    interior = competition.only([g for g in competition.groups if not g.rows.locked and not g.cols.locked])
    z = mock.Mock(device=torch.device("cuda"), __len__=lambda self: 1)
    z.__len__ = lambda self: 1
    small, large = (Pruned(index, budget, None, 0).seconds(z, sigma, bank, interior) for budget in (0.01, 0.02))
    assert POLICY.gpu_call_seconds < small < large
