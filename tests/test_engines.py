"""The choice among engines: the fastest that can serve, a warning once, and never a broken call."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import machine_named, noisy

import patchscore as ps
from patchscore import engines
from patchscore.engines import base, reference
from patchscore.engines.base import Engine, EngineError
from patchscore.engines.reference import Reference
from patchscore.windows import span

CPU = torch.device("cpu")


class Warp(Engine):
    """An engine made up for the tests."""

    name = "warp"
    missing: str | None = None
    left: str | None = None
    failure: Exception | None = None

    def runs_on(self, device):
        return True

    def unavailable(self, device):
        return self.missing

    def lacks(self, z, sigma, bank, competition):
        return self.left if competition.groups and competition.groups[0].rows.locked else None

    def posterior_sum(self, z, sigma, bank, competition, memory_limit, ess=True):
        if self.failure is not None:
            raise self.failure
        return reference.Reference().posterior_sum(z, sigma, bank, competition, memory_limit)


@pytest.fixture
def warp(monkeypatch):
    """It comes before `reference`, the only other engine."""
    engine = Warp()
    monkeypatch.setattr(engines, "EXACT", (engine, Reference()))
    monkeypatch.setattr(engines, "NAMES", ("warp", "reference"))
    monkeypatch.setattr(base, "_warned", set())
    return engine


@pytest.fixture
def fastest_is_missing(warp):
    warp.missing = "its compiler is on holiday"


def test_auto_takes_the_first_that_can_serve(warp, bank):
    machine = ps.EquivariantLocalScore(bank, 3)
    z = noisy(bank, 1.0, dtype=torch.float32)
    assert machine.engine_on() == "warp"
    assert machine.estimate(z, 1.0).engine == "warp"
    assert ps.EquivariantLocalScore(bank, 3, engine="reference").estimate(z, 1.0).engine == "reference"


class Weft(Warp):
    """Another one, that knows how long it takes: twice as long where columns are locked."""

    name = "weft"
    served: tuple = ()

    def seconds(self, z, sigma, bank, competition):
        (group,) = competition.groups
        return 2.0 if group.cols.locked else 0.5

    def posterior_sum(self, z, sigma, bank, competition, memory_limit, ess=True):
        self.served = competition.groups
        return super().posterior_sum(z, sigma, bank, competition, memory_limit)


@pytest.fixture
def weft(warp, monkeypatch):
    """`warp` takes one second for everything and comes first where times are not known."""
    engine = Weft()
    monkeypatch.setattr(engines, "EXACT", (warp, engine, Reference()))
    monkeypatch.setattr(engines, "NAMES", ("warp", "weft", "reference"))
    monkeypatch.setattr(Warp, "seconds", lambda self, z, sigma, bank, competition: 1.0)
    return engine


def test_auto_takes_the_engine_that_expects_to_be_fastest_group_by_group(weft, bank):
    z = noisy(bank, 1.0, batch=2, dtype=torch.float32)
    machine = ps.EquivariantLocalScore(bank, 3)
    est = machine.estimate(z, 1.0)
    assert est.engine == "warp and weft"
    assert set(weft.served) == {group for group in machine.competition(3).groups if not group.cols.locked}
    alone = ps.EquivariantLocalScore(bank, 3, engine="reference").estimate(z, 1.0)
    assert torch.equal(est.mean, alone.mean)
    assert est.pairs == alone.pairs
    # One that is named serves whatever it expects.
    assert ps.EquivariantLocalScore(bank, 3, engine="warp").estimate(z, 1.0).engine == "warp"


def test_where_the_fastest_fails_the_next_fastest_serves(weft, bank):
    weft.failure = EngineError("no registers")
    weft.posterior_sum = super(Weft, weft).posterior_sum
    with pytest.warns(RuntimeWarning, match="'weft' cannot serve: no registers"):
        assert ps.EquivariantLocalScore(bank, 3).estimate(noisy(bank, 1.0, dtype=torch.float32), 1.0).engine == "warp"


def test_an_engine_whose_time_is_not_known_keeps_its_place(weft, bank, monkeypatch):
    monkeypatch.setattr(Warp, "seconds", lambda self, z, sigma, bank, competition: None)
    est = ps.EquivariantLocalScore(bank, 3).estimate(noisy(bank, 1.0, dtype=torch.float32), 1.0)
    assert est.engine == "warp"


@pytest.mark.parametrize("engine", ["auto", "warp"])
def test_a_missing_engine_warns_once_and_the_next_serves(fastest_is_missing, engine, bank):
    machine = ps.EquivariantLocalScore(bank, 3, engine=engine)
    z = noisy(bank, 1.0, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="'warp' cannot serve: its compiler is on holiday"):
        assert machine.estimate(z, 1.0).engine == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.denoise(z, 1.0)


def test_groups_that_an_engine_leaves_go_to_the_next_and_no_number_changes(warp, bank):
    warp.left = "its windows are tied to their place"
    z = noisy(bank, 1.0, batch=2, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = ps.EquivariantLocalScore(bank, 3).estimate(z, 1.0)
    alone = ps.EquivariantLocalScore(bank, 3, engine="reference").estimate(z, 1.0)
    assert shared.engine == "reference and warp"
    assert torch.equal(shared.mean, alone.mean)
    assert torch.equal(shared.ess, alone.ess)
    assert shared.pairs == alone.pairs


def test_an_engine_that_fails_during_a_call_warns_and_the_next_serves(warp, bank):
    warp.failure = EngineError("its kernel failed to compile")
    z = noisy(bank, 1.0, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="'warp' cannot serve: its kernel failed to compile"):
        assert ps.EquivariantLocalScore(bank, 3).estimate(z, 1.0).engine == "reference"


def test_any_other_error_is_the_callers(warp, bank):
    warp.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ps.EquivariantLocalScore(bank, 3).denoise(noisy(bank, 1.0, dtype=torch.float32), 1.0)


@pytest.mark.parametrize(
    "change", [{"missing": "its compiler is on holiday"}, {"failure": EngineError("no registers")}]
)
def test_strict_turns_every_fallback_into_an_error(warp, change, bank, monkeypatch):
    monkeypatch.setenv("PATCHSCORE_STRICT", "1")
    vars(warp).update(change)
    z = noisy(bank, 1.0, dtype=torch.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"engine 'warp' cannot serve: (its compiler|no registers).*STRICT"):
            ps.EquivariantLocalScore(bank, 3).denoise(z, 1.0)


def test_explain_choice_says_which_and_why(fastest_is_missing, bank):
    explained = ps.LocalScore(bank, 3).explain_choice()
    assert "warp: cannot serve, its compiler is on holiday" in explained
    assert "reference: serves float32 on cpu (the fastest that can)" in explained
    assert "reference: serves float32 on cpu (named)" in ps.LocalScore(bank, 3, engine="reference").explain_choice()


def test_an_engine_with_a_half_for_each_device_is_told_of_once():
    names = [one.name for one, _, _ in engines.candidates(engines.EXACT, "auto", CPU, torch.float32)]
    assert names == ["fused", "sliding", "reference"]


def test_float64_images_get_float64_digits(bank):
    machine = ps.LocalScore(bank, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.estimate(noisy(bank, 1.0), 1.0).engine == "reference"


MEMORY = """
import resource, torch, patchscore as ps
images, channels, size, limit = {images}, {channels}, {size}, {limit}
bank = ps.PatchBank(torch.randint(0, 256, (images, channels, size, size), dtype=torch.uint8))
z = torch.randn(2, channels, size, size)
machine = ps.{machine}, engine="reference", memory_limit=limit * 2**20)
ps.LocalScore(ps.PatchBank(bank.images[:50]), 9, engine="reference").denoise(z, 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
machine.denoise(z, 1.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(
    "case",
    [
        # As patches this bank would take 3.3 GB.
        {"machine": "LocalScore(bank, 9", "images": 20000, "channels": 1, "size": 16, "limit": 32},
        {"machine": 'EquivariantLocalScore(bank, 7, "circular"', "images": 30, "channels": 3, "size": 32, "limit": 64},
        {"machine": "EquivariantLocalScore(bank, 17", "images": 60, "channels": 3, "size": 32, "limit": 64},
    ],
    ids=lambda case: case["machine"].split("(")[0],
)
def test_memory_stays_inside_its_limit(case):
    grown = subprocess.run([sys.executable, "-c", MEMORY.format(**case)], capture_output=True, text=True, check=True)
    # 8 MiB for what the libraries set up on the way.
    assert int(grown.stdout) <= case["limit"] + 8


@pytest.mark.parametrize("machine", ["els-zeros", "els-circular", "local"])
def test_some_pixels_of_a_competition_have_the_sums_that_they_have_among_all(bank, machine):
    z, sigma = noisy(bank, 0.7, 2), torch.tensor([0.5, 0.9], dtype=torch.float64)
    whole = machine_named(machine, bank, 5).competition(5)
    for rows, cols in ((range(2, 5), range(7)), (range(12), range(9, 10)), (range(1), range(1))):
        part = whole.at(rows, cols)
        assert sum(group.pixels for group in part.groups) == len(rows) * len(cols)
        all_pixels, some = (engines.serve(engines.EXACT, "auto", z, sigma, bank, of, 2**30)[0] for of in (whole, part))
        block = (slice(None), slice(None), span(rows), span(cols))
        torch.testing.assert_close(some.mean[block], all_pixels.mean[block], atol=1e-6, rtol=0)
