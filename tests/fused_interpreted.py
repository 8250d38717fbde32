"""Numbers of the whole `fused` engine on the CPU, under Triton's interpreter; test_fused.py runs this file.

Not collected by name: TRITON_INTERPRET has to be set before Triton is imported, and would slow down every other test.
"""

import weakref

import interpreted  # noqa: F401
import pytest
import torch
import triton
import triton.language as tl
from conftest import MACHINES, machine_named, smooth_images

import patchscore as ps
from patchscore.engines import autotune, device
from patchscore.engines.autotune import Configuration
from patchscore.engines.fused import kernel, launch, naive, rows
from patchscore.engines.fused.launch import Fused
from patchscore.engines.fused.plan import CUBIC_RANGE, Plan, choose_plan, spectrum_of
from patchscore.engines.reference import Reference
from patchscore.pixels import to_bytes, to_values
from patchscore.windows import Axis, Competition, Group

LIMIT = 2**30
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[8])
def multiprocessors(request, monkeypatch):
    """Of the device that is made up; on 1 there is one split, on 132 as many as on a GPU."""
    monkeypatch.setenv("PATCHSCORE_STRICT", "1")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: request.param)
    yield request.param
    device.cache.clear()


thorough = pytest.mark.thorough
on_any_device = pytest.mark.parametrize(
    "multiprocessors",
    [pytest.param(1, marks=thorough), 8, pytest.param(108, marks=thorough), pytest.param(132, marks=thorough)],
    indirect=True,
)


def posterior_sum(z, sigma, bank, competition, limit=LIMIT, tolerance=launch.TOLERANCE, ess=True):
    return Fused(tolerance).posterior_sum(z, sigma, bank, competition, limit, ess)


def compare(bank, competition, sigma, tolerance=1e-3, z=None, limit=LIMIT, **options):
    """One noisy image per sigma around images of the bank, in float32, so that both engines read the same."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    if z is None:
        generator = torch.Generator().manual_seed(1)
        x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
        z = x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    got = posterior_sum(z, sigma, bank, competition, limit, **options)
    expected = Reference().posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    assert torch.isfinite(got.mean).all()
    assert (got.mean - expected.mean).abs().max() <= tolerance
    torch.testing.assert_close(got.ess, expected.ess, rtol=1e-2, atol=1e-3)
    evidence, expected_evidence = got.m + got.s.log(), expected.m + expected.s.log()
    torch.testing.assert_close(evidence, expected_evidence, rtol=1e-5, atol=3e-2)
    return got


def competition(name, bank, k):
    return machine_named(name, bank, k).competition(k)


def test_the_interpreted_engine_serves_the_cpu(bank):
    assert Fused().runs_on(CPU)
    assert Fused().unavailable(CPU) is None
    assert ps.EquivariantLocalScore(bank, 3, "circular", "fused").estimate(bank.chunk(0, 1), 1.0).engine == "fused"


def test_whole_images_and_pixels_locked_on_both_axes_are_left_to_others(bank):
    z, sigma = bank.chunk(0, 1), torch.ones(1)
    assert Fused().lacks(z, sigma, bank, competition("ideal", bank, None))
    groups = competition("els-zeros", bank, 3).groups
    left = [g for g in groups if Fused().lacks(z, sigma, bank, Competition(3, "zeros", (g,)))]
    assert left == [g for g in groups if g.rows.locked and g.cols.locked]
    assert len(left) == 4


@pytest.mark.parametrize("name", [name for name in MACHINES if name != "ideal"])
@pytest.mark.parametrize(
    ("k", "channels", "height", "width"),
    [
        (3, 3, 6, 5),
        *(pytest.param(*size, marks=thorough) for size in ((1, 3, 5, 6), (3, 1, 6, 5), (5, 5, 6, 7), (7, 1, 8, 7))),
    ],
)
def test_sums_are_the_references(name, k, channels, height, width):
    bank = ps.PatchBank(smooth_images(17, channels, height, width))
    compare(bank, competition(name, bank, k), [0.4, 2.0])


@pytest.mark.parametrize("name", ["local", "els-zeros"])
def test_sums_are_the_references_where_the_window_is_larger_than_the_image(name):
    bank = ps.PatchBank(smooth_images(9, 3, 5, 4))
    compare(bank, competition(name, bank, 7), [1.5])


@pytest.mark.parametrize("name", ["local", "els-circular", "els-zeros"])
@pytest.mark.parametrize("k", [3, pytest.param(5, marks=thorough)])
def test_low_noise_is_held(name, k):
    bank = ps.PatchBank(smooth_images(13, 1, 6, 7))
    compare(bank, competition(name, bank, k), [0.005, 0.02, 0.08])


@pytest.mark.parametrize(
    ("k", "sigma"), [*((3, s) for s in (0.1, 0.11, 0.12)), *((5, s) for s in (0.17, 0.2, 0.25)), (7, 0.4), (11, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(torch.float32, marks=thorough)])
def test_queries_between_two_windows_are_held_where_nothing_averages_out(k, sigma, dtype):
    # One or two windows have the weight: rounding a query moves a mean by as much as it moves their logits apart.
    generator = torch.Generator().manual_seed(0)
    size = max(8, k + 1)
    coarse = torch.randn(5, 3, size // 4, size // 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    images = to_bytes(0.5 * (fine + 0.1 * torch.randn(fine.shape, generator=generator)))
    bank = ps.PatchBank(images if dtype == torch.uint8 else to_values(images))
    z = bank.chunk(0, 2)
    z = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    compare(bank, competition("els-circular", bank, k), [sigma] * 2, z=z)


@pytest.mark.parametrize("name", ["els-circular", "els-zeros"])
def test_low_noise_is_held_far_from_the_bank(name):
    # Windows of a constant image far from all others: logits of 10^5 nats, where float32 products are useless.
    bank = ps.PatchBank(smooth_images(13, 1, 6, 7))
    z = torch.full((1, 1, 6, 7), 3.0) + 0.3 * torch.randn(1, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    compare(bank, competition(name, bank, 3), [0.005], z=z)


def low_rank_images(n, channels, size):
    coarse = torch.rand(n, channels, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("images", [smooth_images(40, 3, 9, 8), low_rank_images(40, 3, 9)])
@pytest.mark.parametrize("sigma", [10.0, *(pytest.param(s, marks=thorough) for s in (100.0, 1e4, 1e6))])
def test_high_noise_is_held(images, sigma):
    bank = ps.PatchBank(images)
    compare(bank, competition("els-circular", bank, 5), [sigma])


def test_high_noise_takes_fewer_columns_than_pixels():
    bank = ps.PatchBank(low_rank_images(40, 3, 12))
    spectrum = spectrum_of(bank, 7, CPU)
    plans = [choose_plan(spectrum, 147, sigma, 1e-3, True, True) for sigma in (0.02, 0.3, 30.0)]
    assert plans[0].exact
    assert not plans[1].exact
    assert plans[2].axes
    assert plans[0].columns >= plans[1].columns > plans[2].columns


def test_each_item_has_its_own_noise():
    bank = ps.PatchBank(smooth_images(17, 3, 7, 6))
    compare(bank, competition("els-zeros", bank, 3), [0.3, 100.0, 1.0, 10.0])


@pytest.mark.parametrize("images", [1, 17, pytest.param(70, marks=thorough)])
def test_any_number_of_images(images):
    bank = ps.PatchBank(smooth_images(images, 2, 6, 7))
    compare(bank, competition("els-circular", bank, 3), [0.5])
    compare(bank, competition("local", bank, 3), [0.5])


@pytest.mark.parametrize("name", ["els-circular", "local"])
@pytest.mark.parametrize("sigma", [0.03, 1.0])
def test_float_banks_and_selections(name, sigma):
    images = smooth_images(30, 3 if sigma > 0.1 else 1, 6, 6, dtype=torch.float32)
    bank = ps.PatchBank(images, torch.arange(30) % 3).select(1)
    compare(bank, competition(name, bank, 3), [sigma])


@thorough
def test_any_product_of_axes():
    bank = ps.PatchBank(smooth_images(9, 2, 8, 9))
    axes = [Axis(range(1, 5), range(2, 7)), Axis(range(2, 6))]
    for of_rows in axes:
        for of_cols in axes:
            z = bank.chunk(0, 1) + 0.3
            got = posterior_sum(
                z, torch.tensor([0.4]), bank, Competition(3, "zeros", (Group(of_rows, of_cols),)), LIMIT
            )
            want = Reference().posterior_sum(
                z.double(), torch.tensor([0.4]), bank, Competition(3, "zeros", (Group(of_rows, of_cols),)), LIMIT
            )
            served = want.s > 0
            assert torch.equal(served, got.s > 0)
            assert (got.mean - want.mean)[served.expand_as(got.v)].abs().max() < 1e-3


def test_ties_share_their_weight():
    bank = ps.PatchBank(smooth_images(1, 1, 6, 6).repeat(37, 1, 1, 1))
    for sigma in (0.005, 0.5):
        got = compare(bank, competition("local", bank, 3), [sigma], tolerance=1e-5)
        assert (got.ess - 37).abs().max() < 1e-2


@thorough
def test_the_maximum_may_rise_by_thousands_of_nats():
    # Far images first: the reference moves with almost every tile.
    bank = ps.PatchBank(torch.linspace(1, -1, 300)[:, None, None, None] * torch.ones(1, 1, 4, 4))
    z = torch.full((1, 1, 4, 4), -1.0) + 0.005 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    compare(bank, competition("local", bank, 3), [0.005], z=z)
    compare(bank, competition("els-circular", bank, 3), [0.05], z=z)


def test_mean_is_nearest_window_as_sigma_vanishes_and_no_pixel_overflows():
    bank = ps.PatchBank(smooth_images(11, 1, 6, 5))
    rule = competition("els-circular", bank, 3)
    z = bank.chunk(2, 3) + 0.01 * torch.randn(1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    compare(bank, rule, [1e-4], z=z)
    for sigma, scale in ((1e-9, 1.0), (1.0, 1e6), (1e9, 1.0)):
        got = posterior_sum(z * scale, torch.tensor([sigma]).double(), bank, rule, LIMIT)
        assert torch.isfinite(got.mean).all()
        assert got.mean.abs().max() <= 1


@pytest.mark.parametrize(("tolerance", "sigma"), [(1e-2, 0.5), (1e-3, 0.5), (5e-4, 0.5), (1e-4, 0.05), (2e-5, 0.01)])
def test_tolerance_is_met(tolerance, sigma):
    # Images of one value: all windows of each have the same weight, and nothing that is rounded averages out.
    far = min(4 * sigma, 1.0)
    bank = ps.PatchBank(torch.tensor([-far, far])[:, None, None, None].expand(2, 3, 7, 6).contiguous())
    rule = competition("els-circular", bank, 3)
    z = torch.linspace(-0.05, 0.05, 21)[:, None, None, None] * sigma**2 / far + torch.zeros(3, 7, 6)
    asked = torch.full((21,), sigma, dtype=torch.float64)
    assert Fused(tolerance).lacks(z, asked, bank, rule) is None
    got = posterior_sum(z, asked, bank, rule, tolerance=tolerance)
    expected = Reference().posterior_sum(z.double(), asked, bank, rule, LIMIT)
    assert (got.mean - expected.mean).abs().max() <= tolerance


def test_a_tolerance_that_weights_cannot_hold_is_left_to_others(bank):
    z, rule = bank.chunk(0, 2), competition("els-circular", bank, 3)
    for sigma, tolerance, held in ((1.0, 4e-4, False), (1.0, 5e-4, True), (0.05, 1e-4, True), (0.1, 1e-4, False)):
        reason = Fused(tolerance).lacks(z, torch.tensor([0.01, sigma]).double(), bank, rule)
        assert held == (reason is None)
        assert held or f"{tolerance:g} is asked" in reason


def test_a_machine_without_an_index_passes_its_tolerance_on(monkeypatch):
    bank = ps.PatchBank(smooth_images(9, 1, 6, 6))
    asked = []
    choose = launch.choose_plan

    def watched(spectrum, d, sigma, tolerance, *rest, **options):
        asked.append(tolerance)
        return choose(spectrum, d, sigma, tolerance, *rest, **options)

    monkeypatch.setattr(launch, "choose_plan", watched)
    for tolerance in (None, 6e-4):
        machine = ps.EquivariantLocalScore(bank, 3, "circular", engine="fused", tolerance=tolerance)
        assert machine.estimate(bank.chunk(0, 1), 0.5).engine == "fused"
    assert asked == [launch.TOLERANCE, 6e-4]


def test_chunks_and_kept_rows_give_the_same_numbers(monkeypatch):
    bank = ps.PatchBank(smooth_images(40, 1, 6, 6))
    rule = competition("els-zeros", bank, 3)
    whole = compare(bank, rule, [0.7, 0.9])
    assert device.cache.nbytes > 0
    kept = compare(bank, rule, [0.7, 0.9])
    assert torch.equal(kept.mean, whole.mean)
    device.cache.clear()
    in_parts = compare(bank, rule, [0.7, 0.9], limit=200_000)
    # Chunks have references of their own, and weights are half floats.
    assert (in_parts.mean - whole.mean).abs().max() < 2**-11
    monkeypatch.setattr(device, "CACHE_BYTES_CPU", 0)
    device.cache.clear()
    compare(bank, rule, [0.7, 0.9])
    assert device.cache.nbytes == 0


def test_kept_rows_die_with_their_bank():
    bank = ps.PatchBank(smooth_images(8, 1, 6, 6))
    compare(bank, competition("els-circular", bank, 3), [0.7])
    assert device.cache.nbytes > 0
    del bank
    assert device.cache.nbytes == 0


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    sizes = []

    def patch_rows(bank, start, stop, *rest):
        sizes.append(stop - start)
        if stop - start > 6:
            raise torch.OutOfMemoryError("so it goes")
        return rows.patch_rows(bank, start, stop, *rest)

    monkeypatch.setattr(launch, "patch_rows", patch_rows)
    compare(bank, competition("els-circular", bank, 3), [0.7])
    assert sizes == [20, 10, 5, 5, 5, 5]


def test_out_of_memory_in_a_launch_takes_fewer_images_then_fewer_patches(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    rule = competition("els-circular", bank, 3)
    sizes = []
    real = launch.launch

    def short(queries, patches, *rest):
        sizes.append((queries.rows.shape[1] // 36, patches.rows.shape[1]))
        if sizes[-1][0] > 1 or sizes[-1][1] > 256:
            raise torch.OutOfMemoryError("so it goes")
        return real(queries, patches, *rest)

    monkeypatch.setattr(launch, "launch", short)
    compare(bank, rule, [0.7, 0.9, 1.1, 1.3], limit=2**20)
    items, patches = zip(*sizes, strict=True)
    assert items[:3] == (4, 2, 1)
    assert set(items[3:]) == {1}
    assert patches[-1] <= 256 < patches[0]
    assert device.cache.nbytes == 0  # kept rows would be what there is no room for
    monkeypatch.setattr(launch, "launch", _no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        compare(bank, rule, [0.7])


def _no_memory(*arguments):
    raise torch.OutOfMemoryError("none at all")


def test_memory_limit_too_small_is_refused():
    bank = ps.PatchBank(smooth_images(5, 3, 9, 9))
    with pytest.raises(ValueError, match="memory_limit"):
        posterior_sum(bank.chunk(0, 1), torch.ones(1), bank, competition("els-circular", bank, 3), 1000)


# What does not compile, and what CUDA says.


class OutOfResources(Exception):
    """As Triton's."""

    __module__ = "triton.runtime.errors"


@pytest.fixture
def _nothing_known(monkeypatch):
    monkeypatch.setattr(launch, "_broken", None)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.delenv("PATCHSCORE_STRICT")


@pytest.mark.usefixtures("_nothing_known")
def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(monkeypatch, bank):
    def run(*arguments):
        raise OutOfResources("out of resource: shared memory")

    monkeypatch.setattr(launch, "run", run)
    machine = ps.EquivariantLocalScore(bank, 3, "circular", engine="fused")
    with pytest.warns(RuntimeWarning, match="out of resource"):
        got = machine.estimate(bank.chunk(0, 1), 1.0)
    assert got.engine != "fused"
    assert "out of resource" in (Fused().unavailable(CPU) or "")
    monkeypatch.setattr(launch, "_broken", None)
    monkeypatch.setenv("PATCHSCORE_STRICT", "1")
    with pytest.raises(RuntimeError, match="out of resource"):
        machine.estimate(bank.chunk(0, 1), 1.0)


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize(
    "message", ["Triton Error [CUDA]: an illegal memory access was encountered", "a fault of ours"]
)
def test_what_cuda_says_of_a_launch_propagates(monkeypatch, bank, message):
    def run(*arguments):
        raise RuntimeError(message)

    monkeypatch.setattr(launch, "run", run)
    machine = ps.EquivariantLocalScore(bank, 3, "circular", engine="fused")
    with pytest.raises(RuntimeError) as caught:
        machine.denoise(bank.chunk(0, 1), 1.0)
    assert str(caught.value) == message
    assert Fused().unavailable(CPU) is None


def test_memory_that_the_driver_misses_halves_the_work(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    real, tries = launch.run, []

    def run(queries, *rest):
        tries.append(queries.rows.shape[1])
        if len(tries) == 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return real(queries, *rest)

    monkeypatch.setattr(launch, "run", run)
    compare(bank, competition("els-circular", bank, 3), [0.7, 0.9])
    assert tries == [72, 36, 36]


# The kernel against its definition (naive.py), launch by launch.


def random_launch(plan, n_queries, windows, channels=3, locked=1, seed=0):
    """Rows of random numbers as the engine would make them, for a plan of any size."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def halves(x, low):
        high = x.half()
        return high, (x - high).half()[..., :low]

    q, p = randn(locked, n_queries, plan.size), randn(locked, windows, plan.size)
    (q_high, q_low), (p_high, p_low) = halves(q, plan.q_lo), halves(p, plan.p_lo)
    p_sum = p_high.double()
    p_sum[..., : plan.p_lo] += p_low
    bias = -0.5 * p_sum.square().sum(-1)
    columns = []
    for _ in range(3):
        columns.append(bias.half())
        bias = bias - columns[-1]
    ones = torch.ones(locked, n_queries, 3).half()
    query_rows = torch.cat([q_high, q_low, q_high[..., : plan.p_lo], ones], -1)
    patch_rows = torch.cat([p_high, p_high[..., : plan.q_lo], p_low, torch.stack(columns, -1)], -1)

    def wide(x, length):
        out = torch.zeros(locked, length, plan.columns, dtype=torch.float16)
        out[:, : x.shape[1], : x.shape[2]] = x
        return out

    made = wide(patch_rows, rows.padded_rows(windows))
    made[:, windows:, plan.bias] = -torch.inf
    values = torch.zeros(locked, made.shape[1], rows.value_columns(channels), dtype=torch.float16)
    values[:, :windows, : 2 * channels + 1] = randn(locked, windows, 2 * channels + 1).half()
    values[:, :windows, channels] = 1
    q_sum = q_high.double()
    q_sum[..., : plan.q_lo] += q_low
    bits = 2 * torch.rand(locked, n_queries, generator=generator).double() / plan.size**0.5
    scale = torch.stack([bits, bits * 0.5 * q_sum.square().sum(-1), torch.ones_like(bits)]).float()
    queries = rows.Queries(wide(query_rows, n_queries), scale, torch.zeros(locked, n_queries, dtype=torch.float64))
    return queries, rows.Patches(made, values, windows)


def assert_kernel_is_naive(queries, patches, plan, channels, configuration, ess=True):
    """Sums of each split, relative to the kernel's own reference, and that reference where a pilot sets it."""
    sums, other = launch.run(queries, patches, plan, channels, configuration, ess)
    bits = naive.log_weights(queries, patches, plan)
    parts = naive.splits(patches.filled, len(sums), configuration.patches)
    assert len(parts) == len(sums)
    pilot = launch.kernel_constants(plan, channels, configuration, ess)["PILOT"]
    missed = 0
    for i, part in enumerate(parts):
        got, (reference, squares) = sums[i], other[i].unbind(-1)
        here, values = bits[..., part.start : part.stop], patches.values[:, part.start : part.stop]
        want, want_squares = naive.sums(here, values, reference.double())
        scale = want[..., channels, None].clamp(min=1e-30)
        assert torch.isfinite(got).all()
        assert ((got - want) / scale).abs().max() < 2e-3
        if ess:
            torch.testing.assert_close(squares.double(), want_squares, rtol=2e-3, atol=0)
        if pilot:
            expected = naive.pilot_reference(here, configuration.patches, pilot, -10.0)
            if (reference - expected).abs().max() > 1e-2:
                missed += 1
    return missed


PLANS = {
    "pixels": Plan(27, pilot=True),
    "two blocks of columns": Plan(71, pilot=True),
    "axes, the leading ones split": Plan(20, axes=True, q_lo=4, p_lo=4, pilot=True),
    "blocks of 64 columns": Plan(330, pilot=True),
    "running maximum": Plan(27, q_lo=27, skip=True),
    "differences": Plan(9, q_lo=9, p_lo=9, exact=True, skip=True),
}
TILE = Configuration(16, 32, 4, 1, cubic=4)
BLOCKS = Configuration(16, 32, 4, 1, block=64)


@on_any_device
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("queries", "windows", "locked"), [(1, 1, 1), (17, 129, 1), (5, 33, 3), (33, 700, 1)])
def test_the_kernel_is_its_definition(name, queries, windows, locked):
    plan = PLANS[name]
    work = random_launch(plan, queries, windows, locked=locked)
    tile = BLOCKS if plan.columns > 320 else TILE
    assert assert_kernel_is_naive(*work, plan, 3, tile) == 0
    assert_kernel_is_naive(*work, plan, 3, tile, ess=False)


@triton.jit
def powers(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, kernel._power(tl.load(x + at)))


def test_powers_by_multiply_adds_are_as_near_as_the_error_model_has_it():
    x = torch.cat([torch.linspace(-126.4, 15.9, 2**13 - 4), torch.tensor([-torch.inf, -1e5, 126.5, 3e4])])
    y = torch.full_like(x, torch.nan)
    powers[(1,)](x, y, N=2**13)
    inside = (x >= -125.5) & (x < 16)
    assert (y[inside].double() / torch.exp2(x[inside].double()) - 1).abs().max() < CUBIC_RANGE / 2 + 2**-23
    assert ((y[~inside] >= 0) & ((y[~inside] < 2**-120) | (y[~inside].half() == torch.inf))).all()
    assert torch.equal(y[~inside].half() == torch.inf, x[~inside] >= 16)


def test_an_overflow_of_the_polynomial_is_seen_as_that_of_an_exponential():
    # The window that sits on the queries is of the polynomial's share here, of the exponentials' beside it.
    plan = Plan(27, pilot=True)
    for at in (128, 136):
        queries, patches = random_launch(plan, 20, 700)
        patches.rows[:, at, :27] = queries.rows[:, 3, :27]
        patches.rows[:, at, 27] = -0.5 * queries.rows[0, 3, :27].double().square().sum()
        queries.scale.mul_(100)
        assert assert_kernel_is_naive(queries, patches, plan, 3, TILE) > 0


@pytest.mark.parametrize("multiprocessors", [1, 132], indirect=True)
def test_a_pilot_that_misses_the_heaviest_window_is_made_good(multiprocessors):
    # One window sits on the queries, in a tile that the pilot passes over, and weighs 2^40 times all others.
    plan = Plan(27, pilot=True)
    queries, patches = random_launch(plan, 20, 700)
    patches.rows[:, 100, :27] = queries.rows[:, 3, :27]
    patches.rows[:, 100, 27] = -0.5 * queries.rows[0, 3, :27].double().square().sum()
    queries.scale.mul_(8)
    assert assert_kernel_is_naive(queries, patches, plan, 3, TILE) > 0


@on_any_device
def test_no_split_is_empty_and_splits_of_filler_rows_are_never_made(multiprocessors):
    # With 64-row tiles and rows filled to 128, a last split of filler rows alone gave NaN (3 to 6% of bank sizes).
    for tiles in range(1, 400):
        for blocks in (1, 7, 85):
            each = launch.tiles_per_split(tiles, blocks, 2**14, multiprocessors)
            splits = -(-tiles // each)
            assert (splits - 1) * each < tiles <= splits * each


@pytest.mark.parametrize("multiprocessors", [132], indirect=True)
def test_banks_whose_last_tile_is_filler_give_no_nan(monkeypatch):
    # 171 windows of each of 4 coordinates: rows 192 to 255 are filler, a whole tile of 64.
    monkeypatch.setattr(launch, "FEW_TILES", 1)
    real = launch.run

    def run(queries, patches, plan, channels, configuration, ess):
        return real(queries, patches, plan, channels, Configuration(32, 64, 4, 1), ess)

    monkeypatch.setattr(launch, "run", run)
    bank = ps.PatchBank(smooth_images(171, 1, 2, 2))
    compare(bank, competition("local", bank, 3), [0.5])
    compare(bank, competition("local", bank, 3), [0.05])


@on_any_device
def test_sums_do_not_depend_on_how_many_multiprocessors_share_them(multiprocessors):
    bank = ps.PatchBank(smooth_images(40, 1, 6, 7))
    compare(bank, competition("els-circular", bank, 3), [0.7, 3.0])
    compare(bank, competition("els-circular", bank, 3), [0.05])


def test_without_the_effective_sample_size_the_mean_is_the_same():
    bank = ps.PatchBank(smooth_images(17, 3, 7, 6))
    for sigma in (0.01, 0.1, 1.0):
        arguments = bank.chunk(0, 1), torch.tensor([sigma]).double(), bank, competition("els-circular", bank, 3)
        with_ess, without = posterior_sum(*arguments), posterior_sum(*arguments, ess=False)
        assert torch.equal(with_ess.mean, without.mean)


def test_memory_of_a_failed_try_is_free_before_the_next(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    real_launch, real_clear, alive = launch.launch, device.cache.clear, []

    def failing(queries, patches, *rest):
        if not alive:
            alive.append(weakref.ref(queries.rows))
            raise torch.OutOfMemoryError("so it goes")
        return real_launch(queries, patches, *rest)

    def clear(*arguments):
        assert alive[0]() is None
        real_clear(*arguments)

    monkeypatch.setattr(launch, "launch", failing)
    monkeypatch.setattr(device.cache, "clear", clear)
    compare(bank, competition("els-circular", bank, 3), [0.7, 0.9])
    assert alive
