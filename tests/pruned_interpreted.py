"""Numbers of the GPU half of `pruned` on the CPU, under Triton's interpreter; test_pruned_cuda.py runs this file.

Not collected by name, as fused_interpreted.py is not. The interpreter takes milliseconds a program, so few pixels are
asked for, and few windows looked at a second time.
"""

import gc
import itertools
import math
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import interpreted  # noqa: F401
import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.engines import base, native, reference
from patchscore.engines import device as devices
from patchscore.engines.fused import launch as fused
from patchscore.engines.pruned import device_index as lists_rows
from patchscore.engines.pruned import kernels as lists
from patchscore.engines.pruned import recheck as lists_recheck
from patchscore.engines.pruned import triton as pruned_cuda
from patchscore.engines.pruned.engine import _pixels
from patchscore.windows import Axis, Competition, Group

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """No fallback in silence, and a second look at few windows."""
    monkeypatch.setattr(pruned_cuda, "RECHECK", 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine .*")
        yield
    devices.cache.clear()


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Banks of every kind with their indices, built once."""
    made = {}

    def get(channels=3, dtype=torch.uint8, height=7, width=6, count=18, k=3):
        key = channels, dtype, height, width, count, k
        if key not in made:
            images = smooth_images(count, channels, height, width, dtype=dtype)
            bank = ps.PatchBank(images, torch.arange(count) % 3)
            folder = tmp_path_factory.mktemp("index")
            made[key] = bank, ps.PatchIndex.build(bank, k, folder, cells=64, progress=False)
        return made[key]

    return get


def pruned(bank, index, k=3, padding_mode="circular", **options):
    if "tolerance" not in options:
        options.setdefault("budget", 1.0)
    return ps.EquivariantLocalScore(bank, k, padding_mode, engine="pruned", index=index, **options)


SIX = range(1, 4), range(2, 4)
"""Rows and columns of six pixels."""


def some_pixels(machine, rows, cols):
    """The competition of a circular machine at a few pixels, against all windows."""
    (group,) = machine.competition(machine.patch_size).groups
    inside = Group(Axis(rows, group.rows.windows), Axis(cols, group.cols.windows))
    return Competition(machine.patch_size, "circular", (inside,))


def definition(machine, z, sigma, bank=None, pixels=SIX):
    sigmas = torch.full((len(z),), sigma, dtype=torch.float64)
    found = reference.posterior_sum(z.double(), sigmas, bank or machine.bank, some_pixels(machine, *pixels), 2**30)
    return _pixels(found, *pixels)


def sums(machine, z, sigma, bank=None, limit=2**30, pixels=SIX):
    sigmas = torch.full((len(z),), sigma, dtype=torch.float64)
    competition = some_pixels(machine, *pixels)
    found = machine.pruned.posterior_sum(z, sigmas, bank or machine.bank, competition, limit)
    return replace(_pixels(found, *pixels), pairs=found.pairs)


def every(machine, bank=None, pixels=6):
    """Pairs of so many pixels."""
    (group,) = machine.competition(machine.patch_size).groups
    return pixels * len(bank or machine.bank) * group.windows_per_image


def rms(x):
    return x.square().mean().sqrt().item()


def within(error, stderr, times=3.0):
    """Share of pixels off by at most so many standard errors, or by what half floats round."""
    return (error.abs() <= times * stderr + 5e-4).double().mean().item()


def test_the_interpreted_half_serves_the_cpu(indexed):
    bank, index = indexed()
    assert pruned_cuda.unavailable(CPU) is None
    machine = pruned(bank, index)
    assert machine.engine_on("cpu") == "pruned"
    sums(machine, noisy(bank, 1.0, dtype=torch.float32), 1.0)
    assert devices.cache.has(index.at(3), CPU, ())


def test_every_machine_and_border_is_the_references(tmp_path):
    bank = ps.PatchBank(smooth_images(10, 3, 5, 6))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    z = noisy(bank, 0.7, dtype=torch.float32)
    for padding_mode in ("zeros", "circular"):
        machine = pruned(bank, index, padding_mode=padding_mode)
        found = machine.estimate(z, 0.7)
        truth = ps.EquivariantLocalScore(bank, 3, padding_mode, engine="reference").estimate(z.double(), 0.7)
        assert rms(found.mean - truth.mean) < 5e-4
        assert within(found.mean - truth.mean, found.stderr) == 1
        torch.testing.assert_close(found.ess, truth.ess.float(), rtol=0.03, atol=1e-2)
        assert found.pairs == truth.pairs


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint8), (3, torch.uint8), (4, torch.float32)])
def test_the_whole_budget_gives_the_references_sums(indexed, channels, dtype):
    bank, index = indexed(channels, dtype)
    machine = pruned(bank, index)
    for sigma in (0.2, 1.0, 5.0):
        z = noisy(bank, sigma, dtype=torch.float32)
        truth, found = definition(machine, z, sigma), sums(machine, z, sigma)
        error = found.mean - truth.mean
        assert rms(error) < 5e-4
        assert within(error, found.stderr) == 1
        torch.testing.assert_close(found.ess, truth.ess, rtol=0.03, atol=1e-2)
        mass = (found.m + found.s.log()) - (truth.m + truth.s.log())
        assert mass.abs().max() < 0.05
        assert found.pairs == every(machine)


@pytest.mark.parametrize("columns", [48, 32])
def test_axes_left_out_are_put_right_by_the_second_look_which_says_its_error(indexed, monkeypatch, columns):
    monkeypatch.setattr(pruned_cuda, "RECHECK", 8)
    monkeypatch.setattr(lists_rows, "COLUMNS", (columns,))
    bank, index = indexed(3, height=9, width=8, count=30, k=5)
    assert index.at(5).rank == 40  # of 75
    z = noisy(bank, 1.0, dtype=torch.float32)
    truth = definition(pruned(bank, index, 5), z, 1.0)
    found = [sums(pruned(bank, index, 5, seed=seed), z, 1.0) for seed in range(3)]
    error = rms(torch.stack([x.mean - truth.mean for x in found]))
    # Of so few windows compared again, doubt is what remains.
    assert 0.6 < rms(torch.stack([x.stderr for x in found])) / error < 2.7
    assert error < 0.01


@pytest.mark.parametrize("sigma", [0.005, 0.05])
def test_low_noise_is_decided_by_the_second_look(indexed, sigma):
    bank, index = indexed()
    machine = pruned(bank, index, budget=0.5)
    z = noisy(bank, sigma, dtype=torch.float32)
    truth, found = definition(machine, z, sigma), sums(machine, z, sigma)
    assert (found.mean - truth.mean).abs().max() < 1e-3
    torch.testing.assert_close(found.ess, truth.ess, rtol=1e-2, atol=1e-2)


def test_more_windows_may_contribute_than_any_list_of_neighbours_holds(indexed):
    bank, index = indexed(1, height=12, width=12, count=40)
    machine = pruned(bank, index, budget=0.7)
    z = noisy(bank, 30.0, dtype=torch.float32)
    truth, found = definition(machine, z, 30.0), sums(machine, z, 30.0)
    assert truth.ess.min() > 3000
    assert (found.ess / truth.ess - 1).abs().max() < 0.1
    assert within(found.mean - truth.mean, found.stderr) > 0.95


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_a_part_of_the_windows_comes_with_its_error(indexed, sigma):
    bank, index = indexed(1, height=12, width=12, count=40)
    machine = pruned(bank, index, budget=0.1)
    z = noisy(bank, sigma, dtype=torch.float32)
    truth, found = definition(machine, z, sigma), sums(machine, z, sigma)
    assert 0.08 * every(machine) < found.pairs < 0.12 * every(machine)
    assert within(found.mean - truth.mean, found.stderr) > 0.9
    assert 0.3 < rms(found.stderr) / rms(found.mean - truth.mean) < 10
    assert rms(found.mean - truth.mean) < 0.1


def test_many_samples_come_closer_than_one_and_scatter_as_they_say(indexed):
    bank, index = indexed(1)
    z = noisy(bank, 1.0, dtype=torch.float32)
    machine = pruned(bank, index)
    truth = definition(machine, z, 1.0).mean
    found = [sums(pruned(bank, index, budget=0.1, seed=seed), z, 1.0) for seed in range(12)]
    errors = torch.stack([x.mean - truth for x in found])
    # Independent errors would leave 0.29 of it.
    assert rms(errors.mean(0)) < 0.5 * rms(errors)
    stated = torch.stack([x.stderr for x in found])
    assert 0.5 < rms(stated) / rms(errors) < 3


def test_a_tolerance_is_met_without_looking_everywhere(indexed):
    bank, index = indexed(1, height=12, width=12, count=40)
    machine = pruned(bank, index, tolerance=0.05)
    z = noisy(bank, 0.3, dtype=torch.float32)
    truth, found = definition(machine, z, 0.3), sums(machine, z, 0.3)
    assert rms(found.mean - truth.mean) < 0.075
    assert found.pairs < 0.9 * every(machine)


def test_classes_compete_from_one_index(indexed):
    bank, index = indexed()
    machine = pruned(bank, index)
    z = noisy(bank, 0.7, dtype=torch.float32)
    for label in (0, 2):
        chosen = bank.select(label)
        truth, found = definition(machine, z, 0.7, chosen), sums(machine, z, 0.7, chosen)
        assert rms(found.mean - truth.mean) < 5e-4
        torch.testing.assert_close(found.ess, truth.ess, rtol=0.03, atol=1e-2)
        assert found.pairs == every(machine, chosen)


def test_repeated_windows_count_as_often_as_they_occur(tmp_path):
    images = smooth_images(12, 1, 9, 9)
    images[:, :, :5] = 0
    bank = ps.PatchBank(images)
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    assert index.at(3).counts is not None
    machine = pruned(bank, index)
    for sigma in (0.3, 3.0):
        z = noisy(bank, sigma, dtype=torch.float32)
        truth, found = definition(machine, z, sigma), sums(machine, z, sigma)
        assert within(found.mean - truth.mean, found.stderr) > 0.95
        torch.testing.assert_close(found.ess, truth.ess, rtol=0.05, atol=1e-2)
        assert ((found.m + found.s.log()) - (truth.m + truth.s.log())).abs().max() < 0.05


def test_mixed_noise_in_one_batch_and_an_item_alone(indexed):
    bank, index = indexed()
    z = noisy(bank, 0.5, 3, dtype=torch.float32)
    machine = pruned(bank, index, budget=0.2, seed=3)
    levels = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    together = machine.pruned.posterior_sum(z, levels, bank, some_pixels(machine, *SIX), 2**30)
    for item, sigma in enumerate(levels.tolist()):
        alone = sums(machine, z[item : item + 1], sigma)
        for got, expected in ((together.mean, alone.mean), (together.stderr, alone.stderr)):
            assert (got[item : item + 1, :, 1:4, 2:4] - expected).abs().max() < 1e-5


def test_the_seed_decides_and_nothing_else(indexed):
    bank, index = indexed(1)
    z = noisy(bank, 1.0, dtype=torch.float32)
    first, again, other = (sums(pruned(bank, index, budget=0.1, seed=seed), z, 1.0) for seed in (3, 3, 4))
    for name in ("m", "s", "v", "s2", "vv", "vs", "ss"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.mean, other.mean)


def test_what_does_not_fit_on_the_device_is_streamed(indexed, monkeypatch):
    bank, index = indexed()
    for label in (None, 1):
        z = noisy(bank, 1.0, dtype=torch.float32)
        chosen = bank if label is None else bank.select(label)
        machine = pruned(bank, index, budget=0.3)
        kept = sums(machine, z, 1.0, chosen)
        devices.cache.clear()
        monkeypatch.setattr(lists_rows, "cache_limit", lambda device: 40_000)
        parts = list(lists_rows.pieces(index.at(3), CPU))
        assert len(parts) > 3
        assert [cell for part in parts for cell in part.cells] == list(range(len(index.at(3).sizes)))
        streamed = sums(machine, z, 1.0, chosen)
        for name in ("m", "s", "v", "s2", "vv", "vs", "ss"):
            assert torch.equal(getattr(kept, name), getattr(streamed, name))
        monkeypatch.undo()
        monkeypatch.setattr(pruned_cuda, "RECHECK", 4)


def test_an_index_that_finds_no_memory_is_streamed(indexed, monkeypatch):
    bank, index = indexed(1)
    z = noisy(bank, 1.0, dtype=torch.float32)
    machine = pruned(bank, index, budget=0.3)
    kept = sums(machine, z, 1.0)
    devices.cache.clear()
    load, loaded = lists_rows._load, []

    def short(part, cells, device):
        loaded.append(len(cells))
        if len(cells) == len(part.sizes):
            raise torch.OutOfMemoryError("so it goes")
        return load(part, cells, device)

    monkeypatch.setattr(lists_rows, "_load", short)
    assert torch.equal(sums(machine, z, 1.0).mean, kept.mean)
    assert len(loaded) > 6


def test_windows_on_the_device_are_those_of_the_index(indexed, monkeypatch):
    bank, index = indexed()
    part = index.at(3)
    monkeypatch.setattr(lists_rows, "UPLOADED", 5000)  # many blocks of cells
    (rows,) = lists_rows.pieces(part, CPU)
    per_image = {
        c: len(r.rows) * len(r.cols) for r in part.regions for c in range(r.first_cell, r.first_cell + r.cells)
    }
    for cell in (0, 7, len(part.sizes) - 1):
        first, size = int(part.starts[cell]), int(part.sizes[cell])
        assert torch.equal(rows.ids[first : first + size], torch.from_numpy(part.ids(cell).copy()))
        region = next(r for r in part.regions if r.first_cell <= cell < r.first_cell + r.cells)
        number = part.regions.index(region)
        for at in range(first, first + size):
            image, place = divmod(int(rows.ids[at]), per_image[cell])
            row, col = region.rows[place // len(region.cols)], region.cols[place % len(region.cols)]
            padded = torch.nn.functional.pad(bank.chunk(image, image + 1), (1, 1, 1, 1))
            window = padded[:, :, row : row + 3, col : col + 3]
            torch.testing.assert_close(rows.rows[at, : part.rank].float(), part.project(window, number)[0],
                                       atol=2e-3, rtol=2e-3)  # fmt: skip
            value = bank.chunk(image, image + 1)[0, :, row, col]
            torch.testing.assert_close(rows.values[at, 2:5].float() * 128 / 127.5, value)
    half = -0.5 * rows.rows[:, : part.rank].double().square().sum(1)
    bias = rows.rows[:, part.rank : part.rank + 3].double().sum(1)
    torch.testing.assert_close(bias, half, rtol=1e-6, atol=1e-6)


def test_a_memory_limit_and_running_out_of_memory_decide_nothing(indexed, monkeypatch):
    bank, index = indexed(1)
    z = noisy(bank, 1.0, dtype=torch.float32)
    machine = pruned(bank, index, budget=0.3)
    whole = sums(machine, z, 1.0)
    sizes = []
    part = pruned_cuda.Scan._part

    def watched(self, queries, memory_limit):
        sizes.append(len(queries))
        return part(self, queries, memory_limit)

    monkeypatch.setattr(pruned_cuda.Scan, "_part", watched)
    tight = sums(machine, z, 1.0, limit=50_000)
    assert max(sizes) < 6
    assert (whole.mean - tight.mean).abs().max() < 1e-5
    sizes.clear()

    def short(self, queries, memory_limit):
        sizes.append(len(queries))
        if len(queries) > 2:
            raise torch.OutOfMemoryError("so it goes")
        return part(self, queries, memory_limit)

    monkeypatch.setattr(pruned_cuda.Scan, "_part", short)
    again = sums(machine, z, 1.0)
    assert sizes == [6, 3, 2, 2, 2]
    assert (whole.mean - again.mean).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("sigma", "scale", "budget"),
    [(1e-6, 1.0, 0.2), (1e4, 1.0, 0.2), (0.1, 1e6, 0.2), (1.0, 1.0, 1e-5), (0.05, 1.0, 1e-5)],
)
def test_nothing_is_ever_nan(indexed, sigma, scale, budget):
    bank, index = indexed(1)
    z = noisy(bank, min(sigma, 1.0), dtype=torch.float32) * scale
    found = sums(pruned(bank, index, budget=budget), z, sigma)
    for part in (found.mean, found.stderr, found.ess):
        assert torch.isfinite(part).all()
    assert found.mean.abs().max() < 1.001


def test_rows_die_with_their_index(tmp_path):
    bank = ps.PatchBank(smooth_images(8, 1, 6, 6))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", progress=False)
    machine = pruned(bank, index, budget=0.5)
    sums(machine, noisy(bank, 1.0, dtype=torch.float32), 1.0)
    assert devices.cache.nbytes > 0
    del machine, index
    gc.collect()  # an index and its parts know each other
    assert devices.cache.nbytes == 0


def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(indexed, monkeypatch):
    bank, index = indexed(1)
    monkeypatch.setattr(pruned_cuda, "_broken", None)
    monkeypatch.setattr(base, "_warned", set())

    class Broken:
        def __getitem__(self, grid):
            def start(*arguments, **constants):
                raise RuntimeError("ptxas died")

            return start

    monkeypatch.setattr(lists, "allocate_kernel", Broken())
    machine = pruned(bank, index)
    z = noisy(bank, 1.0, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="'pruned' cannot serve: its kernel failed to compile .ptxas died"):
        found = machine.denoise(z, 1.0)
    expected = ps.EquivariantLocalScore(bank, 3, "circular", engine="reference").denoise(z, 1.0)
    assert (found - expected).abs().max() < 1e-6
    assert "ptxas died" in (pruned_cuda.unavailable(CPU) or "")


def test_a_query_looks_under_few_parents_and_foresees_the_others(tmp_path):
    bank = ps.PatchBank(smooth_images(18, 3, 7, 6))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", cells=192, progress=False)
    part, sigma = index.at(3), 0.4
    engine = pruned(bank, index, budget=0.05).pruned
    reach = [engine.reach(part, 0, level) for level in (0.05, sigma, 1.0, 100.0)]
    assert reach == sorted(reach)
    assert reach[0] < 0.5
    assert reach[-1] > 0.8
    place = pruned_cuda.Place(0, range(1, 3), range(2, 4))
    scan = pruned_cuda.Scan(
        engine, part, bank, sigma, noisy(bank, sigma, dtype=torch.float32), [place], "circular", 2**30
    )
    queries = scan._shared(scan._queries([None]), torch.tensor([[0.05]]))
    of = scan._foresee(queries)
    (span,) = queries.spans
    assert span.families < part.regions[0].cells // 16

    # Directly: the mean of a Gaussian kernel over a Gaussian is a Gaussian; relative to e^(-|q|^2 / (2 kernel)).
    q = queries.q.double()[:, None]

    def bits(mean, variance, kernel, repeats):
        along = 0.5 * torch.log1p(variance.T / kernel) + (q - mean.T) ** 2 / (2 * (kernel + variance.T))
        return (repeats - along.sum(2) + q.square().sum(2) / (2 * kernel)) / torch.log(torch.tensor(2.0))

    mean, variance, repeats = part.mean.double(), part.variance.double(), part.log_repeats.double()
    once, twice = bits(mean, variance, sigma**2, repeats), bits(mean, variance, sigma**2 / 2, 2 * repeats)
    family = of.family.view(len(q), span.families).long()
    cells = (family[..., None] * 16 + torch.arange(16)).flatten(1)
    foreseen = of.foreseen.view(len(q), span.families, 2, 16)
    tolerance = {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(foreseen[:, :, 0].flatten(1).double(), once.gather(1, cells), **tolerance)
    score = 0.5 * once + 0.25 * twice
    torch.testing.assert_close(foreseen[:, :, 1].flatten(1).double(), score.gather(1, cells), **tolerance)

    inside = part.regions[0].cells // 16
    windows = part.sizes.view(-1, 16).sum(1)[:inside].double()
    every = bits(part.parent_mean[:, :inside].double(), part.parent_variance[:, :inside].double(), sigma**2, 0.0)
    weight = windows * (every - (every + windows.log2()).amax(1, keepdim=True)).exp2()
    chosen = torch.zeros_like(weight).scatter_(1, family, 1.0)
    assert ((weight * chosen).sum(1) / weight.sum(1)).median() > 1 - pruned_cuda.MOST_SKIPPED
    torch.testing.assert_close(of.skipped[:, 0].double(), (weight * (1 - chosen)).sum(1), rtol=1e-3, atol=1e-4)
    best = weight.sort(1, descending=True).values[:, span.families - 1]
    assert ((weight >= 0.999 * best[:, None]) | (chosen == 0)).all()

    z = noisy(bank, sigma, dtype=torch.float32)
    truth = definition(pruned(bank, index), z, sigma).mean
    found = [sums(pruned(bank, index, budget=0.2, seed=seed), z, sigma) for seed in range(3)]
    errors, stated = torch.stack([x.mean - truth for x in found]), torch.stack([x.stderr for x in found])
    assert within(errors, stated) > 0.85
    assert rms(errors) < 3 * rms(stated) < 0.3


@pytest.mark.parametrize("row", [2, 0])
def test_a_heavy_window_where_none_was_expected_is_found_through_the_neighbour(tmp_path, monkeypatch, row):
    bank = ps.PatchBank(smooth_images(18, 3, 7, 6))
    index = ps.PatchIndex.build(bank, 3, tmp_path / "i", cells=192, progress=False)
    part, sigma = index.at(3), 0.15
    z = noisy(bank, sigma, dtype=torch.float32)
    machine = pruned(bank, index, padding_mode="zeros", budget=0.02)
    inside = Axis(range(row + 1, row + 2), range(1, 6)), Axis(range(2, 3), range(1, 5))
    along = Axis(range(row, row + 1), range(1, 6) if row else None), inside[1]
    competition = Competition(3, "zeros", (Group(*inside), Group(*along)))
    truth = reference.posterior_sum(z.double(), torch.tensor([sigma]).double(), bank, competition, 2**30)
    # The cells of the windows of images that come close are expected to hold next to nothing.
    number = 0 if row else part.region_at[0, 1, 1, 5]
    region = part.regions[number]
    place = (row - region.rows.start) * len(region.cols) + 2 - region.cols.start
    cells = [c for c in range(region.first_cell, region.first_cell + region.cells) if place in part.ids(c)]
    assert len(cells) == 1
    cells_there = machine.pruned.cells(part, CPU)
    cells_there.log_repeats[cells[0]] -= 60

    def error():
        found = machine.pruned.posterior_sum(z, torch.tensor([sigma]).double(), bank, competition, 2**30)
        return (found.mean - truth.mean)[0, :, row, 2].abs().max()

    assert error() < 0.02
    monkeypatch.setattr(lists_recheck, "ROUNDS", 0)
    assert error() > 0.05


# The kernels one by one.


def planned(log_share, n, budget, luck, quantum=16):
    """`allocate_kernel` and `list_kernel` on families of one region: items, and what they are to be unbiased for."""
    queries, cells = log_share.shape
    integers, slots = {"dtype": torch.int32}, cells // 16
    family = torch.arange(slots, **integers).repeat(queries)
    foreseen = log_share.reshape(queries * slots, 1, 16).repeat(1, 2, 1)  # to expect, and to score
    first_slot, n_slots = torch.arange(queries) * slots, torch.full((queries,), slots, **integers)
    wanted, floor = torch.full((queries,), budget * float(n.sum())), torch.full((queries,), 0.02 * budget)
    level, counts = torch.empty(3, queries), torch.empty(3, queries, **integers)
    common = foreseen, family, n, first_slot, n_slots
    lists.allocate_kernel[queries,](*common, wanted, floor, luck, level, counts, queries, QUANTUM=quantum, BP=64, BC=64)
    first = torch.nn.functional.pad(counts[0].long().cumsum(0), (1, 0))
    total = int(first[-1])
    cell, take = torch.empty(total, **integers), torch.empty(total, **integers)
    factor, chance, share = (torch.empty(total) for _ in range(3))
    promising, sure = torch.empty(queries, dtype=torch.int64), torch.empty(queries)
    far, unseen = torch.empty(queries, 4), torch.empty(queries, 4)
    moments = torch.zeros(cells, 4)
    moments[:, 0] = 1
    lists.list_kernel[queries,](
        *common, floor, luck, level, moments, first, cell, take, factor, chance, share, promising, sure, far, unseen,
        queries, QUANTUM=quantum, NM=4, BC=64,
    )  # fmt: skip
    weight = n * (log_share[0] - log_share[0][n > 0].max()).exp2()
    foresight = torch.stack([sure + far[:, 0], torch.full((queries,), float(weight.sum()))])
    return first, counts, cell, take, factor, chance, promising, foresight


def test_kernels_are_called_with_the_types_they_are_compiled_for(indexed, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import compile_report

    bank, index = indexed()
    of_tensors = {
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.uint8: "*u8",
    }
    seen = {}

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(lists, f"{name}_kernel")

        def __getitem__(self, grid):
            def start(*arguments, **constants):
                seen[self.name] = dict(zip(self.kernel.arg_names, arguments, strict=False))
                self.kernel[grid](*arguments, **constants)
                assert {*seen[self.name], *constants} - {"num_warps", "num_stages"} == {*self.kernel.arg_names}

            return start

    names = ("scan", *dict.fromkeys(name.partition(",")[0] for name in compile_report.LISTS))
    for watched in [Watched(name) for name in names]:
        monkeypatch.setattr(lists, f"{watched.name}_kernel", watched)
    sums(pruned(bank, index, budget=0.3), noisy(bank, 1.0, dtype=torch.float32), 1.0, bank.select([0, 1]))
    assert set(seen) == set(names)
    for name, arguments in seen.items():
        types = compile_report.list_types(name, list(arguments))
        for argument, value in arguments.items():
            number = "fp32" if isinstance(value, float) else "i32"
            found = of_tensors[value.dtype] if isinstance(value, torch.Tensor) else number
            assert found == types[argument], (name, argument)


def test_prefixes_cost_the_budget_and_stand_for_every_window():
    generator = torch.Generator().manual_seed(0)
    cells, queries = 160, 24
    n = torch.randint(0, 200, (cells,), generator=generator).float()
    n[5] = 5000
    log_share = (8 * torch.randn(cells, generator=generator)).expand(queries, cells)
    for budget in (0.02, 0.3):
        # Evenly spaced luck: on average over it, systematic sampling is exact.
        luck = (torch.arange(queries) + 0.5) / queries
        first, counts, cell, take, factor, chance, promising, foresight = planned(log_share, n, budget, luck)
        torch.testing.assert_close(foresight[0], foresight[1])
        assert counts[2].sum() == take.sum()
        assert counts[1].sum() == ((take + 63) // 64).sum()
        assert abs(take.sum() / queries / n.sum() / budget - 1) < 0.03
        assert (take <= n[cell.long()]).all()
        assert (take > 0).all()
        for query in range(queries):
            mine = cell[first[query] : first[query + 1]]
            assert torch.equal(mine, mine.unique())
            assert first[query] <= promising[query] < first[query + 1]
            assert chance[promising[query]] == 1
        # The more is expected of a cell, the larger its share, and what is taken is whole, or a multiple of a quantum.
        share = take / n[cell.long()]
        assert ((share == 1) | (take % 16 == 0)).all()
        assert share[log_share[0, cell.long()] == log_share[0][n > 0].max()].min() == 1
        # Horvitz & Thompson: on average an item's windows stand for all of its cell.
        stand_for = torch.zeros(cells).index_add_(0, cell.long(), take * factor) / queries
        often = n * budget * 0.02 / 16 * queries > 1  # cells drawn by the floor alone once or more
        taken = stand_for[often & (n > 0)] / n[often & (n > 0)]
        assert abs(taken.mean() - 1) < 0.2
        assert (chance <= 1).all()


def test_picks_follow_the_weights():
    # One query, one cell: windows of known weights are met as often as systematic sampling has it.
    generator = torch.Generator().manual_seed(1)
    count, picks = 150, 200
    p = torch.zeros(count, 16, dtype=torch.float16)
    p[:, 0] = torch.randn(count, generator=generator)
    p[:, 1] = -0.5 * p[:, 0].float().square()
    q = torch.zeros(1, 16, dtype=torch.float16)
    q[0, 0], q[0, 1] = 1.5, 1.0
    bits, turn = 0.7, 37
    logs = bits * (p.float() @ q.float()[0])
    place = torch.arange(count).roll(-turn)
    tiles = torch.stack([logs[place[a : a + 64]].exp2().sum().log2() for a in range(0, count, 64)])
    ones = torch.zeros(1, dtype=torch.int32)
    window, weight = torch.empty(picks, dtype=torch.int64), torch.empty(picks)
    ids = torch.arange(count) * 7
    lists.pick_kernel[picks,](
        q, p, logs, ids, torch.zeros(1, dtype=torch.int64), ones + count, ones + turn,
        torch.zeros(picks, dtype=torch.int64), (torch.arange(picks) + 0.5) / picks, ones, ones, ones + count,
        torch.zeros(1, dtype=torch.int64), tiles, ids, window, weight, weight, 0, 1, bits,
        KA=16, KB=0, BP=64, BT=2, COUNTED=False, ORDERED=False,
    )  # fmt: skip
    met = torch.bincount(window // 7, minlength=count)
    expected = picks * logs.exp2() / logs.exp2().sum()
    assert (met - expected).abs().max() <= 1 + 1e-3
    torch.testing.assert_close(weight, logs[window // 7])


@pytest.mark.parametrize("bytes_", [True, False])
def test_distances_are_those_of_padded_windows(bytes_):
    generator = torch.Generator().manual_seed(2)
    images = smooth_images(5, 2, 6, 7, dtype=torch.uint8 if bytes_ else torch.float32)
    k, picks = 5, 19
    z = torch.randn(3, 2 * k * k, generator=generator)
    place = torch.randint(0, 5 * 6 * 7, (3, picks), generator=generator)
    distance, values = torch.empty(3, picks, dtype=torch.float64), torch.empty(3, picks, 2)
    lists.distance_kernel[3, 2](
        z, images, place, distance, values, R=picks, C=2, H=6, W=7, SIZE=k, BYTES=bytes_, BR=16, BD=32
    )
    padded = torch.nn.functional.pad(ps.PatchBank(images).chunk(0, 5), (2, 2, 2, 2))
    for query, pick in itertools.product(range(3), range(picks)):
        image, row, col = place[query, pick] // 42, place[query, pick] % 42 // 7, place[query, pick] % 7
        there = padded[image, :, row : row + k, col : col + k]
        assert abs(distance[query, pick] - (z[query] - there.flatten()).square().sum()) < 1e-4
        torch.testing.assert_close(values[query, pick], there[:, 2, 2])


@pytest.mark.parametrize("bytes_", [True, False])
def test_what_neighbours_propose_is_moved_along_and_weighed_as_by_the_scan(bytes_):
    generator = torch.Generator().manual_seed(2)
    images = smooth_images(5, 2, 6, 7, dtype=torch.uint8 if bytes_ else torch.float32)
    k, rank, axes_used, bits, each = 5, 12, 10, 0.3, 8
    rows, cols = range(1, 4), range(2, 5)
    z = torch.randn(3, 2 * k * k, generator=generator)
    offered = torch.randint(0, 5 * 6 * 7, (4, each), generator=generator)
    offered[0, 5:] = offered[3] = -1
    beside = torch.tensor([[1, 2, 2, 1], [2, 0, 3, 2], [0, 1, 0, 1]])
    geometry = torch.tensor([[rows.start, cols.start, len(rows), len(cols), 1]] * 3, dtype=torch.int32)
    q = torch.randn(3, axes_used, generator=generator).half()
    centre = torch.randn(2, 2 * k * k, generator=generator)
    axes = 0.2 * torch.randn(2, 2 * k * k, rank, generator=generator)
    place = torch.full((3, 4 * each), -1)
    distance, values = torch.empty(3, 4 * each, dtype=torch.float64), torch.empty(3, 4 * each, 2)
    weight = torch.empty(3, 4 * each)
    lists.propose_kernel[3, 2](
        z, images, offered, beside, geometry, q, centre, axes, place, distance, values, weight, bits,
        R=4 * each, C=2, H=6, W=7, SIZE=k, BYTES=bytes_, A=axes_used, RANK=rank, BR=16, BD=32, BA=16,
    )  # fmt: skip
    padded = torch.nn.functional.pad(ps.PatchBank(images).chunk(0, 5), (2, 2, 2, 2))
    met = 0
    # The query to the right of one sees a window one column further right, and so on.
    steps = (0, 1), (0, -1), (1, 0), (-1, 0)
    for query, side, number in itertools.product(range(3), range(4), range(each)):
        at, pick = int(offered[beside[query, side], number]), side * each + number
        image, row, col = at // 42, at % 42 // 7 - steps[side][0], at % 7 - steps[side][1]
        if at < 0 or row not in rows or col not in cols:
            assert distance[query, pick].isinf()
            continue
        met += 1
        there = padded[image, :, row : row + k, col : col + k]
        assert place[query, pick] == image * 42 + row * 7 + col
        assert abs(distance[query, pick] - (z[query] - there.flatten()).square().sum()) < 1e-4
        torch.testing.assert_close(values[query, pick], there[:, 2, 2])
        features = ((there.flatten() - centre[1]) @ axes[1, :, :axes_used]).half().double()
        expected = bits * (features @ q[query].double() - features.square().sum() / 2)
        assert abs(weight[query, pick] - expected) < 1e-2
    assert met > 5


def corrected(sample, m, s, threshold, v, guided, blur):
    """What `correct_kernel` finds of one query with one channel, in plain Python: m's move, the mean, its variance."""
    kept = [one for one in sample if one["met"] > 0]
    for one in kept:
        one["rough"] = 2 ** (one["weight"] + one["stands"] - m)
        one["exact"] = 2 ** (one["own"] + one["repeats"] + one["stands"])
    sure, drawn = [one for one in kept if one["met"] <= 1], [one for one in kept if one["met"] > 1]

    def total(of, name, value=False):
        return sum(one[name] * one["met"] * (one["value"] if value else 1) for one in of)

    found = total(kept, "exact")
    if not found > 0:
        return 0.0, v / s, 0.0
    if not guided:
        mean = total(kept, "exact", True) / found
        variance = sum(
            (1 - 1 / one["met"]) * (one["exact"] * one["met"] / found * (one["value"] - mean)) ** 2 for one in kept
        )
        moved = math.log2(found / total(kept, "rough"))
    else:
        rest = max(0.0, s - total(sure, "rough"))
        known = total(sure, "exact") / total(sure, "rough") if sure else 0.0
        count = 4 if known > 0 else 0
        each = total(drawn, "rough") / len(drawn) if drawn else 1.0
        ratio = (total(drawn, "exact") / each + count * known) / (len(drawn) + count)
        whole = total(sure, "exact") + ratio * rest
        share = ratio * rest / whole
        spread = sum((one["exact"] / (ratio * one["rough"]) - 1) ** 2 for one in kept) / len(kept)
        spread = min(1.0, spread) / (len(drawn) + 4)
        mean = min(1.0, max(-1.0, (v - total(sure, "rough", True)) / rest)) if rest > 1e-6 * s else 0.0
        kept_change = measured = noise = 0.0
        if drawn and rest > 0:
            rough_mean = total(drawn, "rough", True) / total(drawn, "rough")
            exact_mean = total(drawn, "exact", True) / total(drawn, "exact")
            for one in drawn:
                d = one["exact"] * one["met"] / total(drawn, "exact") * (one["value"] - exact_mean)
                d -= one["rough"] * one["met"] / total(drawn, "rough") * (one["value"] - rough_mean)
                measured += share**2 * (1 - 1 / one["met"]) * d**2
                excess = (one["exact"] - ratio * one["rough"]) / whole
                noise += excess**2 * one["met"] * (one["value"] - mean) ** 2
            change = exact_mean - rough_mean
            expected = max(noise, share**2 * change**2 - 9 * measured)
            kept_change = expected / (expected + measured) if expected > 0 else 0.0
            mean += kept_change * change
        middle = total(sure, "exact", True) / total(sure, "exact") if sure else mean
        variance = 4 * kept_change * measured + 2 * noise + (share * (1 - share) * (mean - middle)) ** 2 * spread
        mean = (1 - share) * middle + share * mean
        moved = math.log2(whole / s)
    apart = [one["own"] / blur - one["weight"] + one["repeats"] for one in kept]
    deviation = statistics.pstdev(apart)
    if len(kept) >= 2 and deviation * blur >= 3:
        lead = max(one["own"] / blur for one in kept) - statistics.fmean(apart) - threshold
        doubt = min(1.0, max(0.0, 1 - lead / (4 * deviation)))
        variance += doubt * statistics.pvariance([one["value"] for one in kept])
    return moved - m, mean, variance


@pytest.mark.parametrize("guided", [True, False])
def test_the_correction_is_that_of_plain_python(guided):
    generator = torch.Generator().manual_seed(3)
    queries, windows = 24, 37

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weight = 3 * normal(queries, windows, dtype=torch.float32)
    own = weight.double() - 5 + normal(queries, 1).exp() * normal(queries, windows)
    repeats = (normal(queries, windows, dtype=torch.float32) > 1).float()
    weight += repeats
    stands_for, met = normal(queries, windows).exp(), normal(queries, windows).exp().clamp(min=1)
    met = met.masked_fill(normal(queries, windows) < -0.5, 0.0)
    met[0] = 0  # nothing is known
    met[1] = met[1].clamp(max=1)  # all is
    met[2] = met[2].masked_fill(met[2] == 1, 0)  # nothing for certain
    values = normal(queries, windows, 2, dtype=torch.float32).clamp(-1, 1)
    m = normal(queries)
    rough = (weight + stands_for - m[:, None]).exp2() * met
    s = rough.sum(1) * torch.rand(queries, generator=generator).double().add(0.7) + 0.1
    v = s[:, None] * normal(queries, 2).tanh()
    threshold = weight.double().amax(1) - 1
    blur = 1.0 if guided else 1.7
    found = torch.cat([torch.stack([m, s, torch.ones_like(s), threshold], 1), v], 1)
    result = torch.empty(queries, 6, dtype=torch.float64)
    lists.correct_kernel[queries,](
        weight, repeats, stands_for, met, own, values, found, result, blur, R=windows, C=2, BR=64, GUIDED=guided
    )
    for query, c in itertools.product(range(queries), range(2)):
        rows = zip(
            weight[query], repeats[query], stands_for[query], met[query], own[query], values[query, :, c], strict=True
        )
        names = ("weight", "repeats", "stands", "met", "own", "value")
        sample = [dict(zip(names, map(float, row), strict=True)) for row in rows]
        of = (float(x[query]) for x in (m, s, threshold, v[:, c]))
        moved, mean, variance = corrected(sample, *of, guided, blur)
        assert result[query, 0] == pytest.approx(moved, abs=1e-4)
        assert result[query, 2 + c] == pytest.approx(mean - float(v[query, c] / s[query]), abs=1e-5)
        assert result[query, 4 + c] == pytest.approx(variance, rel=1e-4, abs=1e-12)
    if not guided:
        share = own.add(repeats + stands_for).exp2() * met
        expected = s**2 * (share * own.exp2()).sum(1) / share.sum(1) ** 2
        torch.testing.assert_close(result[1:, 1], expected[1:], rtol=1e-5, atol=0)
    assert result[0].tolist() == [0, 1, 0, 0, 0, 0]


def test_without_a_kernel_the_scan_on_the_cpu_serves(indexed, monkeypatch):
    if native.missing:
        pytest.skip("the C++ extension was not built")
    bank, index = indexed()
    monkeypatch.setattr(fused, "_broken", "on holiday")
    z = noisy(bank, 0.5, dtype=torch.float32)
    machine = pruned(bank, index)
    assert machine.engine_on() == "pruned"
    assert rms(sums(machine, z, 0.5).mean - definition(machine, z, 0.5).mean) < 1e-3
