"""Triton's kernels of `pruned` under its interpreter, beside the same in plain torch; test_pruned_gpu.py runs it.

Not collected by name: TRITON_INTERPRET has to be set before Triton is imported, and would slow down every other test.
"""

import dataclasses
import math

import interpreted  # noqa: F401
import plain_pruned
import pytest
import torch
from conftest import noisy, smooth_images
from plain_pruned import Kernels
from triton.runtime.errors import InterpreterError

import patchscore as ps
from patchscore.engines import device
from patchscore.engines.pruned import engine, gpu, kernels, naive
from patchscore.engines.pruned.policy import POLICY
from patchscore.engines.pruned.request import Request

EPS = 2.0**-24
"""Of float32, in which the kernels add up."""

CASES = {
    "bytes, moments": {"k": 3, "moments": True},
    "one channel, a selection": {"channels": 1, "k": 5, "allowed": 15},
    "single pixels": {"k": 1},
    "floats": {"channels": 2, "k": 3, "dtype": torch.float32},
    "floats, moments, a selection": {"channels": 1, "k": 3, "dtype": torch.float32, "moments": True, "allowed": 15},
    "neighbours and a memory": {"k": 3, "columns": 3, "remembered": True},
    "every window": {"k": 3, "budget": None, "sigma": 3.0, "moments": True},
    "little noise, half the bank": {"k": 3, "sigma": 0.02, "allowed": 10},
}

THOROUGH = ("single pixels", "floats", "bytes, moments", "little noise, half the bank", "one channel, a selection")
"""With PATCHSCORE_TRITON_CHECK=all alone: an interpreted program takes as long as a thousand on a GPU."""


@pytest.fixture(scope="module")
def index_of(tmp_path_factory):
    made = {}

    def get(channels=3, dtype=torch.uint8):
        if (channels, dtype) not in made:
            scale = {} if dtype == torch.uint8 else {"value_range": "data"}
            bank = ps.PatchBank(smooth_images(20, channels, 11, 13, dtype=dtype), torch.arange(20) % 2, **scale)
            folder = tmp_path_factory.mktemp("index")
            made[channels, dtype] = bank, ps.PatchIndex.build(bank, [1, 3, 5], folder, cells=16, progress=False)
        return made[channels, dtype]

    yield get
    device.cache.clear()


def request_of(index_of, k, sigma=0.7, channels=3, dtype=torch.uint8, budget=0.1, columns=0, moments=False,
               allowed=0, remembered=False, count=3):  # fmt: skip
    bank, index = index_of(channels, dtype)
    part = index.at(k)
    machine = ps.EquivariantLocalScore(bank, k)
    (group,) = (g for g in machine.competition(k).groups if not g.rows.locked and not g.cols.locked)
    z = noisy(bank, sigma * bank.scale, dtype=torch.float32)[0] / bank.scale
    windows = engine._windows(z, k, "zeros", group)[:count]
    members = (torch.arange(20) >= 20 - allowed).byte() if allowed else None  # not the one that z is near
    before = torch.full((len(windows), 16), -1) if remembered else None
    if before is not None:
        before[:, :2] = torch.tensor([5, 700])
    competing = part.windows_per_image * (allowed or 20)
    return Request(part, windows.contiguous(), sigma, members, competing, budget, 7, columns, moments, before)


ANYWHERE = dataclasses.replace(POLICY, reach=math.inf)
"""Kernels are compared for any query, however far it is from the bank."""


def scanned(request, policy=ANYWHERE):
    device.cache.clear()
    return gpu.scan(request, policy)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough if case in THOROUGH else ()) for case in CASES]
)
def test_scans_are_those_of_the_plain_kernels(index_of, case, monkeypatch):
    request = request_of(index_of, **CASES[case])
    found = scanned(request)
    # Plans differ by how finely the scale is found (below); here both read the same visits.
    monkeypatch.setattr(Kernels, "plan_kernel", kernels.plan_kernel)
    monkeypatch.setattr(gpu, "kernels", lambda: Kernels)
    plain = scanned(request)
    assert torch.equal(found.fits, plain.fits)
    assert found.sums.pairs == plain.sums.pairs
    assert request.remembered is None or torch.equal(found.remembered, plain.remembered)
    # A log-weight of up to 126 bits is rounded twice; a distance of floats, which may be ever so large, at each of its
    # terms.
    bound = 2 * 126 * 0.7 * EPS
    if request.part.images.dtype != torch.uint8:
        away = (-2 * request.sigma**2 * (plain.sums.m + plain.sums.s.log() - 10)).max().item()
        bound += EPS * request.windows[0].numel() * away / (2 * request.sigma**2)
    # A sample that holds no competing window has no mean, and is no answer.
    met = plain.sums.s[:, 0] > 0
    assert not plain.fits[~met].any()
    a, b = (sums.mapped(lambda x: x[met]) for sums in (found.sums, plain.sums))
    assert (a.mean - b.mean).abs().max() <= bound
    torch.testing.assert_close(a.m + a.s.log(), b.m + b.s.log(), rtol=1e-12, atol=bound)
    torch.testing.assert_close(a.ess, b.ess, rtol=4 * bound, atol=0)
    # Variances are differences of squares: of a sum of w^2 and of the squared sum of w over n windows.
    torch.testing.assert_close(a.stderr, b.stderr, rtol=16 * bound, atol=4 * bound)
    if request.moments:
        assert (a.variance - b.variance).abs().max() <= 4 * bound
        assert (a.entropy - b.entropy).abs().max() <= 126 * bound
        torch.testing.assert_close(a.variance_stderr, b.variance_stderr, rtol=16 * bound, atol=16 * bound)
        torch.testing.assert_close(a.entropy_stderr, b.entropy_stderr, rtol=126 * bound, atol=126 * bound)


class Recorder:
    """Starts a kernel as it is, and keeps its arguments."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            self.calls.append((arguments, constants))

        return start


@pytest.mark.parametrize(
    ("case", "budget"),
    [
        ("bytes, moments", 0.04),
        ("little noise, half the bank", 0.02),
        pytest.param("one channel, a selection", 0.16, marks=pytest.mark.thorough),
        pytest.param("bytes, moments", 0.16, marks=pytest.mark.thorough),
    ],
)
def test_plans_are_those_of_the_definition(index_of, case, budget, monkeypatch):
    request = request_of(index_of, **CASES[case] | {"budget": budget}, count=12)
    recorder = Recorder(kernels.plan_kernel)
    monkeypatch.setattr(Kernels, "plan_kernel", recorder)
    monkeypatch.setattr(gpu, "kernels", lambda: Kernels)
    monkeypatch.setattr(gpu, "CELLS", 8)  # so that what one block of cells leaves the next goes on with
    scanned(request, dataclasses.replace(ANYWHERE, unknown=1e9, misfit=1e9))
    arguments, constants = recorder.calls[0]
    logs, size, _, _, _, allowed, cells, taken, units, found, model, *_ = arguments
    again = [x.clone() for x in (cells, taken, units, found, model)]
    plain_pruned.plan(*arguments[:6], *again, *arguments[11:], **constants)
    # Relative to what the strata's weights are expected to be, float32 is as good as its exponentials of logs.
    of_logs = 4 * EPS * logs.abs().max().item()
    torch.testing.assert_close(found[:, 1], again[3][:, 1], rtol=EPS, atol=0)
    torch.testing.assert_close(found[:, 2], again[3][:, 2], rtol=of_logs + 64 * EPS, atol=0)
    # The scale is found to one of 17^4 parts of 150 bits, and not above the budget.
    step = 150 / 17**4 * 0.7
    tiles = (size / naive.TILE).ceil()
    alike = 0
    for q in range(len(logs)):
        mine, theirs = (
            dict(zip(c[q, : int(n[q, 0])].tolist(), zip(t[q].tolist(), u[q].tolist(), strict=False), strict=False))
            for c, t, u, n in ((cells, taken, units, found), (again[0], again[1], again[2], again[3]))
        )
        # Cells that get three quarters of their windows are evaluated whole, others by whole tiles.
        surely = naive.TILE * sum(t for t, u in mine.values() if u == 0)
        assert surely <= allowed[q] / POLICY.certain_from + naive.TILE * len(mine)
        both = mine.keys() & theirs.keys()
        # A cell on the threshold of a whole tile, of one more, or of a hit may fall on either side.
        assert len(both) >= 0.8 * max(len(mine), len(theirs))
        for cell in both:
            (t, u), (other_t, other_u) = mine[cell], theirs[cell]
            assert abs(t - other_t) <= max(1, 2 * step * tiles[cell]) or max(t, other_t) == tiles[cell]
            assert (u > 0) != (other_u > 0) or abs(u - other_u) <= 2 * step * other_u
        if mine.keys() == theirs.keys() and all(mine[cell][0] == theirs[cell][0] for cell in mine):
            # Values lie in [-1, 1]; a variance changes as the scale does, and once more by what is left of a cell.
            atol = (4 * step + of_logs) * model[q, 0].item()
            torch.testing.assert_close(model[q], again[4][q], rtol=0, atol=atol)
            alike += 1
    assert alike


def test_a_near_cell_of_which_nothing_competes_is_not_visited(index_of, monkeypatch):
    """Its expected weight may be beyond float32, relative to those that compete."""
    recorder = Recorder(kernels.plan_kernel)
    monkeypatch.setattr(Kernels, "plan_kernel", recorder)
    monkeypatch.setattr(gpu, "kernels", lambda: Kernels)
    scanned(request_of(index_of, k=3, sigma=0.02))
    arguments, constants = recorder.calls[0]
    logs, _, competing, _, _, _, cells, _, _, found, *_ = arguments
    logs[:, 0, 5], logs[:, 1, 5], competing[5] = logs[:, 0].amax(1) + 300, logs[:, 1].amax(1) + 600, 0
    kernels.plan_kernel[(len(logs),)](*arguments, **constants)
    assert found.isfinite().all()
    assert (found[:, 0] > 0).all()
    assert all(5 not in cells[q, : int(found[q, 0])] for q in range(len(cells)))


def test_a_window_number_beyond_31_bits_is_not_wrapped_around(index_of):
    """The interpreter knows where tensors end: 2^32 + 3 in 32 bits would be window 3, and pass."""
    request = request_of(index_of, k=3)
    part, place = request.part, gpu.placed(request.part, torch.device("cpu"))
    queries = gpu.encoded(request.windows[:1], torch.uint8, request.sigma)
    listed, scores = torch.tensor([[2**32 + 3, 3, -1]]), torch.empty(1, 3, dtype=torch.int32)
    arguments = (place.images, listed, place.ids, queries.windows, queries.shift, scores, 3)
    sizes = (queries.windows.shape[1], part.windows_per_image, len(part.cols), 13, 11 * 13)
    constants = {"C": 3, "K": 3, "BYTES": True, "ALLOWED": False, "BW": 4, "BD": 32}
    with pytest.raises(InterpreterError, match="outside of every tensor"):
        kernels.score_kernel[(1, 1)](*arguments, *sizes, **constants)
    listed[0, 0] = 4
    kernels.score_kernel[(1, 1)](*arguments, *sizes, **constants)
