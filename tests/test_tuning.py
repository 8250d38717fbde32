"""Which configuration a kernel runs in, and that the fastest is remembered. No kernel runs here: work is a function."""

import json
import subprocess
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from patchscore.engines import autotune as tuning
from patchscore.engines.autotune import Configuration, KernelError, first_that_serves


class PTXASError(Exception):
    """As Triton's."""

    __module__ = "triton.runtime.errors"


SLOW, FAST, BROKEN = Configuration(64, 64, 4, 2), Configuration(128, 64, 4, 3), Configuration(256, 64, 8, 3, 64)
KEY = ("a card", "a plan", 3)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own, and a clock that knows what is fast."""
    monkeypatch.setenv("PATCHSCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PATCHSCORE_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files", {})
    monkeypatch.setattr(tuning, "_timed", lambda work, candidate: {SLOW: 2.0, FAST: 1.0}[candidate])
    return tmp_path / "cache"


def served(candidates=(SLOW, FAST), tune=True, key=KEY):
    """The configuration that the result is of, and all that were tried."""
    tried = []

    def work(candidate):
        tried.append(candidate)
        if candidate == BROKEN:
            raise PTXASError("ptxas died")
        return candidate

    return first_that_serves(key, list(candidates), work, tune), tried


def as_another_process(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files", {})


def test_the_first_serves_small_work_and_the_fastest_what_is_worth_timing():
    assert served(tune=False) == (SLOW, [SLOW])
    assert served() == (FAST, [SLOW, FAST])
    assert served(tune=False) == (SLOW, [SLOW])  # adds in the same order once the fastest is known
    assert served() == (FAST, [FAST])
    assert served(tune=False, key=("another",)) == (SLOW, [SLOW])


def test_another_process_knows_the_fastest(monkeypatch, folder):
    served()
    as_another_process(monkeypatch)
    assert served() == (FAST, [FAST])
    assert [file.name for file in folder.iterdir()] == ["tuned.json"]


def test_what_was_remembered_of_other_candidates_or_another_triton_is_not_taken(monkeypatch):
    served()
    as_another_process(monkeypatch)
    assert served([FAST, SLOW, BROKEN])[1] == [FAST, SLOW, BROKEN]
    as_another_process(monkeypatch)
    monkeypatch.setattr(tuning, "_triton", lambda: "99.0")
    assert served()[1] == [SLOW, FAST]
    as_another_process(monkeypatch)
    monkeypatch.setattr(tuning, "__version__", "99.0")
    assert served()[1] == [SLOW, FAST]


def test_what_is_remembered_and_no_longer_compiles_is_forgotten(monkeypatch, folder):
    monkeypatch.setattr(tuning, "_timed", lambda work, candidate: {SLOW: 2.0, BROKEN: 1.0}[candidate])
    first_that_serves(KEY, [SLOW, BROKEN], lambda candidate: candidate, True)  # it still compiles
    as_another_process(monkeypatch)
    assert served([SLOW, BROKEN]) == (SLOW, [BROKEN, SLOW, BROKEN])
    as_another_process(monkeypatch)
    assert served([SLOW, BROKEN]) == (SLOW, [SLOW])


def test_nothing_that_is_known_nor_left_compiles(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {(*KEY, False): BROKEN})
    with pytest.raises(KernelError, match="ptxas died"):
        served([BROKEN], tune=False)


def test_switched_off_nothing_is_read(monkeypatch):
    served()
    as_another_process(monkeypatch)
    monkeypatch.setenv("PATCHSCORE_AUTOTUNE", "0")
    assert not tuning.wanted()
    assert served(tune=False) == (SLOW, [SLOW])
    monkeypatch.setattr(tuning, "_chosen", {(*KEY, True): FAST})
    assert served(tune=False) == (SLOW, [SLOW])


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"x": 3}', "\xff"])
def test_a_file_of_nonsense_is_as_good_as_none(folder, content):
    folder.mkdir()
    (folder / "tuned.json").write_bytes(content.encode("latin1"))
    assert served() == (FAST, [SLOW, FAST])
    assert list(astuple(FAST)) in json.loads((folder / "tuned.json").read_text()).values()


def test_where_nothing_can_be_written_the_process_remembers(folder):
    folder.write_text("a file, not a folder")
    assert served() == (FAST, [SLOW, FAST])
    assert served() == (FAST, [FAST])


def test_what_does_not_compile_is_passed_over(folder):
    assert served([BROKEN, SLOW], tune=False) == (SLOW, [BROKEN, SLOW])
    with pytest.raises(KernelError, match="ptxas died"):
        served([BROKEN], key=("broken",))

    def out_of_memory(candidate):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        first_that_serves(("full",), [SLOW], out_of_memory, False)
    assert not folder.exists()


def test_the_file_lies_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("PATCHSCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.path() == tmp_path / "patchscore" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.path() == tmp_path / "home" / ".cache" / "patchscore" / "tuned.json"


def test_small_work_never_reads_the_file_and_large_work_reads_it_once(monkeypatch, folder):
    served()
    as_another_process(monkeypatch)
    read, reads = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    for key in range(20):
        served(tune=False, key=(key,))
    assert reads == []
    for _ in range(20):
        assert served()[0] == FAST
    served(key=("another",))
    assert len(reads) <= 2  # once to know, once to add to what other processes wrote meanwhile


@pytest.mark.parametrize("before", [[], ["tuned"]])
def test_a_graph_that_records_is_not_timed(monkeypatch, before):
    for _ in before:
        served()
    monkeypatch.setattr(tuning.device, "recording", lambda: True)
    assert served()[0] == (FAST if before else SLOW)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        TypeError("an argument of ours"),
    ],
)
def test_what_is_no_compilers_refusal_propagates(error):
    def work(candidate):
        raise error

    with pytest.raises(type(error)) as caught:
        first_that_serves(KEY, [SLOW, FAST], work, False)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        PTXASError("ptxas died"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, "gcc"),
    ],
)
def test_a_compilers_refusal_is_a_kernel_error(error):
    with pytest.raises(KernelError) as caught, tuning.starting():
        raise error
    assert caught.value.__cause__ is error


def test_memory_that_the_driver_misses_is_missed_like_torchs():
    with pytest.raises(torch.OutOfMemoryError), tuning.starting():
        raise RuntimeError("Triton Error [CUDA]: out of memory")
