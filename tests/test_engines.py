"""The choice among engines: the fastest that can serve, a warning once, and never a broken call."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import noisy

import patchscore as ps
from patchscore import engines
from patchscore.engines import reference

CPU = torch.device("cpu")


@pytest.fixture
def fastest_is_missing(monkeypatch):
    broken = SimpleNamespace(unavailable=lambda device: "its compiler is on holiday", posterior_sum=None)
    monkeypatch.setattr(engines, "ENGINES", {"warp": broken, "reference": reference})
    monkeypatch.setattr(engines, "_warned", set())


def test_auto_takes_the_first_that_can_serve(monkeypatch):
    ready = SimpleNamespace(unavailable=lambda device: None)
    monkeypatch.setattr(engines, "ENGINES", {"warp": ready, "reference": reference})
    assert engines.choose("auto", CPU) == ("warp", ready)
    assert engines.choose("reference", CPU) == ("reference", reference)


@pytest.mark.parametrize("engine", ["auto", "warp"])
def test_a_missing_engine_warns_once_and_the_next_serves(fastest_is_missing, engine, bank):
    machine = ps.EquivariantLocalScore(bank, 3, engine=engine)
    z = noisy(bank, 1.0, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="'warp' cannot serve: its compiler is on holiday"):
        assert machine.estimate(z, 1.0).engine == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.denoise(z, 1.0)


def test_explain_choice_says_which_and_why(fastest_is_missing, bank):
    explained = ps.LocalScore(bank, 3).explain_choice()
    assert "warp: cannot serve, its compiler is on holiday" in explained
    assert "reference: serves float32 on cpu (the fastest that can)" in explained
    assert "reference: serves float32 on cpu (named)" in ps.LocalScore(bank, 3, engine="reference").explain_choice()


def test_float64_images_get_float64_digits(bank):
    machine = ps.LocalScore(bank, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.estimate(noisy(bank, 1.0), 1.0).engine == "reference"


MEMORY = """
import resource, torch, patchscore as ps
bank = ps.PatchBank(torch.randint(0, 256, (20000, 1, 16, 16), dtype=torch.uint8))
z = torch.randn(2, 1, 16, 16)
machine = ps.LocalScore(bank, 9, engine="reference", memory_limit=32 * 2**20)
ps.LocalScore(ps.PatchBank(bank.images[:50]), 9, engine="reference").denoise(z, 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
machine.denoise(z, 1.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_stays_inside_its_limit():
    # As patches this bank would take 3.3 GB.
    grown = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 40
