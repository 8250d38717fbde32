"""Numbers of the whole `fused` engine on the CPU, under Triton's interpreter; test_fused.py runs this file.

Not collected by name: TRITON_INTERPRET has to be set before Triton is imported, and would slow down every other test.
"""

import warnings

import interpreted  # noqa: F401
import pytest
import torch
from conftest import MACHINES, machine_named, smooth_images

import patchscore as ps
from patchscore import engines
from patchscore.engines import autotune as tuning
from patchscore.engines import reference
from patchscore.engines.fused import launch as fused
from patchscore.engines.fused import rows as features
from patchscore.windows import Axis, Competition, Group

LIMIT = 2**30
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_fallback():
    """A kernel that fails would be replaced by `reference`, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine .*")
        yield
    features.cache.clear()


def compare(bank, competition, sigma, tolerance=1e-3, z=None, limit=LIMIT, **options):
    """One noisy image per sigma around images of the bank, in float32, so that both engines read the same."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    if z is None:
        generator = torch.Generator().manual_seed(1)
        x0 = bank.chunk(0, 1).expand(len(sigma), -1, -1, -1)
        z = x0 + sigma.float()[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    got = fused.posterior_sum(z, sigma, bank, competition, limit, **options)
    expected = reference.posterior_sum(z.double(), sigma, bank, competition, LIMIT)
    assert torch.isfinite(got.mean).all()
    assert (got.mean - expected.mean).abs().max() <= tolerance
    torch.testing.assert_close(got.ess, expected.ess, rtol=1e-2, atol=1e-3)
    evidence, expected_evidence = got.m + got.s.log(), expected.m + expected.s.log()
    torch.testing.assert_close(evidence, expected_evidence, rtol=1e-5, atol=3e-2)
    return got


def competition(name, bank, k):
    return machine_named(name, bank, k).competition(k)


def test_the_interpreted_engine_serves_the_cpu(bank):
    assert fused.unavailable(CPU) is None
    assert ps.IdealScore(bank, engine="fused").estimate(bank.chunk(0, 1), 1.0).engine == "fused"


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(
    ("k", "channels", "height", "width"), [(1, 3, 5, 6), (3, 1, 6, 5), (3, 3, 6, 5), (5, 5, 6, 7), (7, 1, 8, 7)]
)
def test_sums_are_the_references(name, k, channels, height, width):
    bank = ps.PatchBank(smooth_images(17, channels, height, width))
    compare(bank, competition(name, bank, k), [0.4, 2.0])


@pytest.mark.parametrize("name", ["local", "els-zeros"])
def test_sums_are_the_references_where_the_window_is_larger_than_the_image(name):
    bank = ps.PatchBank(smooth_images(9, 3, 5, 4))
    compare(bank, competition(name, bank, 7), [1.5])


@pytest.mark.parametrize("name", ["local", "els-circular", "els-zeros"])
@pytest.mark.parametrize("k", [3, 5])
def test_low_noise_is_held(name, k):
    bank = ps.PatchBank(smooth_images(13, 1, 6, 7))
    compare(bank, competition(name, bank, k), [0.005, 0.02, 0.08])


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
@pytest.mark.parametrize("sigma", [10.0, 100.0, 1e4, 1e6])
def test_high_noise_is_held(images, sigma):
    bank = ps.PatchBank(images)
    compare(bank, competition("els-circular", bank, 5), [sigma])


def test_high_noise_takes_fewer_columns_than_pixels():
    bank = ps.PatchBank(low_rank_images(40, 3, 12))
    spectrum = features.spectrum_of(bank, 7, CPU)
    plans = [features.choose_plan(spectrum, 147, sigma, 1e-3, True, True) for sigma in (0.02, 0.3, 30.0)]
    assert plans[0].exact
    assert not plans[1].exact
    assert plans[2].axes
    assert plans[0].columns >= plans[1].columns > plans[2].columns


def test_each_item_has_its_own_noise():
    bank = ps.PatchBank(smooth_images(17, 3, 7, 6))
    compare(bank, competition("els-zeros", bank, 3), [0.3, 100.0, 1.0, 10.0])


@pytest.mark.parametrize("images", [1, 2, 17, 70])
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


def test_any_product_of_axes():
    bank = ps.PatchBank(smooth_images(9, 2, 8, 9))
    axes = [Axis(range(1, 5), range(2, 7)), Axis(range(2, 6))]
    for rows in axes:
        for cols in axes:
            z = bank.chunk(0, 1) + 0.3
            got = fused.posterior_sum(
                z, torch.tensor([0.4]), bank, Competition(3, "zeros", (Group(rows, cols),)), LIMIT
            )
            want = reference.posterior_sum(
                z.double(), torch.tensor([0.4]), bank, Competition(3, "zeros", (Group(rows, cols),)), LIMIT
            )
            served = want.s > 0
            assert torch.equal(served, got.s > 0)
            assert (got.mean - want.mean)[served.expand_as(got.v)].abs().max() < 1e-3


def test_ties_share_their_weight():
    bank = ps.PatchBank(smooth_images(1, 1, 6, 6).repeat(37, 1, 1, 1))
    for sigma in (0.005, 0.5):
        got = compare(bank, competition("local", bank, 3), [sigma], tolerance=1e-5)
        assert (got.ess - 37).abs().max() < 1e-2


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
        got = fused.posterior_sum(z * scale, torch.tensor([sigma]).double(), bank, rule, LIMIT)
        assert torch.isfinite(got.mean).all()
        assert got.mean.abs().max() <= 1


def test_tolerance_is_met():
    bank = ps.PatchBank(smooth_images(17, 3, 7, 6))
    rule = competition("els-circular", bank, 3)
    spectrum = features.spectrum_of(bank, 3, CPU)
    assert features.choose_plan(spectrum, 27, 0.5, 1e-5, True, True).q_lo
    loose = fused.posterior_sum(bank.chunk(0, 1), torch.tensor([0.5]).double(), bank, rule, LIMIT, tolerance=1e-2)
    tight = fused.posterior_sum(bank.chunk(0, 1), torch.tensor([0.5]).double(), bank, rule, LIMIT, tolerance=1e-5)
    expected = reference.posterior_sum(bank.chunk(0, 1).double(), torch.tensor([0.5]).double(), bank, rule, LIMIT)
    assert (loose.mean - expected.mean).abs().max() < 1e-2
    assert (tight.mean - expected.mean).abs().max() < 1e-4


def test_a_machine_without_an_index_passes_its_tolerance_on(monkeypatch):
    bank = ps.PatchBank(smooth_images(9, 1, 6, 6))
    asked = []
    choose_plan = fused.choose_plan

    def watched(spectrum, d, sigma, tolerance, *rest, **options):
        asked.append(tolerance)
        return choose_plan(spectrum, d, sigma, tolerance, *rest, **options)

    monkeypatch.setattr(fused, "choose_plan", watched)
    for tolerance in (None, 1e-4):
        machine = ps.EquivariantLocalScore(bank, 3, "circular", engine="fused", tolerance=tolerance)
        assert machine.estimate(bank.chunk(0, 1), 0.5).engine == "fused"
    assert asked == [fused.TOLERANCE, 1e-4]


def test_chunks_and_kept_rows_give_the_same_numbers(monkeypatch):
    bank = ps.PatchBank(smooth_images(40, 1, 6, 6))
    rule = competition("els-zeros", bank, 3)
    whole = compare(bank, rule, [0.7, 0.9])
    assert features.cache.nbytes > 0
    kept = compare(bank, rule, [0.7, 0.9])
    assert torch.equal(kept.mean, whole.mean)
    features.cache.clear()
    in_parts = compare(bank, rule, [0.7, 0.9], limit=200_000)
    assert (in_parts.mean - whole.mean).abs().max() < 1e-5
    monkeypatch.setattr(features, "CACHE_BYTES_CPU", 0)
    features.cache.clear()
    compare(bank, rule, [0.7, 0.9])
    assert features.cache.nbytes == 0


def test_kept_rows_die_with_their_bank():
    bank = ps.PatchBank(smooth_images(8, 1, 6, 6))
    compare(bank, competition("els-circular", bank, 3), [0.7])
    assert features.cache.nbytes > 0
    del bank
    assert features.cache.nbytes == 0


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    sizes = []

    def patch_rows(bank, start, stop, *rest):
        sizes.append(stop - start)
        if stop - start > 6:
            raise torch.OutOfMemoryError("so it goes")
        return features.patch_rows(bank, start, stop, *rest)

    monkeypatch.setattr(fused, "patch_rows", patch_rows)
    compare(bank, competition("els-circular", bank, 3), [0.7])
    assert sizes == [20, 10, 5, 5, 5, 5]


def test_out_of_memory_in_a_launch_takes_fewer_images_then_fewer_patches(monkeypatch):
    bank = ps.PatchBank(smooth_images(20, 1, 6, 6))
    rule = competition("els-circular", bank, 3)
    sizes = []
    launch = fused.launch

    def short(queries, patches, *rest):
        sizes.append((queries.rows.shape[1] // 36, patches.rows.shape[1]))
        if sizes[-1][0] > 1 or sizes[-1][1] > 256:
            raise torch.OutOfMemoryError("so it goes")
        return launch(queries, patches, *rest)

    monkeypatch.setattr(fused, "launch", short)
    compare(bank, rule, [0.7, 0.9, 1.1, 1.3], limit=2**20)
    items, patches = zip(*sizes, strict=True)
    assert items[:3] == (4, 2, 1)
    assert set(items[3:]) == {1}
    assert patches[-1] <= 256 < patches[0]
    assert features.cache.nbytes == 0  # kept rows would be what there is no room for
    monkeypatch.setattr(fused, "launch", _no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        compare(bank, rule, [0.7])


def _no_memory(*arguments):
    raise torch.OutOfMemoryError("none at all")


def test_memory_limit_too_small_is_refused():
    bank = ps.PatchBank(smooth_images(5, 3, 9, 9))
    with pytest.raises(ValueError, match="memory_limit"):
        fused.posterior_sum(bank.chunk(0, 1), torch.ones(1), bank, competition("els-circular", bank, 3), 1000)


def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(monkeypatch, bank):
    monkeypatch.setattr(fused, "_broken", None)
    monkeypatch.setattr(engines, "_warned", set())
    monkeypatch.setattr(tuning, "_chosen", {})

    def run(*arguments):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(fused, "run", run)
    machine = ps.EquivariantLocalScore(bank, 3, engine="fused")
    expected = ps.EquivariantLocalScore(bank, 3, engine="reference").denoise(bank.chunk(0, 1), 1.0)
    with pytest.warns(RuntimeWarning, match="ptxas died"):
        got = machine.denoise(bank.chunk(0, 1), 1.0)
    assert torch.equal(got, expected)
    assert "ptxas died" in (fused.unavailable(CPU) or "")
