"""Rows of engine `fused`: their plans, the memory they take, and that torch's switches do not reach them. No Triton."""

import math
import weakref
from collections import Counter

import pytest
import torch
from conftest import machine_named, smooth_images
from torch.utils._python_dispatch import TorchDispatchMode

import patchscore as ps
from patchscore.engines.fused import launch, naive
from patchscore.engines.fused.plan import BIAS_COLUMNS, Plan, Spectrum, choose_plan, least_tolerance, spectrum_of
from patchscore.engines.fused.rows import patch_rows, query_rows, stored_bytes, value_columns, working_bytes
from patchscore.engines.sliding import cuda

CPU = torch.device("cpu")
UNIT = 127.5 / 128


def groups_of(name, bank, k):
    return machine_named(name, bank, k).competition(k).groups


def free_group(bank, k):
    (group,) = groups_of("els-circular", bank, k)
    return group


class Peak(TorchDispatchMode):
    """The most bytes that tensors held at one time, of storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.holders, self.sizes, self.largest = Counter(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                address = tensor.untyped_storage().data_ptr()
                if address in self.sizes or not function.is_view:
                    self.sizes[address] = tensor.untyped_storage().nbytes()
                    self.holders[address] += 1
                    weakref.finalize(tensor, self.release, address)
        self.largest = max(self.largest, sum(self.sizes.values()))
        return result

    def release(self, address):
        self.holders[address] -= 1
        if self.holders[address] == 0:
            self.sizes.pop(address, None)


@pytest.mark.parametrize("images", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("name", "k", "axes"),
    [("local", 5, 0), ("els-zeros", 3, 0), ("els-circular", 5, 0), ("els-circular", 5, 20), ("els-circular", 3, 27)],
)
def test_rows_take_the_memory_they_are_said_to_take(name, k, axes, dtype, images):
    bank = ps.PatchBank(smooth_images(images, 3, 12, 11, dtype=dtype))
    spectrum = spectrum_of(bank, k, CPU) if axes else None
    d = 3 * k * k
    plan = Plan(axes, axes=True, q_lo=4, p_lo=4) if axes else Plan(d, p_lo=0 if dtype == torch.uint8 else d)
    for group in groups_of(name, bank, k):
        with Peak() as peak:
            made = patch_rows(bank, 0, images, k, group, plan, spectrum, UNIT, CPU)
        assert sum(tensor.nbytes for tensor in made.tensors) == stored_bytes(bank, group, plan, images)
        assert stored_bytes(bank, group, plan, images) < peak.largest
        assert peak.largest <= working_bytes(bank, k, group, plan, images)


class Rounding(TorchDispatchMode):
    """torch with TF32 switched on: the factors of float32 products have 11 bits."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(product in name for product in ("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "convolution")):
            self.products += 1
            args = tuple(self.rounded(x) for x in args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_switches_for_tf32_change_no_number(dtype):
    images = smooth_images(12, 3, 9, 8, dtype=dtype)
    plan = Plan(20, axes=True, q_lo=4, p_lo=4)

    def numbers():
        bank = ps.PatchBank(images)  # a new one: spectra are kept
        spectrum = spectrum_of(bank, 5, CPU)
        group = free_group(bank, 5)
        competition = machine_named("els-circular", bank, 5).competition(5)
        patches = patch_rows(bank, 0, 12, 5, group, plan, spectrum, UNIT, CPU)
        pixels = patch_rows(bank, 0, 12, 5, group, Plan(75, q_lo=75, p_lo=75), None, UNIT, CPU)
        z = bank.chunk(0, 1)
        queries = query_rows(z, torch.ones(1).double(), competition, group, plan, spectrum, UNIT)
        return [*patches.tensors, *pixels.tensors, queries.rows, queries.scale, torch.tensor(spectrum.variances)]

    expected = numbers()
    with Rounding() as rounding:
        found = numbers()
    assert rounding.products > 0
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def decaying(d, total, windows=10**6, ratio=0.7):
    """A spectrum like that of photographs."""
    variances = [ratio**i for i in range(d)]
    scale = total / sum(variances)
    return Spectrum(torch.zeros(d), torch.eye(d), [v * scale for v in variances], 0.3, windows)


def test_splitting_the_leading_axes_is_taken_where_it_shortens_rows():
    # At this noise rounded axes miss the tolerance, and pixels need their query split: 2 x 147 + 3 columns.
    found = {}
    for sigma in (0.3, 0.4, 0.5, 0.6, 0.7, 1.0):
        plan = choose_plan(decaying(147, 30.0, 10**7), 147, sigma, 1e-3, True, True)
        found[sigma] = plan
        if plan.axes:  # no column is wasted
            assert plan.columns - plan.bias - BIAS_COLUMNS < 2 or plan.q_lo == plan.size
        assert plan.columns <= Plan(147, q_lo=147).columns
    assert any(plan.axes and 0 < plan.q_lo < 147 for plan in found.values())


def test_rounded_weights_count_where_few_windows_share_the_weight():
    # With one effective window, a query that is rounded may use what the weights leave of the tolerance, and no more.
    few = decaying(27, 3.0, windows=1)
    rounded = [t for t in (0.5e-3 * 1.1**i for i in range(30)) if not choose_plan(few, 27, 0.5, t, True, False).q_lo]
    widest = Plan(27)
    assert choose_plan(few, 27, 0.5, least_tolerance(0.5) * 1.01, True, False).q_lo == 27
    assert rounded
    assert rounded[0] > 2 * least_tolerance(0.5)
    assert choose_plan(few, 27, 0.5, rounded[0], True, False).columns == widest.columns
    # At the largest noise of a call values lie farthest apart.
    one, several = (choose_plan(few, 27, 0.11, 1e-3, True, False, largest=noise) for noise in (0.11, 1.0))
    assert one.columns <= several.columns == Plan(27, q_lo=27).columns


def test_the_windows_of_a_group_are_those_that_compete_there():
    bank = ps.PatchBank(smooth_images(40, 3, 12, 12))
    machine = ps.EquivariantLocalScore(bank, 3, "zeros")
    competition = machine.competition(3)
    asked, choose, noise = [], launch.choose_plan, torch.ones(1).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose_plan", lambda spectrum, *rest: asked.append(spectrum) or choose(spectrum, *rest))
        call = launch._Described(bank, competition, CPU, 1e-3)
        plans = [call.plan(group, noise) for group in competition.groups if group.rows.locked or group.cols.locked]
        call.plan(next(g for g in competition.groups if not (g.rows.locked or g.cols.locked)), noise)
    assert len(set(plans)) == 1
    # Of locked coordinates as many as corners have, so that edges and corners have one plan.
    assert sorted(spectrum.windows for spectrum in asked) == [40] * 8 + [4000]


def test_a_graph_that_records_gives_corners_to_fused(monkeypatch):
    # `sliding` reads the range of the pixels, which no graph can hold.
    bank = ps.PatchBank(smooth_images(4, 3, 8, 8))
    asked = bank.chunk(0, 1), torch.ones(1).double(), bank, ps.EquivariantLocalScore(bank, 3, "zeros").competition(3)
    assert "both axes" in (launch.Fused().lacks(*asked) or "")
    monkeypatch.setattr(launch, "recording", lambda: True)
    monkeypatch.setattr(cuda.resident, "recording", lambda: True)
    assert launch.Fused().lacks(*asked) is None
    assert "CUDA graph" in (cuda.SlidingCuda().lacks(*asked) or "")


@pytest.mark.parametrize("plan", [Plan(75, q_lo=75), Plan(75, p_lo=75), Plan(75, q_lo=75, p_lo=75), Plan(75),
                                  Plan(40, axes=True), Plan(40, axes=True, q_lo=8, p_lo=8)])  # fmt: skip
def test_products_of_rows_are_distances_of_what_the_rows_stand_for(plan):
    bank = ps.PatchBank(smooth_images(6, 3, 9, 8, dtype=torch.float32))
    spectrum = spectrum_of(bank, 5, CPU)
    group, competition = free_group(bank, 5), machine_named("els-circular", bank, 5).competition(5)
    z, sigma = bank.chunk(0, 1) + 0.3, torch.full((1,), 0.7).double()
    queries = query_rows(z, sigma, competition, group, plan, spectrum, 1.0)
    patches = patch_rows(bank, 0, 6, 5, group, plan, spectrum, 1.0, CPU)
    q = naive.numbers(queries.rows, plan, plan.q_lo, plan.size)
    p = naive.numbers(patches.rows[:, : patches.filled], plan, plan.p_lo, plan.size + plan.q_lo)
    if plan.axes:
        # The part of a patch that was dropped counts as if the query had none of it.
        full = patch_rows(bank, 0, 6, 5, group, Plan(75, axes=True, q_lo=75, p_lo=75), spectrum, 1.0, CPU)
        whole = naive.numbers(full.rows[:, : full.filled], Plan(75), 75, 150)
        dropped = whole[..., plan.size :].square().sum(-1)
    else:
        dropped = torch.zeros(p.shape[:2]).double()
    wanted = -0.5 * ((q[:, :, None] - p[:, None]).square().sum(-1) + dropped[:, None])
    wanted += 0.5 * q.square().sum(-1, keepdim=True)
    got = naive.log_weights(queries, patches, plan) * math.log(2) * 0.7**2
    # Bias in three half floats, and low times low left out where both are split.
    assert (got - wanted).abs().max() < 75 * 2.0**-22 * 4


@pytest.mark.parametrize("channels", [1, 3, 5, 8, 9])
def test_values_have_room_for_both_halves_and_ones(channels):
    columns = value_columns(channels)
    assert columns >= 2 * channels + 1
    assert columns & (columns - 1) == 0


def test_a_pilot_is_for_many_effective_windows_and_never_for_locked_coordinates():
    found = [choose_plan(decaying(147, 30.0, 10**7), 147, sigma, 1e-3, True, True) for sigma in (0.02, 0.3, 4.0, 30.0)]
    assert [plan.pilot for plan in found] == [False, False, True, True]
    assert not any(plan.pilot and (plan.skip or plan.exact) for plan in found)
    assert not choose_plan(decaying(147, 30.0, 10**7), 147, 30.0, 1e-3, True, axes=False).pilot
    assert not choose_plan(None, 147, 30.0, 1e-3, True, axes=True).pilot
