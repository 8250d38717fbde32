"""Rivals in benchmarks/peers compute what they are compared for: the same posterior mean, or the images they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import smooth_images

import patchscore as ps

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import peers
from peers import golddiff, screening, top_k, uniform

SIGMA = 0.6


def problem(k, channels=3, batch=2):
    bank = ps.PatchBank(smooth_images(5, channels, 12, 10))
    x0 = bank.chunk(0, batch)
    z = x0 + SIGMA * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    machine = ps.EquivariantLocalScore(bank, k, padding_mode="circular", engine="reference")
    return bank, z, machine.denoise(z.double(), SIGMA)


@pytest.mark.parametrize("name", [name for name in peers.EXACT if name != "attention fp32"])
@pytest.mark.parametrize(("k", "channels"), [(3, 3), (5, 1)])
def test_a_peer_that_sums_over_all_windows_has_the_posterior_mean(name, k, channels, monkeypatch):
    if name == "keops" and importlib.util.find_spec("pykeops") is None:
        pytest.skip("KeOps is not installed")
    # What compilers and GPU kernels are given is what is tested; they are torch's.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(peers.attention, "half", lambda *args: peers.attention.prepare(*args, dtype=torch.float16))
    monkeypatch.setitem(peers.gemm.CHUNK, "cpu", 96)
    monkeypatch.setitem(peers.convolution.CHUNK, "cpu", 96)
    bank, z, exact = problem(k, channels)
    prepare = peers.attention.half if name == "attention fp16" else peers.EXACT[name].prepare
    found = prepare(z, SIGMA, bank.chunk(0, len(bank)), k)()
    assert found.shape == z.shape
    # Half floats round a log-weight of at most |q| |p| / sigma^2 by 2^-11 of it.
    assert (found - exact).abs().max() < (0.05 if name in ("attention fp16", "FlexAttention") else 1e-4)


def test_peers_of_other_devices_are_left_out_in_silence_and_missing_ones_are_told():
    told = []
    serving = peers.found(torch.device("cpu"), told.append)
    assert {"attention", "gemm", "convolution"} <= set(serving)
    assert not {"attention fp16", "attention fp32", "compiled attention", "FlexAttention"} & set(serving)
    assert ("keops" in serving) != any(what.startswith("keops: ") for what in told)
    assert len(told) <= 1


@pytest.mark.parametrize(("sigma", "share"), [(0.01, 0.05), (1000.0, 0.1)])
def test_golddiff_takes_a_twentieth_at_low_noise_and_a_tenth_at_high(sigma, share):
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z = images[7] + 0.01 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = golddiff.images(z, sigma, images, torch.Generator().manual_seed(2))
    assert len(found) == len(set(found.tolist())) == round(share * 200)
    if sigma < 1:
        # All images are drawn: the nearest is among them, and nearer ones than those left out at full resolution.
        assert found[0] == 7
    else:
        assert found[0] != 7 or 7 in found


def test_subsets_are_of_the_size_asked_and_screening_finds_the_nearest():
    images = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert len(set(uniform.images(20, 50).tolist())) == 20
    assert set(screening.images(images[3:5], screening.coarse(images), 2).tolist()) == {3, 4}


def test_top_k_over_every_window_is_the_posterior_mean_of_the_interior(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    bank, z, _ = problem(3)
    index = ps.PatchIndex.build(bank, [3], tmp_path / "x.index", cells=4, progress=False)
    monkeypatch.setattr(top_k, "NEAREST", 5 * 10 * 8)  # all windows, of all cells
    found = top_k.interior_mean(z, torch.full((2,), SIGMA), index, 3, nprobe=5 * 10 * 8)
    machine = ps.EquivariantLocalScore(bank, 3, padding_mode="zeros", engine="reference")
    assert (found - machine.denoise(z.double(), SIGMA)[:, :, 1:-1, 1:-1]).abs().max() < 2e-3
