"""What a call on a GPU launches and waits for, counted without one.

The device `meta` stands for the GPU: its tensors have shapes and no numbers, so whatever asks the device for one, and
would make the host wait, raises here. Kernels of Triton are replaced by counters.
"""

import functools
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import smooth_images
from torch.utils._python_dispatch import TorchDispatchMode

import patchscore as ps
from patchscore import checks, denoiser
from patchscore.engines import autotune as tuning
from patchscore.engines import device as devices
from patchscore.engines.fused import launch as fused

META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Counts operations that start something on the device, and copies to it."""

    def __init__(self):
        super().__init__()
        self.operations, self.copies = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device == META and not function.is_view:
            self.operations += 1
            self.copies += "copy" in str(function) and any(x.device != META for x in tensors)
        return result


@pytest.fixture
def launches(monkeypatch):
    """Launches of each kernel."""
    counted = Counter()

    class Kernels:
        HEADROOM, LEAST, COUNT_UNIT = (SimpleNamespace(value=x) for x in (14.0, -1e30, 1024.0))

        def __getattr__(self, name):
            def start(*arguments, **constants):
                counted[name] += 1

            return defaultdict(lambda: start)

    spectrum_of = fused.spectrum_of

    @functools.cache
    def spectrum_there(bank, k, device):
        found = spectrum_of(bank, k, torch.device("cpu"))
        return replace(found, mean=found.mean.to(device), axes=found.axes.to(device))

    monkeypatch.setattr(fused, "_kernels", Kernels)
    monkeypatch.setattr(fused.Fused, "runs_on", lambda self, device: True)
    monkeypatch.setattr(fused.Fused, "unavailable", lambda self, device: None)
    # Corners go to `sliding` on a GPU; here no engine but this one knows the device.
    monkeypatch.setattr(fused.Fused, "lacks", lambda self, *asked: None)
    monkeypatch.setattr(fused, "spectrum_of", spectrum_there)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(denoiser, "_recording", lambda device: True)
    monkeypatch.setattr(checks, "device", torch.device)
    yield counted
    devices.cache.clear()


def watched(work):
    """After a first call, which keeps rows."""
    work()
    with Watch() as watch:
        work()
    return watch


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_dense_call_reads_nothing_back_and_launches_as_often_whatever_the_batch_and_the_bank(launches, mode):
    found = []
    for images, batch in ((20, 2), (60, 16)):
        bank = ps.PatchBank(smooth_images(images, 3, 12, 12))
        machine = ps.EquivariantLocalScore(bank, 5, mode, engine="fused")
        z = torch.empty(batch, 3, 12, 12, device=META)
        watch = watched(lambda machine=machine, z=z: machine.denoise(z, 0.5))
        assert watch.copies == 0
        found.append((watch.operations, launches.pop("posterior_kernel")))
    assert found[0] == found[1]
    assert found[0][1] == 2 * (9 if mode == "zeros" else 1)  # of two calls
    assert found[0][0] < (1000 if mode == "zeros" else 150)


def test_a_sample_reads_nothing_back_and_launches_so_often_a_step(launches):
    bank = ps.PatchBank(smooth_images(20, 3, 12, 12))
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable.constant(3), engine="fused")

    def work(steps):
        launches.clear()
        watch = watched(lambda: ps.sample(machine, n=16, steps=steps, device="meta", progress=False))
        return watch.operations, launches["posterior_kernel"] / 2, watch.copies

    (few, kernels, copies), (many, more_kernels, more_copies) = work(3), work(8)
    assert (kernels, more_kernels) == (2 * 9, 7 * 9)
    assert copies == more_copies == 1  # the first noise
    assert (many - few) / 5 < 1000
