"""Engine `sliding` gives the sums of `reference` in float64, on every instruction set this machine has."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from competitions import LIMIT, assert_same, broken, circular, local
from conftest import smooth_images
from hypothesis import given, settings
from hypothesis import strategies as st

import patchscore as ps
from patchscore.engines.reference import Reference
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.windows import WHOLE_IMAGE, Axis, Competition, Group

native = pytest.importorskip("patchscore._native", reason="the C++ extension was not built")
LEVELS = native.simd_levels()


@pytest.fixture(params=LEVELS)
def simd(request, monkeypatch):
    monkeypatch.setenv("PATCHSCORE_SIMD", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compare(bank, competition, sigma, seed=1, tolerance=1e-4):
    """One noisy image per sigma around images of the bank; pixels in float32, so that both engines read the same."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
    z = x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    got = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
    expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    assert_same(got, expected, tolerance)
    return got


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("kind", [circular, broken, local])
def test_sums_are_the_references(simd, kind, k, channels):
    height, width = (11, 14) if channels % 2 else (13, 11)
    bank = ps.PatchBank(smooth_images(19, channels, height, width))
    compare(bank, kind(k, height, width), [0.05, 0.3, 2.0])


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("k", [3, 7])
def test_images_with_rows_for_columns_have_the_sums_with_rows_for_columns(simd, k, moments):
    """Groups along left and right edges are summed as those along upper and lower ones, bit for bit."""
    images = smooth_images(21, 3, 13, 18)
    sigma = torch.tensor([0.1, 1.0], dtype=torch.float64)
    z = images[:2] + torch.randn(2, 3, 13, 18, generator=torch.Generator().manual_seed(0))

    def along(z, images, locked):
        height, width = z.shape[2:]
        rows, cols = Axis(range(k // 2, height - k // 2), range(k // 2, height - k // 2)), Axis(range(k // 2), None)
        if locked == "rows":
            rows, cols = Axis(range(k // 2), None), Axis(range(k // 2, width - k // 2), range(k // 2, width - k // 2))
        competition = Competition(k, "zeros", (Group(rows, cols),))
        return SlidingCpu().posterior_sum(z, sigma, ps.PatchBank(images), competition, LIMIT, moments=moments)

    turned = along(z.mT.contiguous(), images.mT.contiguous(), "rows")
    for name, x in along(z, images, "cols").fields.items():
        assert torch.equal(x.mT, turned.fields[name]), name


@pytest.mark.parametrize("k", [13, 15, 17, 27])
def test_sums_are_the_references_where_the_window_is_larger_than_the_image(simd, k):
    bank = ps.PatchBank(smooth_images(19, 3, 14, 12))
    compare(bank, local(k, 14, 12), [0.05, 1.0])
    compare(bank, broken(k, 14, 12), [0.05, 1.0])


@pytest.mark.parametrize("kind", [circular, broken])
def test_sums_are_the_references_on_larger_images(simd, kind):
    bank = ps.PatchBank(smooth_images(5, 3, 32, 37))
    compare(bank, kind(17, 32, 37), [0.5, 4.0])


def test_images_wider_than_one_strip_give_the_references_sums():
    bank = ps.PatchBank(smooth_images(2, 1, 26, 170))
    compare(bank, circular(13, 26, 170), [1.0])


@pytest.mark.parametrize("kind", [circular, broken, local])
def test_extreme_noise_is_held(simd, kind):
    bank = ps.PatchBank(smooth_images(35, 3, 12, 10))
    compare(bank, kind(7, 12, 10), [0.005, 0.01, 0.02], tolerance=1e-3)
    compare(bank, kind(3, 12, 10), [100.0, 1e4], tolerance=1e-4)


@pytest.mark.parametrize("kind", [circular, local])
def test_mean_is_nearest_window_as_sigma_vanishes(simd, kind):
    bank = ps.PatchBank(smooth_images(35, 3, 12, 10))
    z = bank.chunk(4, 6) + 0.01 * torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    competition = kind(5, 12, 10)
    expected = Reference().posterior_sum(
        z.double(), torch.full((2,), 1e-4, dtype=torch.float64), bank, competition, LIMIT
    )
    for sigma in (1e-4, 1e-6, 1e-12):
        got = SlidingCpu().posterior_sum(z, torch.full((2,), sigma, dtype=torch.float64), bank, competition, LIMIT)
        assert (got.mean - expected.mean).abs().max() < 1e-5
    huge = SlidingCpu().posterior_sum(z, torch.full((2,), 1e9, dtype=torch.float64), bank, competition, LIMIT)
    assert (huge.ess / (35 * competition.groups[0].windows_per_image) - 1).abs().max() < 1e-4


def test_ties_share_their_weight(simd):
    image = smooth_images(1, 3, 10, 10)
    bank = ps.PatchBank(image.repeat(37, 1, 1, 1))
    got = compare(bank, local(5, 10, 10), [0.005, 0.5], tolerance=1e-5)
    assert (got.ess - 37).abs().max() < 1e-3


def test_maximum_may_rise_by_thousands_of_nats(simd):
    # Far images first: the reference moves with almost every image.
    images = torch.linspace(1, -1, 40)[:, None, None, None] * torch.ones(1, 3, 9, 9)
    bank = ps.PatchBank(images)
    z = torch.full((1, 3, 9, 9), -1.0) + 0.005 * torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.005], dtype=torch.float64)
    for competition in (local(3, 9, 9), circular(7, 9, 9), broken(3, 9, 9)):
        got = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
        assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT), 1e-3)


def flat_images(*levels):
    """One image of 10 x 13 in colour for each level."""
    return torch.tensor(levels)[:, None, None, None] * torch.ones(len(levels), 3, 10, 13)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", [circular, broken])
def test_equal_windows_far_from_z_share_their_weight(simd, kind, k, scale):
    # Float32 distances of this size differ by many nats although the windows are the same.
    bank = ps.PatchBank(flat_images(-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5))
    z = scale * torch.randn(1, 3, 10, 13, generator=torch.Generator().manual_seed(0))
    for sigma, tolerance in ((0.05, 1e-4), (0.005, 1e-3)):
        sigma = torch.tensor([sigma], dtype=torch.float64)
        got = SlidingCpu().posterior_sum(z, sigma, bank, kind(k, 10, 13), LIMIT)
        expected = Reference().posterior_sum(z.double(), sigma, bank, kind(k, 10, 13), LIMIT)
        assert (got.mean - expected.mean).abs().max() <= tolerance
        torch.testing.assert_close(got.ess, expected.ess, rtol=1e-3, atol=0)
    got = SlidingCpu().posterior_sum(z, torch.tensor([1e-4], dtype=torch.float64), bank, kind(k, 10, 13), LIMIT)
    windows = kind(k, 10, 13).groups[-1].windows_per_image * 7
    assert got.mean.abs().max() <= 0.5 + 1e-6
    assert got.ess.min() >= 1
    assert got.ess.max() <= 12 * 9 * 7 + windows


@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_no_sigma_and_no_z_gives_nan(simd, k, offset):
    bank = ps.PatchBank.open("fashion-mnist", limit=40)
    z = bank.chunk(0, 1) + 0.1 * torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + offset
    for sigma in (1e-200, 1e-5, 1e-4, 1e-3, 0.005, 0.1, 1e200):
        got = SlidingCpu().posterior_sum(
            z, torch.tensor([sigma], dtype=torch.float64), bank, circular(k, 28, 28), LIMIT
        )
        assert got.mean.abs().max() <= 1 + 1e-6
        assert ((got.ess >= 1) & (got.ess <= 40 * (29 - k) ** 2)).all()


@pytest.mark.parametrize("sigma", [0.005, 0.05, 0.5])
def test_whole_images_nearly_as_far_as_each_other_are_told_apart(simd, sigma):
    # Halftones before a grey image: all distances agree to a part in a thousand.
    generator = torch.Generator().manual_seed(0)
    images = torch.where(torch.rand(60, 3, 24, 24, generator=generator) < 0.5, 64, 191).to(torch.uint8)
    z = sigma * torch.randn(2, 3, 24, 24, generator=generator)
    for bank in (ps.PatchBank(images), ps.PatchBank(images.float() / 127.5 - 1)):
        noise = torch.full((2,), sigma, dtype=torch.float64)
        got = SlidingCpu().posterior_sum(z, noise, bank, WHOLE_IMAGE, LIMIT)
        values = bank.chunk(0, 60, torch.float64)
        logits = (z.double()[:, None] - values).square().sum((2, 3, 4)) / (-2 * sigma**2)
        expected = torch.einsum("bn,nchw->bchw", logits.softmax(1), values)
        assert (got.mean - expected).abs().max() <= (1e-4 if sigma >= 0.05 else 1e-3)


@pytest.mark.parametrize("k", [27, 29, 41])
def test_large_windows_are_exact_and_cost_what_small_ones_do(simd, k):
    # From C k^2 / 2 = 1,250 nats on, distances are float64: half as many lanes, twice the bytes.
    bank = ps.PatchBank(smooth_images(16, 3, 48, 48))

    def pairs_per_second(size):
        z = bank.chunk(0, 1) + torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        times = []
        for _ in range(3):
            start = time.process_time()
            got = SlidingCpu().posterior_sum(z, torch.ones(1, dtype=torch.float64), bank, circular(size, 48, 48), LIMIT)
            times.append(time.process_time() - start)
        return got, circular(size, 48, 48).pairs_per_image * 16 / min(times)

    got, rate = pairs_per_second(k)
    # Diagonals of k - 1 steps beyond the windows are the same work for fewer pairs.
    overhead = (48 / (49 - k)) ** 2 / (48 / (49 - 19)) ** 2
    assert rate * max(1, overhead) > pairs_per_second(19)[1] / 6
    z = bank.chunk(0, 1) + torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    competition = circular(k, 48, 48)
    expected = Reference().posterior_sum(z.double(), torch.ones(1).double(), bank, competition, LIMIT)
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("kind", [circular, broken])
@pytest.mark.parametrize("images", [1, 2, 5, 9])
def test_few_images_are_cut_into_tiles(simd, kind, images):
    bank = ps.PatchBank(smooth_images(images, 3, 33, 26))
    for k in (1, 3, 7):
        compare(bank, kind(k, 33, 26), [0.05, 1.0])
    compare(ps.PatchBank(bank.chunk(0, images)), kind(5, 33, 26), [0.3])


def test_one_image_fills_the_lanes(simd):
    # 0.7 pairs for one of a bank of sixteen is the aim at 256 x 256, where tiles overlap less.
    images = smooth_images(16, 1, 64, 64)

    def pairs_per_second(bank):
        times = []
        for _ in range(3):
            start = time.process_time()
            SlidingCpu().posterior_sum(bank.chunk(0, 1) + 0.5, torch.ones(1).double(), bank, circular(9, 64, 64), LIMIT)
            times.append(time.process_time() - start)
        return len(bank) / min(times)

    assert pairs_per_second(ps.PatchBank(images[:1])) > 0.5 * pairs_per_second(ps.PatchBank(images))


@pytest.mark.parametrize("images", [1, 3, 16, 33, 150])
def test_whole_images_are_the_references(simd, images):
    bank = ps.PatchBank(smooth_images(images, 3, 9, 7))
    compare(bank, WHOLE_IMAGE, [0.005, 0.05, 1.0, 50.0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("competition", [circular(3, 10, 12), local(9, 10, 12), WHOLE_IMAGE])
def test_selections_and_dtypes_read_the_same_pixels(simd, dtype, competition):
    labels = torch.arange(50) % 3
    bank = ps.PatchBank(smooth_images(50, 3, 10, 12, dtype=dtype), labels).select(1)
    compare(bank, competition, [0.1, 1.0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_product_of_axes_gives_the_references_sums(data):
    k = data.draw(st.sampled_from([1, 3, 5, 7]))
    mode = data.draw(st.sampled_from(["zeros", "circular"]))

    def part(size):
        first = data.draw(st.integers(0, size - 1))
        return range(first, data.draw(st.integers(first + 1, size)))

    def axis(size):
        inner = part(size - k + 1)
        inside = range(inner.start + k // 2, inner.stop + k // 2)
        return Axis(inside) if data.draw(st.booleans()) else Axis(part(size), inside)

    height, width = data.draw(st.integers(k, 12)), data.draw(st.integers(k, 12))
    competition = Competition(k, mode, (Group(axis(height), axis(width)),))
    bank = ps.PatchBank(smooth_images(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4)), height, width))
    z = bank.chunk(0, 1) + 0.3
    sigma = torch.tensor([0.4], dtype=torch.float64)
    got = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
    expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    served = expected.s > 0
    assert torch.equal(served, got.s > 0)
    assert (got.mean - expected.mean)[served.expand_as(got.v)].abs().max() < 1e-4


@pytest.mark.parametrize("competition", [circular(3, 12, 10), broken(7, 12, 10), local(5, 12, 10), WHOLE_IMAGE])
def test_numbers_do_not_depend_on_threads_batch_or_memory(simd, threads, competition):
    bank = ps.PatchBank(smooth_images(200, 3, 12, 10))
    sigma = torch.tensor([0.05, 0.4, 3.0, 0.2, 0.1, 1.0], dtype=torch.float64)
    z = bank.chunk(0, 6) + sigma.float()[:, None, None, None] * torch.randn(6, 3, 12, 10)
    threads(1)
    expected = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
    for count, items, limit in ((2, slice(None), LIMIT), (3, slice(1, 4), LIMIT), (2, slice(5, 6), 4 * 2**20)):
        threads(count)
        got = SlidingCpu().posterior_sum(z[items], sigma[items], bank, competition, limit)
        for a, b in ((got.m, expected.m), (got.s, expected.s), (got.v, expected.v), (got.s2, expected.s2)):
            assert torch.equal(a, b[items])


def assert_each_is_alone(z, sigma, bank, competitions, limit=LIMIT):
    together = SlidingCpu().posterior_sums(z, sigma, bank, competitions, limit)
    assert len(together) == len(competitions)
    for got, competition in zip(together, competitions, strict=True):
        alone = SlidingCpu().posterior_sum(z, sigma, bank, competition, LIMIT)
        for a, b in ((got.m, alone.m), (got.s, alone.s), (got.v, alone.v), (got.s2, alone.s2)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("kind", [circular, broken, local])
def test_several_sizes_at_once_are_those_alone(simd, threads, kind, channels):
    threads(2)
    height, width = (13, 11) if channels % 2 else (11, 14)
    bank = ps.PatchBank(smooth_images(75, channels, height, width), torch.arange(75) % 2).select(1)
    sigma = torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
    z = bank.chunk(0, 3) + sigma.float()[:, None, None, None] * torch.randn(3, channels, height, width)
    assert_each_is_alone(z, sigma, bank, [kind(k, height, width) for k in (7, 1, 3, 11, 5, 3)])


def test_several_sizes_may_be_of_different_machines():
    bank = ps.PatchBank(smooth_images(40, 3, 12, 10))
    z, sigma = bank.chunk(0, 2) + 0.3, torch.tensor([0.2, 1.0], dtype=torch.float64)
    assert_each_is_alone(
        z, sigma, bank, [circular(3, 12, 10), WHOLE_IMAGE, local(21, 12, 10), broken(5, 12, 10), WHOLE_IMAGE]
    )
    assert SlidingCpu().posterior_sums(z, sigma, bank, [], LIMIT) == []


def test_several_sizes_that_do_not_fit_together_take_turns():
    bank = ps.PatchBank(smooth_images(40, 3, 24, 24))
    z, sigma = bank.chunk(0, 1) + 0.3, torch.tensor([0.5], dtype=torch.float64)
    competitions = [circular(k, 24, 24) for k in (3, 5, 7, 9)]
    for limit in (2**20, 2 * 2**20, 4 * 2**20):
        assert_each_is_alone(z, sigma, bank, competitions, limit)
    with pytest.raises(ValueError, match="memory_limit"):
        SlidingCpu().posterior_sums(z, sigma, bank, competitions, 2**18)


def test_float64_input_is_taken():
    bank = ps.PatchBank(smooth_images(5, 1, 8, 8))
    z = bank.chunk(0, 1, torch.float64)
    sums = SlidingCpu().posterior_sum(z, torch.ones(1, dtype=torch.float64), bank, local(3, 8, 8), LIMIT)
    assert sums.v.dtype == torch.float64
    assert z.dtype == torch.float64


def test_memory_limit_too_small_for_one_thread_is_refused():
    bank = ps.PatchBank(smooth_images(5, 3, 32, 32))
    with pytest.raises(ValueError, match="memory_limit"):
        SlidingCpu().posterior_sum(bank.chunk(0, 1), torch.ones(1).double(), bank, circular(17, 32, 32), 10_000)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("PATCHSCORE_SIMD", "mmx")
    bank = ps.PatchBank(smooth_images(5, 1, 8, 8))
    with pytest.raises(ValueError, match=r"PATCHSCORE_SIMD.*mmx.*plain"):
        SlidingCpu().posterior_sum(bank.chunk(0, 1), torch.ones(1).double(), bank, local(3, 8, 8), LIMIT)


def test_without_the_extension_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(
        "patchscore.engines.sliding.cpu.missing",
        "the C++ extension was not built (No module named 'patchscore._native')",
    )
    assert "not built" in (SlidingCpu().unavailable(torch.device("cpu")) or "")


def test_other_devices_are_declined():
    engine = SlidingCpu()
    assert engine.unavailable(torch.device("cpu")) is None
    assert engine.runs_on(torch.device("cpu"))
    assert not engine.runs_on(torch.device("mps"))


def native_arguments(**changes):
    """Arguments the native module takes for one competition, but for `changes`."""
    shape = (1, 3, 6, 5)
    arguments = {
        "z": np.zeros(shape, np.float32),
        "sigma": np.ones(1),
        "images": np.zeros((4, 3, 6, 5), np.uint8),
        "indices": None,
        "patch_size": 3,
        "circular": False,
        "groups": np.array([[1, 5, 1, 5, 1, 4, 1, 4]], np.int64),
        "m": np.full((1, 1, 6, 5), -np.inf),
        "s": np.zeros((1, 1, 6, 5)),
        "s2": np.zeros((1, 1, 6, 5)),
        "v": np.zeros(shape),
        "v2": None,
        "sl": None,
        "threads": 1,
        "memory_limit": LIMIT,
        "simd": "",
    } | changes
    of_competition = ("patch_size", "circular", "groups", "m", "s", "s2", "v", "v2", "sl")
    return arguments | {"competitions": [tuple(arguments.pop(name) for name in of_competition)]}


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(shape, dtype):
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1, np.uint8)
    return raw[1:].view(dtype).reshape(shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"z": np.zeros((1, 3, 6, 5))},
        {"z": np.zeros((3, 6, 5), np.float32)},
        {"z": np.zeros((1, 3, 6, 0), np.float32)},
        {"z": np.zeros((1, 3, 6, 10), np.float32)[..., ::2]},
        {"z": np.zeros((1, 3, 5, 6), np.float32).swapaxes(2, 3)},
        {"z": unaligned((1, 3, 6, 5), np.float32)},
        {"z": np.full((1, 3, 6, 5), np.nan, np.float32)},
        {"z": np.full((1, 3, 6, 5), np.inf, np.float32)},
        {"sigma": np.ones(2)},
        {"sigma": np.ones(1, np.float32)},
        {"sigma": np.zeros(1)},
        {"sigma": np.array([np.nan])},
        {"images": np.zeros((4, 1, 6, 5), np.uint8)},
        {"images": np.zeros((0, 3, 6, 5), np.uint8)},
        {"images": np.zeros((4, 3, 6, 5), np.int8)},
        {"images": np.zeros((4, 3, 6, 5), np.float64)},
        {"images": np.zeros((8, 3, 6, 5), np.uint8)[::2]},
        {"indices": np.array([0, 4])},
        {"indices": np.array([-1])},
        {"indices": np.array([0], np.int32)},
        {"indices": np.array([], np.int64)},
        {"patch_size": 2},
        {"patch_size": -3},
        {"patch_size": 99},
        {"patch_size": 5},
        {"groups": np.zeros((1, 7), np.int64)},
        {"groups": np.array([[0, 7, 1, 5, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[2, 2, 1, 5, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[1, 5, 0, 5, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[1, 5, 1, 6, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[1, 5, 3, 3, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[1, 2**40, 1, 5, 1, 4, 1, 4]], np.int64)},
        {"groups": np.array([[0, 5, -1, -1, 1, 4, 1, 4]], np.int64), "circular": True},
        {"m": np.zeros((1, 1, 6, 4))},
        {"s": np.zeros((1, 1, 6, 5), np.float32)},
        {"v": np.zeros((1, 1, 6, 5))},
        {"v": read_only(np.zeros((1, 3, 6, 5)))},
        {"v2": np.zeros((1, 3, 6, 5))},
        {"v2": np.zeros((1, 1, 6, 5)), "sl": np.zeros((1, 1, 6, 5))},
        {"v2": np.zeros((1, 3, 6, 5)), "sl": np.zeros((1, 1, 6, 4))},
        {"memory_limit": 10},
        {"simd": "neon"},
    ],
)
def test_arguments_that_do_not_fit_are_value_errors(changes):
    native.sliding(**native_arguments())
    with pytest.raises((ValueError, BufferError)):
        native.sliding(**native_arguments(**changes))


def test_interrupt_stops_within_a_second():
    script = """
import torch, patchscore as ps
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.windows import Axis, Competition, Group
bank = ps.PatchBank(torch.zeros(20000, 3, 32, 32, dtype=torch.uint8))
axis = Axis(range(32), range(1, 31))
torch.set_num_threads(2)
print("started", flush=True)
try:
    SlidingCpu().posterior_sum(torch.zeros(4, 3, 32, 32), torch.ones(4).double(), bank,
                          Competition(3, "circular", (Group(axis, axis),)), 2**30)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - start < 1
    process.wait(timeout=10)
