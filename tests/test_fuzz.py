"""Damaged files of every format: a short form of `make fuzz`, always from the same seed."""

import contextlib
import importlib.util
import random
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "fuzz" / "readers.py"


def load():
    spec = importlib.util.spec_from_file_location("fuzz_readers", HARNESS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


readers = load()
SEEDS = readers.seeds()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What patchscore writes itself, and words to type."""
    return readers.own_seeds(tmp_path_factory.mktemp("own"))


@pytest.mark.parametrize("name", SEEDS)
def test_whole_files_of_every_format_are_read(name, tmp_path):
    seed = SEEDS[name]
    files = {seed.opened: seed.pack(seed.files)} if seed.pack is not None else seed.files
    readers.write(tmp_path / "input", files)
    assert readers.check(tmp_path / "input" / seed.opened, {}) == "read"


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files_give_images_or_one_error(name, tmp_path):
    """Twelve of each; `readers.check` raises on any other kind of error."""
    rng = random.Random(name)
    others = [content for seed in SEEDS.values() for content in seed.files.values()]
    results = []
    while len(results) < 12:
        files, opened = readers.damaged_input(rng, SEEDS[name], others)
        try:
            readers.write(tmp_path / "input", files)
        except (OSError, ValueError):  # a name that this file system does not take
            continue
        results.append(readers.check(tmp_path / "input" / opened, rng.choice(readers.OPTIONS)))
    assert set(results) <= {"read", "refused"}


def test_the_command_line_says_one_line_of_damaged_files(tmp_path):
    rng, results = random.Random(0), []
    others = [content for seed in SEEDS.values() for content in seed.files.values()]
    while len(results) < 20:
        name = rng.choice([name for name in SEEDS if SEEDS[name].opened != "t.json"])
        files, opened = readers.damaged_input(rng, SEEDS[name], others)
        try:
            readers.write(tmp_path / "input", files)
        except (OSError, ValueError):
            continue
        results.append(readers.check_command(tmp_path / "input" / opened))
    assert set(results) == {"read", "refused"}


def test_damaged_files_of_our_own_are_refused_mended_or_harmless(own, tmp_path):
    """Also where their checksums are put right after the damage, as an attacker would."""
    rng, others, results = random.Random(0), [b"other"], {}
    for name, seed in own.items():
        if seed.own.files:
            readers.write(tmp_path / "input", seed.own.files)
            assert readers.check(tmp_path / "input", {}, seed.own) == "read", name
        for _ in range(3):
            files, _ = readers.damaged_input(rng, seed, others)
            readers.write(tmp_path / "input", files)
            results.setdefault(name, set()).add(readers.check(tmp_path / "input", {}, seed.own))
    assert set().union(*results.values()) == {"read", "refused"}


def test_the_harness_keeps_what_ends_a_worker(tmp_path, monkeypatch, capsys):
    """One that could not see a crash would be of no use."""
    (tmp_path / "worker").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "worker").chmod(0o755)
    readers.write(tmp_path / "input", {"a.png": b"damaged"})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))
    monkeypatch.setattr(sys, "argv", ["readers.py", "--seconds", "30", "--findings", str(tmp_path / "findings")])
    monkeypatch.setattr(readers.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(tmp_path))
    assert readers.main() == 1
    assert "20 crashes or hangs; kept in" in capsys.readouterr().out
    assert (tmp_path / "findings" / "0-end" / "a.png").read_bytes() == b"damaged"


def test_the_harness_raises_on_an_error_of_another_kind(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyError("a")

    monkeypatch.setattr(readers.sources, "read", fails)
    with pytest.raises(KeyError):
        readers.check(tmp_path / "a.png", {})
