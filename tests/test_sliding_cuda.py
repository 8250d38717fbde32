"""The CUDA kernels give the sums of `reference`: as plain C++ where there is no GPU (tests/emulation), and on one."""

import os
import re
import shutil
import subprocess
import sys
import threading

import emulated
import pytest
import torch
from competitions import LIMIT, assert_same, assert_same_moments, broken, circular, local
from conftest import smooth_images

import patchscore as ps
from patchscore.engines import EngineError
from patchscore.engines import device as resident
from patchscore.engines.reference import Reference
from patchscore.engines.sliding import cuda as sliding_cuda
from patchscore.windows import WHOLE_IMAGE, Axis, Competition, Group

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EVERYTHING = os.environ.get("PATCHSCORE_EMULATE") == "all"  # more shapes and orders, some minutes: make emulate
ORDERS = ["0", "1", "random"] if EVERYTHING else ["random"]


@pytest.fixture(scope="session")
def emulated_library(pytestconfig):
    path = emulated.build(pytestconfig.cache.mkdir("emulated"))
    if path is None:
        pytest.skip("no C++ compiler")
    return emulated.load(path)


@pytest.fixture(params=ORDERS)
def kernels(request, emulated_library, monkeypatch):
    """The emulated kernels serve tensors on the CPU; blocks, warps and lanes run in an order of this test's own."""
    emulation = emulated.Emulation(emulated_library, monkeypatch)
    emulation.reset(seed=emulated.seed_of(request.node.name) if request.param == "random" else int(request.param))
    yield emulation
    emulation.reset()


def noisy_batch(bank, sigma, device="cpu"):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    return (x0 + sigma.float()[:, None, None, None] * noise).to(device), sigma


def compare(bank, competition, sigma, tolerance=1e-4, device="cpu", limit=LIMIT):
    z, sigma = noisy_batch(bank, sigma, device)
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], limit)
    expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    assert_same(got, expected, tolerance)
    return got


# The kernels as plain C++.


@pytest.mark.parametrize(
    ("kind", "k", "channels", "height", "width"),
    [
        (circular, 1, 2, 7, 9),
        (circular, 3, 3, 9, 11),
        (circular, 5, 1, 11, 8),
        (circular, 7, 4, 8, 9),
        (circular, 9, 3, 9, 17),
        (circular, 5, 5, 8, 7),
        (broken, 1, 3, 6, 7),
        (broken, 3, 4, 9, 7),
        (broken, 5, 3, 11, 10),
        (broken, 7, 1, 9, 12),
        (local, 3, 3, 7, 18),
        (local, 9, 2, 10, 6),
        (local, 5, 9, 6, 5),
    ],
)
def test_sums_are_the_references(kernels, kind, k, channels, height, width):
    bank = ps.PatchBank(smooth_images(11, channels, height, width))
    compare(bank, kind(k, height, width), [0.05, 0.3, 2.0])


@pytest.mark.parametrize(
    ("kind", "k", "channels", "height", "width", "dtype"),
    [
        (circular, 1, 1, 7, 9, torch.uint8),
        (circular, 5, 3, 8, 17, torch.uint8),
        (circular, 3, 5, 8, 7, torch.uint8),
        (circular, 3, 2, 7, 8, torch.float32),
        (broken, 5, 4, 9, 8, torch.uint8),
        (local, 9, 3, 7, 6, torch.float32),
    ],
)
def test_moments_are_the_references(kernels, kind, k, channels, height, width, dtype):
    """At low noise too, where float32 sums of squares would lose the variance to the mean."""
    bank = ps.PatchBank(smooth_images(11, channels, height, width, dtype=dtype))
    # Windows that wrap around are unlike all others: 22 bits of a pixel that is off by 1 leave their log-weights 1e-4
    # nats at sigma = 0.1, and four times as much at half of it.
    lowest = 0.15 if kind is circular else 0.01
    compare_moments(bank, kind(k, height, width), [lowest, 0.3, 2.0, 100.0])


def test_moments_of_strips_and_chunks_are_the_references(kernels, monkeypatch):
    bank = ps.PatchBank(smooth_images(9, 3, 20, 9), torch.arange(9) % 2)
    monkeypatch.setattr(sliding_cuda, "CHUNKS", 2)
    monkeypatch.setattr(sliding_cuda, "_shared_limit", lambda device: 20 * 1024)
    compare_moments(bank, circular(5, 20, 9), [0.3])
    compare_moments(bank.select(1), broken(5, 20, 9), [0.3])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moments_of_whole_images_are_the_references(kernels, dtype):
    bank = ps.PatchBank(smooth_images(30, 3, 7, 9, dtype=dtype), torch.arange(30) % 2)
    compare_moments(bank, WHOLE_IMAGE, [0.02, 0.2, 1.0, 50.0])
    compare_moments(bank.select(1), WHOLE_IMAGE, [0.5])


def compare_moments(bank, competition, sigma, limit=LIMIT, device="cpu"):
    z, sigma = noisy_batch(bank, sigma, device)
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], limit, moments=True)
    (plain,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], LIMIT)
    torch.testing.assert_close(got.mean, plain.mean, rtol=0, atol=1e-6)
    expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT, moments=True)
    assert_same_moments(got, expected, z, sigma.to(z.device), around_z=True)


# Products with the Jacobian, and windows' sums.


@pytest.mark.parametrize(
    ("kind", "k", "channels", "height", "width", "dtype"),
    [
        (circular, 1, 1, 7, 9, torch.uint8),
        (circular, 3, 3, 8, 11, torch.uint8),
        (circular, 7, 2, 7, 9, torch.float32),
        (broken, 3, 5, 7, 6, torch.uint8),
        (broken, 5, 3, 11, 8, torch.uint8),
        (local, 3, 2, 7, 35, torch.uint8),
        (local, 9, 3, 7, 6, torch.float32),
    ],
)
def test_products_are_the_references(kernels, kind, k, channels, height, width, dtype):
    bank = ps.PatchBank(smooth_images(7, channels, height, width, dtype=dtype), torch.arange(7) % 2)
    compare_products(bank, kind(k, height, width), [0.15, 0.5, 3.0])
    compare_products(bank.select(1), kind(k, height, width), [0.5])


def test_products_in_parts_are_the_references(kernels, monkeypatch):
    bank, competition = ps.PatchBank(smooth_images(5, 3, 9, 8)), broken(3, 9, 8)
    monkeypatch.setattr(sliding_cuda, "SECOND_PASS_WARPS", 3)  # several images a warp
    compare_products(bank, competition, [0.3, 1.0])
    image = 4 * bank.images[0].numel()
    compare_products(bank, competition, [0.3, 1.0], limit=4 * 8 * image)  # slabs; an item at a time
    z, sigma = noisy_batch(bank, [0.3])
    total = Reference().posterior_sum(z, sigma, bank, competition, LIMIT)
    with pytest.raises(ValueError, match=r"^memory_limit: got \d+ bytes, one image takes \d+"):
        sliding_cuda._second_pass(sliding_cuda.BACKWARD, z, sigma, z, bank, competition, total, 4 * image)
    monkeypatch.setattr(sliding_cuda, "_shared_limit", lambda device: 3 * 12 * 9 * 9)  # three warps of a block work
    compare_products(bank, competition, [0.3, 1.0])
    monkeypatch.setattr(sliding_cuda, "_shared_limit", lambda device: 12 * 9 * 9 - 1)
    with pytest.raises(EngineError, match="too small for gradients of images of 9 x 8"):
        sliding_cuda.SlidingCuda().product(True, z, sigma, z, bank, competition, LIMIT)


def compare_products(bank, competition, sigma, limit=LIMIT, device="cpu"):
    """To a thousandth of the largest number of an image's product, and dual to 1e-4."""
    z, sigma = noisy_batch(bank, sigma, device)
    u, t = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(2)).to(device)
    exact = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    found = []
    for kind, direction in ((1, u), (0, t)):
        got = sliding_cuda._second_pass(kind, z, sigma, direction, bank, competition, exact, limit)
        got = got / sigma.to(device).square()[:, None, None, None]
        expected = Reference().product(kind == 1, z.double(), sigma, direction.double(), bank, competition, LIMIT)
        assert_close_to_the_largest(got, expected)
        found.append(got)
    dual = (u * found[1]).flatten(1).sum(1), (found[0] * t).flatten(1).sum(1)
    scale = found[0].flatten(1).norm(dim=1) * t.flatten(1).norm(dim=1)
    assert ((dual[0] - dual[1]).abs() <= 1e-5 * scale).all()
    nothing = torch.zeros_like(z)
    got = sliding_cuda._second_pass(2, z, sigma, nothing, bank, competition, exact, limit)
    assert_close_to_the_largest(got, Reference().window_sums(z.double(), sigma, bank, competition, LIMIT)[1])


def assert_close_to_the_largest(got, expected):
    assert torch.isfinite(got).all()
    largest = expected.abs().flatten(1).amax(1)[:, None, None, None]
    # Where one window decides, what is left is how float32 rounds its value and the mean, over sigma^2.
    assert ((got - expected).abs() <= 1e-3 * largest + 1e-5).all()


def test_the_engine_has_products_after_a_first_pass_of_its_own(kernels):
    bank, engine = ps.PatchBank(smooth_images(7, 3, 9, 8)), sliding_cuda.SlidingCuda()
    for competition in (broken(3, 9, 8), WHOLE_IMAGE):
        z, sigma = noisy_batch(bank, [0.5])
        for transposed in (True, False):
            got = engine.product(transposed, z, sigma, z, bank, competition, LIMIT)
            assert got.dtype == z.dtype
            expected = Reference().product(transposed, z.double(), sigma, z.double(), bank, competition, LIMIT)
            assert_close_to_the_largest(got, expected)
    total, windows = engine.window_sums(z, sigma, bank, broken(3, 9, 8), LIMIT)
    expected, expected_windows = Reference().window_sums(z.double(), sigma, bank, broken(3, 9, 8), LIMIT)
    assert_same(total, expected, 1e-4)
    assert_close_to_the_largest(windows, expected_windows)
    with pytest.raises(ValueError, match=r"^z: got float64, engine \"sliding\" has gradients in float32"):
        engine.product(True, z.double(), sigma, z, bank, broken(3, 9, 8), LIMIT)


@pytest.mark.skipif(not EVERYTHING, reason="minutes: make emulate")
@pytest.mark.parametrize("kind", [circular, broken, local])
@pytest.mark.parametrize("k", [3, 9, 17])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (4, 37, 20)])
def test_sums_of_whole_images_size_are_the_references(kernels, kind, k, channels, height, width):
    for dtype in (torch.uint8, torch.float32):
        bank = ps.PatchBank(smooth_images(2, channels, height, width, dtype=dtype))
        compare(bank, kind(k, height, width), [0.3])


@pytest.mark.parametrize("kind", [local, broken])
@pytest.mark.parametrize("k", [9, 11, 17])
def test_sums_are_the_references_where_the_window_is_larger_than_the_image(kernels, kind, k):
    bank = ps.PatchBank(smooth_images(9, 3, 9, 8))
    compare(bank, kind(k, 9, 8), [0.05, 1.0])


@pytest.mark.parametrize("kind", [circular, broken])
def test_strips_of_tall_images_give_the_references_sums(kernels, kind):
    bank = ps.PatchBank(smooth_images(3, 1, 39, 9))
    compare(bank, kind(7, 39, 9), [0.3])


def test_window_rows_are_cut_where_shared_memory_is_short(kernels, monkeypatch):
    bank = ps.PatchBank(smooth_images(3, 3, 20, 9))
    kernels.reset(shared=14 * 1024)
    compare(bank, circular(5, 20, 9), [0.3])
    compare(bank, local(5, 20, 9), [0.3])


@pytest.mark.parametrize("kind", [circular, broken, local])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_extreme_noise_is_held_in_one_batch(kernels, kind, dtype):
    bank = ps.PatchBank(smooth_images(9, 3, 8, 7, dtype=dtype))
    z, sigma = noisy_batch(bank, [0.005, 0.05, 100.0, 1e4])
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [kind(5, 8, 7)], LIMIT)
    expected = Reference().posterior_sum(z.double(), sigma, bank, kind(5, 8, 7), LIMIT)
    error = (got.mean - expected.mean).abs()
    assert error[:1].max() < 1e-3
    assert error[1:].max() < 1e-4
    torch.testing.assert_close(got.ess, expected.ess, rtol=2e-2, atol=1e-3)


def test_mean_is_nearest_window_as_sigma_vanishes(kernels):
    bank = ps.PatchBank(smooth_images(12, 3, 8, 7))
    z = bank.chunk(4, 5) + 0.01 * torch.randn(1, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    tiny = torch.full((1,), 1e-4, dtype=torch.float64)
    for competition in (local(5, 8, 7), circular(3, 8, 7)):
        expected = Reference().posterior_sum(z.double(), tiny, bank, competition, LIMIT)
        for sigma in (1e-4, 1e-9):
            (got,) = sliding_cuda.posterior_sums(z, tiny / 1e-4 * sigma, bank, [competition], LIMIT)
            assert (got.mean - expected.mean).abs().max() < 1e-5


def test_maximum_may_rise_by_thousands_of_nats(kernels):
    # Far images first: the reference moves with almost every image.
    images = torch.linspace(1, -1, 24)[:, None, None, None] * torch.ones(1, 3, 7, 7)
    bank = ps.PatchBank(images)
    z = torch.full((1, 3, 7, 7), -1.0) + 0.005 * torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.005], dtype=torch.float64)
    for competition in (local(3, 7, 7), circular(5, 7, 7)):
        (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], LIMIT)
        assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT), 1e-3)


@pytest.mark.parametrize("half", [0, 1])
def test_one_half_of_the_columns_may_weigh_alone(kernels, monkeypatch, half):
    # A warp takes columns 0-7 and 8-15 at once; the last image is near in one half, where another was before.
    monkeypatch.setattr(sliding_cuda, "CHUNKS", 1)
    images = torch.full((8, 1, 6, 16), 255, dtype=torch.uint8)
    halves = [slice(0, 8), slice(8, 16)]
    images[0, :, :, halves[1 - half]] = 10
    images[7, :, :, halves[half]] = 20
    bank = ps.PatchBank(images)
    z = ps.PatchBank(torch.full((1, 1, 6, 16), 15, dtype=torch.uint8)).chunk(0, 1)
    sigma = torch.tensor([0.05], dtype=torch.float64)
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [local(3, 6, 16)], LIMIT)
    assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, local(3, 6, 16), LIMIT), 1e-4)


def test_largest_values_do_not_overflow(kernels):
    # Black and white images under a constant far beyond them: every sum of digits is as large as it gets.
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(3)[:, None, None, None].expand(6, 3, 15, 15)
    for dtype in (torch.uint8, torch.float32):
        bank = ps.PatchBank(images.contiguous() if dtype == torch.uint8 else images / 127.5 - 1)
        for level in (-1.99, 1.99, 30.0, 300.0):  # the last is counted in units of several steps
            z = torch.full((1, 3, 15, 15), level)
            sigma = torch.tensor([5.0], dtype=torch.float64)
            (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [local(29, 15, 15)], LIMIT)
            assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, local(29, 15, 15), LIMIT), 1e-4)


@pytest.mark.parametrize(("dtype", "k"), [(torch.uint8, 21), (torch.float32, 5)])
def test_squared_norms_are_exact(kernels, dtype, k):
    # Of bright images they are beyond float32. What a whole number leaves of a norm, half a step at most, is a float32.
    bright = 1 - 0.1 * smooth_images(3, 6, 22, 23, dtype=torch.float32).abs()
    bright[:, :, 0, 0] = -1
    bank = ps.PatchBank(torch.full((3, 6, 22, 23), 255, dtype=torch.uint8) if dtype == torch.uint8 else bright)
    base = 100
    slab = sliding_cuda._packed(bank.images, None, 3, base, 0, 3)
    norms, fractions = sliding_cuda._norms(slab, k, 1)
    digits = slab.quads.view(torch.int8).reshape(3, sliding_cuda._planes(bank), 2, 22, 23, 4).double()
    p = sum(digit * base ** -float(place) for place, digit in enumerate(digits.unbind(1)))
    squares = torch.nn.functional.pad(p.square().sum((1, 4)), (k // 2,) * 4)
    expected = squares.unfold(1, k, 1).sum(-1).unfold(2, k, 1).sum(-1)
    assert expected.max() > (2**24 if dtype == torch.uint8 else 2**21)
    assert (norms + fractions.double() - expected).abs().max() <= 2**-26 + 1e-15 * expected.max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_selections_read_the_same_pixels(kernels, monkeypatch, dtype):
    bank = ps.PatchBank(smooth_images(24, 3, 8, 9, dtype=dtype), torch.arange(24) % 3).select(1)
    compare(bank, circular(3, 8, 9), [0.1, 1.0])
    compare(bank, broken(5, 8, 9), [0.1, 1.0])
    monkeypatch.setattr(sliding_cuda, "SLAB_BYTES", 11_000)
    kernels.launches.clear()
    compare(bank, circular(3, 8, 9), [0.1])
    assert kernels.launches.count("patchscore_pack") > 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_first_reference_may_be_far_from_the_nearest_window(kernels, dtype):
    # Relative to the first one, farther than anything, windows of nearly the same distance have weights beyond float32.
    bright = 0.85 + 0.02 * smooth_images(6, 3, 16, 16, dtype=torch.float32)
    bank = ps.PatchBank(((bright + 1) * 127.5).round().to(torch.uint8) if dtype == torch.uint8 else 2 * bright - 1)
    if dtype == torch.uint8:
        compare(bank, circular(9, 16, 16), [0.005])
        return
    z, sigma = noisy_batch(bank, [0.005])
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [circular(9, 16, 16)], LIMIT)
    values = bank.chunk(0, 6)
    assert ((got.mean >= values.min() - 1e-5) & (got.mean <= values.max() + 1e-5)).all()


def test_any_product_of_axes_gives_the_references_sums(kernels):
    # Queries that no window reaches by a shift, in both padding modes.
    bank = ps.PatchBank(smooth_images(7, 3, 9, 10))
    for mode in ("zeros", "circular"):
        for rows, cols in (
            (Axis(range(0, 3), range(2, 5)), Axis(range(4, 10), range(2, 8))),
            (Axis(range(2, 6)), Axis(range(0, 10), range(3, 4))),
            (Axis(range(8, 9), range(2, 7)), Axis(range(3, 5))),
        ):
            z, sigma = noisy_batch(bank, [0.4])
            competition = Competition(5, mode, (Group(rows, cols),))
            (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], LIMIT)
            expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
            served = expected.s > 0
            assert torch.equal(served, got.s > 0)
            assert (got.mean - expected.mean)[served.expand_as(got.v)].abs().max() < 1e-4


def test_numbers_do_not_depend_on_slabs_or_batch(kernels, monkeypatch):
    bank = ps.PatchBank(smooth_images(150, 1, 6, 6))
    z, sigma = noisy_batch(bank, [0.05, 3.0, 0.4])
    competition = circular(3, 6, 6)
    monkeypatch.setattr(sliding_cuda, "CHUNKS", 4)  # so that a slab alone would be cut into smaller chunks
    (expected,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], LIMIT)
    monkeypatch.setattr(sliding_cuda, "SLAB_BYTES", 64 * 60 * 36)
    (slabs,) = sliding_cuda.posterior_sums(z, sigma, bank, [competition], LIMIT)
    (alone,) = sliding_cuda.posterior_sums(z[1:2], sigma[1:2], bank, [competition], LIMIT)
    assert (slabs.mean - expected.mean).abs().max() < 1e-12
    assert (alone.mean - expected.mean[1:2]).abs().max() < 1e-12


def test_items_in_several_passes_are_those_of_one(kernels):
    bank = ps.PatchBank(smooth_images(9, 1, 6, 6))
    for kind in (circular, local):
        kernels.launches.clear()
        compare(bank, kind(3, 6, 6), [0.05, 0.1, 0.15, 0.2, 0.25], limit=16_000)
        windows, slabs = (kernels.launches.count(f"patchscore_{name}") for name in ("windows", "pack"))
        assert windows > slabs > 1
        compare_moments(bank, kind(3, 6, 6), [0.15, 0.2, 0.25, 0.5, 1.0], limit=24_000)


def test_several_sizes_at_once_are_those_alone(kernels):
    bank = ps.PatchBank(smooth_images(6, 3, 9, 8))
    competitions = [circular(1, 9, 8), WHOLE_IMAGE, circular(3, 9, 8), circular(7, 9, 8)]
    z, sigma = noisy_batch(bank, [0.2, 1.0])
    together = sliding_cuda.posterior_sums(z, sigma, bank, competitions, LIMIT)
    for got, competition in zip(together, competitions, strict=True):
        assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT), 1e-4)


def test_a_refused_kernel_is_named(kernels, monkeypatch):
    monkeypatch.setattr(sliding_cuda, "_shared_limit", lambda device: 2**40)
    bank = ps.PatchBank(smooth_images(2, 3, 60, 60))
    z, sigma = noisy_batch(bank, [1.0])
    with pytest.raises(RuntimeError, match=r"windows_kernel: .*shared memory.*cudaErrorInvalidValue"):
        sliding_cuda.posterior_sums(z, sigma, bank, [local(119, 60, 60)], LIMIT)


def raises_with_the_kernels_name(device):
    # No query rows in a strip, no groups in a chunk, no images: each would divide by zero or start no block.
    for missing in ("strip", "groups_per_chunk", "images"):
        sizes = {"strip": 1, "groups_per_chunk": 1, "images": 1, missing: 0}
        task = sliding_cuda._Windows(planes=1, values_per_pixel=3, items=1, height=4, width=4, patch_size=3, **sizes)
        task.rows = task.cols = sliding_cuda._Axis(0, 4, 0, 4, 0)
        with pytest.raises(RuntimeError, match=r"windows_kernel.*\(cudaErrorInvalid"):
            sliding_cuda._run("patchscore_windows", task, device)
    for name, task in (
        ("pack", sliding_cuda._Pack()),
        ("norms", sliding_cuda._Norms()),
        ("products", sliding_cuda._Products()),
        ("average", sliding_cuda._Average()),
    ):
        with pytest.raises(RuntimeError, match=r"(pack|column|products|average)_kernel: .*\(cudaErrorInvalid"):
            sliding_cuda._run(f"patchscore_{name}", task, device)


def test_errors_name_the_kernel(kernels):
    raises_with_the_kernels_name(torch.device("cpu"))


def test_an_error_is_not_blamed_on_the_next_call(kernels):
    bank = ps.PatchBank(smooth_images(3, 1, 6, 6))
    raises_with_the_kernels_name(torch.device("cpu"))
    assert kernels.library.emulation_last_error() == 0
    compare(bank, circular(3, 6, 6), [0.3])
    # Nor is a device that is not there.
    assert kernels.library.patchscore_shared_limit(7) == 0
    assert kernels.library.emulation_last_error() == 0


def test_a_device_that_cannot_say_its_limits_is_an_error(kernels):
    kernels.reset(shared=0)
    with pytest.raises(RuntimeError, match="shared memory"):
        sliding_cuda.serves(ps.PatchBank(smooth_images(2, 3, 8, 8)), circular(3, 8, 8), torch.device("cpu"))


def test_threads_of_different_patch_sizes_do_not_meet(kernels):
    # What one thread allows a kernel, another's launch relies on: both need more shared memory than 48 KB.
    kernels.reset(only_checks=True)
    bank = ps.PatchBank(smooth_images(2, 4, 32, 32))
    z, sigma = noisy_batch(bank, [0.3])
    failures = []

    def call(k):
        try:
            for _ in range(5):
                sliding_cuda.posterior_sums(z, sigma, bank, [circular(k, 32, 32)], LIMIT)
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=call, args=(k,)) for k in (3, 17, 5, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_every_device_is_asked_for_its_own_shared_memory(kernels, monkeypatch):
    kernels.reset(devices=2, seed=7)
    bank = ps.PatchBank(smooth_images(2, 4, 30, 6))  # a block takes more than 48 KB
    for number in (0, 1):
        monkeypatch.setattr(sliding_cuda, "_number", lambda device, number=number: number)
        compare(bank, circular(3, 30, 6), [0.3])
    monkeypatch.setattr(sliding_cuda, "_number", lambda device: 2)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        compare(bank, WHOLE_IMAGE, [0.3])


def test_launches_go_to_the_tensors_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [sliding_cuda._number(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda")] == [0, 1, 3]


@pytest.mark.parametrize(
    ("k", "channels", "height", "width", "kind"),
    [
        (65, 3, 1024, 1024, circular),
        (41, 8, 2048, 2048, circular),
        (7, 3, 6000, 6000, circular),
        (7, 3, 4000, 4000, local),
    ],
)
def test_grids_of_large_images_are_within_cudas_limits(kernels, k, channels, height, width, kind):
    kernels.reset(only_checks=True)
    task = sliding_cuda._Windows(
        channel_quads=-(-channels // 4), planes=1, values_per_pixel=3, height=height, width=width, patch_size=k,
        circular=kind is circular, images=2, items=3, groups_per_chunk=1,
    )  # fmt: skip
    (group,) = kind(k, height, width).groups
    task.rows, task.cols = sliding_cuda._axis(group.rows), sliding_cuda._axis(group.cols)
    columns = 16 if group.cols.locked else len(group.cols.centres)
    chunks = -(-2 * -(-columns // sliding_cuda.TILE) // sliding_cuda.TILES)
    for piece in sliding_cuda._pieces(task, group.rows, torch.device("cpu")):
        task.rows = sliding_cuda._axis(piece)
        sliding_cuda._run("patchscore_windows", task, torch.device("cpu"))
        # And no block is left out.
        tiles = -(-len(piece.queries) // task.strip) * -(-len(group.cols.queries) // 16)
        assert kernels.library.emulation_blocks() == 3 * chunks * tiles
    # Images of many values, which no vector load serves.
    values = channels * height * width - 1
    task = sliding_cuda._Average(images=300, values=values, groups=8, bytes=True)
    sliding_cuda._run("patchscore_average", task, torch.device("cpu"))
    task = sliding_cuda._Products(images=300, values=values, groups=4, slice=sliding_cuda._slices(values, 300, 4)[0])
    sliding_cuda._run("patchscore_products", task, torch.device("cpu"))


@pytest.mark.parametrize("architecture", sorted(emulated.SHARED))
def test_every_architecture_has_room_for_the_blocks(kernels, architecture):
    kernels.reset(shared=emulated.SHARED[architecture], only_checks=True)
    for dtype in (torch.uint8, torch.float32):
        for channels, size in ((1, 28), (3, 32), (4, 64), (3, 256)):
            bank = ps.PatchBank(torch.zeros(1, channels, size, size, dtype=dtype))
            for k in (3, 17, 25):
                for kind in (circular, broken, local):
                    competition = kind(k, size, size)
                    assert sliding_cuda.serves(bank, competition, torch.device("cpu"))
                    for group in competition.groups:
                        launch_checked(bank, competition, group)


def launch_checked(bank, competition, group):
    """Launches as `_add` would, in pieces that fit."""
    channels, height, width = bank.shape
    task = sliding_cuda._Windows(
        channel_quads=-(-channels // 4), planes=sliding_cuda._planes(bank), values_per_pixel=channels, height=height,
        width=width, patch_size=competition.patch_size, circular=competition.padding_mode == "circular",
        rows=sliding_cuda._axis(group.rows), cols=sliding_cuda._axis(group.cols), images=1, items=1, groups_per_chunk=1,
    )  # fmt: skip
    for piece in sliding_cuda._pieces(task, group.rows, torch.device("cpu")):
        task.rows = sliding_cuda._axis(piece)
        sliding_cuda._run("patchscore_windows", task, torch.device("cpu"))


def test_too_little_memory_is_refused(kernels):
    bank = ps.PatchBank(smooth_images(2, 3, 32, 32))
    z, sigma = noisy_batch(bank, [1.0])
    for competition in (circular(3, 32, 32), WHOLE_IMAGE):
        with pytest.raises(ValueError, match="memory_limit"):
            sliding_cuda.posterior_sums(z, sigma, bank, [competition], 10_000)


def test_without_the_library_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(sliding_cuda, "library", None)
    monkeypatch.setattr(sliding_cuda, "_missing", "the CUDA extension was not built")
    assert "not built" in (sliding_cuda.SlidingCuda().unavailable(torch.device("cuda")) or "")


def test_what_the_kernels_have_no_room_for_is_not_served(kernels, monkeypatch):
    cpu = torch.device("cpu")
    bank = ps.PatchBank(smooth_images(2, 3, 24, 24))
    assert sliding_cuda.serves(bank, local(47, 24, 24), cpu)
    assert sliding_cuda.serves(bank, WHOLE_IMAGE, cpu)
    monkeypatch.setattr(sliding_cuda, "_shared_limit", lambda device: 20 * 1024)
    assert sliding_cuda.serves(bank, WHOLE_IMAGE, cpu)
    served = [k for k in range(3, 48, 2) if sliding_cuda.serves(bank, local(k, 24, 24), cpu)]
    assert served == list(range(3, served[-1] + 1, 2))
    assert served[-1] < 47
    compare(bank, local(served[-1], 24, 24), [0.3])  # and what is said to fit does
    kernels.reset()
    large = ps.PatchBank(torch.zeros(1, 3, 300, 300, dtype=torch.uint8))
    assert not sliding_cuda.serves(large, local(599, 300, 300), cpu)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("images", "channels", "height", "width"),
    [(1, 3, 8, 8), (3, 1, 1, 1), (33, 3, 9, 7), (130, 4, 4, 4), (300, 1, 5, 13), (520, 2, 3, 8)],
)
def test_whole_images_are_the_references(kernels, dtype, images, channels, height, width):
    bank = ps.PatchBank(smooth_images(images, channels, height, width, dtype=dtype))
    compare(bank, WHOLE_IMAGE, [0.05, 0.3, 2.0, 50.0])


def test_whole_images_are_the_references_for_a_batch_of_different_noise(kernels):
    bank = ps.PatchBank(smooth_images(70, 3, 8, 7), torch.arange(70) % 3).select(1)
    compare(bank, WHOLE_IMAGE, [0.05 * 1.3**i for i in range(19)])
    z, sigma = noisy_batch(bank, [0.005, 0.01])
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [WHOLE_IMAGE], LIMIT)
    expected = Reference().posterior_sum(z.double(), sigma, bank, WHOLE_IMAGE, LIMIT)
    assert (got.mean - expected.mean).abs().max() < 1e-3


@pytest.mark.parametrize("size", [150, 151])
def test_whole_images_of_more_values_than_a_sum_of_products_holds(kernels, size):
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(3)[:, None, None, None].expand(6, 3, size, size)
    bank = ps.PatchBank(images.contiguous())
    assert bank.images[0].numel() > sliding_cuda.LARGEST_SLICE
    for level in (-1.99, 1.99, 30.0):
        z, sigma = torch.full((1, 3, size, size), level), torch.tensor([50.0], dtype=torch.float64)
        (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [WHOLE_IMAGE], LIMIT)
        assert_same(got, Reference().posterior_sum(z.double(), sigma, bank, WHOLE_IMAGE, LIMIT), 1e-4)


def test_mean_is_nearest_image_as_sigma_vanishes(kernels):
    bank = ps.PatchBank(smooth_images(300, 3, 6, 5))
    z = bank.chunk(290, 291) + 0.01
    (got,) = sliding_cuda.posterior_sums(z, torch.tensor([1e-9], dtype=torch.float64), bank, [WHOLE_IMAGE], LIMIT)
    assert (got.mean - bank.chunk(290, 291)).abs().max() < 1e-6
    assert (got.ess - 1).abs().max() < 1e-6


def test_whole_images_do_not_depend_on_slabs_or_batch(kernels, monkeypatch):
    bank = ps.PatchBank(smooth_images(900, 1, 6, 6))
    z, sigma = noisy_batch(bank, [0.05, 3.0, 0.4])
    (expected,) = sliding_cuda.posterior_sums(z, sigma, bank, [WHOLE_IMAGE], LIMIT)
    counted = []
    monkeypatch.setattr(sliding_cuda, "_weighed", lambda *a, run=sliding_cuda._weighed: counted.append(a) or run(*a))
    monkeypatch.setattr(sliding_cuda, "SLAB_BYTES", 700 * 2**10)
    (slabs,) = sliding_cuda.posterior_sums(z, sigma, bank, [WHOLE_IMAGE], LIMIT)
    assert len(counted) > 2
    (alone,) = sliding_cuda.posterior_sums(z[1:2], sigma[1:2], bank, [WHOLE_IMAGE], 2**17)
    assert (slabs.mean - expected.mean).abs().max() < 1e-12
    assert (alone.mean - expected.mean[1:2]).abs().max() < 1e-6


# A bank larger than the device's memory, on streams that stand in for CUDA's.


class _Stream:
    """Does what it is given at once, or (`late`) not before somebody needs it."""

    late = False
    current: "_Stream | None" = None

    def __init__(self, device=None):
        self.queue = []
        self.done = 0
        self.recorded = []  # tensors whose memory waits for this stream

    def put(self, work):
        self.queue.append(work)
        if not self.late:
            self.run(len(self.queue))

    def run(self, count):
        while self.done < count:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, other):
        count = len(other.queue)
        self.put(lambda: other.run(count))

    def wait_event(self, event):
        stream, place = event.stream, event.place
        self.put(lambda: stream.run(place))

    def __enter__(self):
        _Stream.current = self

    def __exit__(self, *error):
        _Stream.current = None


class _Event:
    def __init__(self):
        self.stream, self.place = None, 0

    def record(self, stream):
        self.stream, self.place = stream, len(stream.queue)

    def synchronize(self):
        if self.stream:
            self.stream.run(self.place)


@pytest.fixture(params=["at once", "late"])
def streams(request, monkeypatch):
    """CUDA streams on the CPU, and the one that computes; its work and copies wait as long as they may."""
    copy, empty = torch.Tensor.copy_, torch.empty

    def copy_(self, source, non_blocking=False):
        if _Stream.current is None:
            return copy(self, source)
        assert non_blocking
        _Stream.current.put(lambda: copy(self, source))
        return self

    computing = _Stream()
    monkeypatch.setattr(_Stream, "late", request.param == "late")
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: stream.recorded.append(self))
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(_Stream()) or made[-1])
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(resident, "on_device", lambda images, device: None)
    computing.others = made
    return computing


@pytest.mark.parametrize("per_slab", [1, 3, 7, 50, 64])
def test_slabs_arrive_whole_and_in_order(streams, per_slab):
    bank = ps.PatchBank(smooth_images(50, 1, 4, 3), torch.arange(50) % 3)
    for images in (bank, bank.select(2)):
        arrived = []
        for raw, indices, count in sliding_cuda._slabs(images, torch.device("cpu"), per_slab):
            assert indices is None
            streams.put(lambda raw=raw, count=count, to=arrived: to.append(raw[:count].clone()))
        streams.run(len(streams.queue))
        own = images.images if images.indices is None else images.images[images.indices]
        assert len(arrived) == -(-len(own) // per_slab)
        assert torch.equal(torch.cat(arrived), own)


@pytest.mark.parametrize("slabs", [0, 1, 2])
def test_memory_waits_for_its_copies_where_the_caller_fails(streams, slabs):
    bank = ps.PatchBank(smooth_images(20, 1, 4, 3))
    walk = sliding_cuda._slabs(bank, torch.device("cpu"), 7)
    arrived = [next(walk)[0] for _ in range(slabs + 1)]
    walk.close()  # as an exception in the caller does
    (copying,) = streams.others
    assert all(any(tensor is raw for tensor in copying.recorded) for raw in arrived)
    assert len(copying.recorded) == 2  # also the one that nobody has seen yet


def test_a_streamed_bank_gives_the_references_sums(kernels, streams, monkeypatch):
    bank = ps.PatchBank(smooth_images(300, 1, 6, 6), torch.arange(300) % 2).select(1)
    monkeypatch.setattr(sliding_cuda, "SLAB_BYTES", 64 * 60 * 36)
    slabs = sliding_cuda._slabs

    def computed_on_at_once(*arguments):
        for slab in slabs(*arguments):
            streams.run(len(streams.queue))
            yield slab

    monkeypatch.setattr(sliding_cuda, "_slabs", computed_on_at_once)
    compare(bank, circular(3, 6, 6), [0.05, 3.0])
    compare(bank, WHOLE_IMAGE, [0.05, 3.0])


# The compiler's report.


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_keep_everything_in_registers(tmp_path, target):
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / target]
    source = emulated.ROOT / "csrc" / "sliding" / "sliding.cu"
    report = subprocess.run([*command, source], capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert (
        spilled == [("0", "0")] * 24
    )  # twelve kernels of windows, two of products, four of averages, three that prepare, three of second passes


# Without the C++ engine, FAISS, or a device.


def test_gpu_tests_are_collected_where_nothing_else_was_built():
    missing = ("patchscore._native", "patchscore._sliding_cuda", "faiss", "diffusers", "matplotlib")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import pytest; pytest.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=emulated.ROOT, check=True).stdout
    # All of this file: one line says how many.
    assert int(re.search(r"test_sliding_cuda.py: (\d+)", collected)[1]) >= 74, collected


# On a GPU.


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", [circular, broken, local])
@pytest.mark.parametrize("k", [1, 3, 7, 11, 17])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (4, 37, 50), (6, 20, 23)])
def test_gpu_sums_are_the_references(kind, k, channels, height, width):
    for dtype in (torch.uint8, torch.float32):
        bank = ps.PatchBank(smooth_images(150, channels, height, width, dtype=dtype))
        compare(bank, kind(k, height, width), [0.05, 0.4, 3.0], device="cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("images", "channels", "height", "width"), [(700, 3, 32, 32), (300, 1, 27, 29), (5, 3, 150, 151)]
)
def test_gpu_whole_images_are_the_references(dtype, images, channels, height, width):
    bank = ps.PatchBank(smooth_images(images, channels, height, width, dtype=dtype))
    compare(bank, WHOLE_IMAGE, [0.05 * 1.5**i for i in range(18)], device="cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", [circular, local])
def test_gpu_extreme_noise_is_held(kind):
    bank = ps.PatchBank(smooth_images(300, 3, 32, 32))
    z, sigma = noisy_batch(bank, [0.005, 0.01, 100.0, 1e4], "cuda")
    (got,) = sliding_cuda.posterior_sums(z, sigma, bank, [kind(7, 32, 32)], LIMIT)
    expected = Reference().posterior_sum(z.double(), sigma, bank, kind(7, 32, 32), LIMIT)
    assert (got.mean - expected.mean).abs().max() < 1e-3


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", [circular, broken, local, None])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (5, 20, 23)])
def test_gpu_moments_are_the_references(kind, channels, height, width):
    for dtype in (torch.uint8, torch.float32):
        bank = ps.PatchBank(smooth_images(100, channels, height, width, dtype=dtype))
        lowest = 0.15 if kind is circular else 0.02  # as in the emulation's test
        compare_moments(bank, kind(5, height, width) if kind else WHOLE_IMAGE, [lowest, 0.3, 2.0], device="cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", [circular, broken, local])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (5, 20, 23)])
def test_gpu_products_are_the_references(kind, channels, height, width):
    for k, dtype in ((3, torch.uint8), (7, torch.float32)):
        bank = ps.PatchBank(smooth_images(40, channels, height, width, dtype=dtype))
        compare_products(bank, kind(k, height, width), [0.15, 0.5, 3.0], device="cuda")


@gpu
@needs_gpu
def test_gpu_machines_have_gradients_from_sliding(monkeypatch):
    monkeypatch.setenv("PATCHSCORE_STRICT", "1")
    bank = ps.PatchBank(smooth_images(50, 3, 16, 16), torch.arange(50) % 2)
    z = (bank.chunk(0, 2) + 0.4 * torch.randn(2, 3, 16, 16)).cuda()
    for machine in (ps.EquivariantLocalScore(bank, 5), ps.LocalScore(bank, 5), ps.IdealScore(bank)):
        machine.engine = "sliding"
        for product in ("vjp", "jvp"):
            found = getattr(machine, product)(z, 0.4, z, [0, 1])
            assert found.is_cuda
            machine_of = type(machine)(bank, *((5,) if machine.patch_size else ()), engine="reference")
            expected = getattr(machine_of, product)(z.cpu().double(), 0.4, z.cpu().double(), [0, 1])
            assert_close_to_the_largest(found.cpu(), expected)


@gpu
@needs_gpu
def test_gpu_machines_are_served():
    bank = ps.PatchBank(smooth_images(100, 3, 32, 32), torch.arange(100) % 3)
    z = bank.chunk(0, 2) + 0.3 * torch.randn(2, 3, 32, 32)
    for machine in (
        ps.EquivariantLocalScore(bank, 5, engine="sliding"),
        ps.LocalScore(bank, 5, engine="sliding"),
        ps.IdealScore(bank, engine="sliding"),
    ):
        est = machine.estimate(z.cuda(), 0.3, labels=[0, 2])
        assert est.engine == "sliding"
        exact = type(machine)(bank, *((5,) if machine.patch_size else ()), engine="reference")
        assert (est.mean.cpu() - exact.denoise(z.double(), 0.3, labels=[0, 2])).abs().max() < 1e-4


@gpu
@needs_gpu
def test_gpu_streams_the_bank_as_it_holds_it(monkeypatch):
    bank = ps.PatchBank(smooth_images(1000, 3, 16, 16), torch.arange(1000) % 2)
    competitions = [circular(5, 16, 16), WHOLE_IMAGE]
    for images in (bank, bank.select(1)):
        z, sigma = noisy_batch(images, [0.2, 1.0], "cuda")
        kept = sliding_cuda.posterior_sums(z, sigma, images, competitions, LIMIT)
        with monkeypatch.context() as patch:
            patch.setattr(resident, "RESIDENT_SHARE", 0.0)
            patch.setattr(sliding_cuda, "SLAB_BYTES", 128 * 256 * 70)
            resident.copies.clear()
            streamed = sliding_cuda.posterior_sums(z, sigma, images, competitions, LIMIT)
        for got, expected in zip(streamed, kept, strict=True):
            assert (got.mean - expected.mean).abs().max() < 1e-12


@gpu
@needs_gpu
def test_gpu_work_follows_the_current_stream():
    bank = ps.PatchBank(smooth_images(200, 3, 32, 32))
    z, sigma = noisy_batch(bank, [0.2, 1.0], "cuda")
    (expected,) = sliding_cuda.posterior_sums(z, sigma, bank, [circular(5, 32, 32)], LIMIT)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(z)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late.copy_(z)
        (got,) = sliding_cuda.posterior_sums(late, sigma, bank, [circular(5, 32, 32)], LIMIT)
        mean = got.mean
    stream.synchronize()
    assert torch.equal(mean, expected.mean)


@gpu
@needs_gpu
def test_gpu_threads_may_call_at_once():
    bank = ps.PatchBank(smooth_images(200, 3, 32, 32))
    z, sigma = noisy_batch(bank, [0.2, 1.0], "cuda")
    results = [None] * 4

    def call(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            results[number] = sliding_cuda.posterior_sums(z, sigma, bank, [circular(5, 32, 32)], LIMIT)[0].mean.cpu()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results[1:]:
        assert torch.equal(result, results[0])


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
def test_gpu_devices_serve_their_own_tensors():
    bank = ps.PatchBank(smooth_images(50, 3, 16, 16))
    for device in range(torch.cuda.device_count()):
        got = compare(bank, circular(5, 16, 16), [0.2], device=f"cuda:{device}")
        assert got.v.device.index == device


@gpu
@needs_gpu
def test_gpu_errors_name_the_kernel():
    raises_with_the_kernels_name(torch.device("cuda"))
    compare(ps.PatchBank(smooth_images(3, 1, 6, 6)), circular(3, 6, 6), [0.3], device="cuda")
