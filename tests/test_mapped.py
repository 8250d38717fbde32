"""Mapped banks: the numbers of banks in memory, without their memory; a file that changed is an error by name."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_images

import patchscore as ps
from patchscore.engines.sliding import cpu as sliding_cpu
from patchscore.index import build
from patchscore.sources import mapped, reading


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bank.npy"
    np.save(path, smooth_images(40, 3, 9, 8).numpy())
    np.save(tmp_path / "bank.labels.npy", np.arange(40) % 3)
    (tmp_path / "bank.classes.json").write_text(json.dumps(["cat", "dog", "owl"]))
    return path


def is_file_backed(tensor, path):
    """Whether a tensor's memory is a map of the file, without write permission."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= at < high:
            return line.split()[1].startswith("r--") and line.rstrip().endswith(str(path))
    return False


def change(path):
    """The same size, other content, a later time."""
    with open(path, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 255]))
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


@pytest.mark.filterwarnings("ignore:.*fused")
def test_a_mapped_bank_is_the_bank_in_memory(file):
    held, bank = ps.PatchBank.open(file), ps.PatchBank.open(file, mapped=True)
    assert (held.mapped, bank.mapped) == (False, True)
    assert "mapped" in repr(bank)
    assert torch.equal(bank.images, held.images)
    assert bank.class_names == held.class_names == ("cat", "dog", "owl")
    assert bank.fingerprint == held.fingerprint
    assert bank.select("owl").fingerprint == held.select("owl").fingerprint
    z = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    for machine in (ps.IdealScore, lambda b, **o: ps.EquivariantLocalScore(b, 3, **o)):
        for engine in ("reference", "sliding", "fused"):  # the last is served by another here
            for labels in (None, "owl"):
                found, expected = (machine(of, engine=engine).denoise(z, 0.4, labels) for of in (bank, held))
                assert torch.equal(found, expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the map of this process's memory is Linux's")
def test_neither_bank_nor_selections_copy_the_file(file):
    bank = ps.PatchBank.open(file, mapped=True)
    for some in (
        bank,
        bank.select("owl"),
        bank.select(["cat", "dog"]).take([3, 1]),
        ps.PatchBank.open(file, limit=7, mapped=True),
    ):
        assert is_file_backed(some.images, file)
    assert len(some) == 7
    whole = np.load(file, mmap_mode="r")
    part = ps.PatchBank(whole[5:9])
    assert part.mapped
    assert is_file_backed(part.images, file)
    np.testing.assert_array_equal(part.images, whole[5:9])


def test_large_files_are_mapped_by_themselves(file, monkeypatch):
    bytes_ = 40 * 3 * 9 * 8
    assert not ps.PatchBank.open(file, memory_limit=4 * bytes_).mapped
    assert ps.PatchBank.open(file, memory_limit=4 * bytes_ - 4).mapped
    assert not ps.PatchBank.open(file, memory_limit=2 * bytes_, mapped=False).mapped
    assert not ps.PatchBank.open(file, memory_limit=2 * bytes_, size=4).mapped  # would be resized
    monkeypatch.setattr(reading, "memory_of_machine", lambda: 3 * bytes_)
    assert ps.PatchBank.open(file).mapped


def test_what_cannot_be_mapped_is_refused_with_the_reason(file, tmp_path):
    images = np.load(file)
    np.save(tmp_path / "last.npy", images.transpose(0, 2, 3, 1))
    np.save(tmp_path / "double.npy", images / 255.0)
    np.save(tmp_path / "unit.npy", (images / 255).astype(np.float32))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    np.savez(tmp_path / "zip.npz", images)
    cases = {
        "last": "has shape",
        "double": "holds float64",
        "unit": "has no value below 0",
        "fortran": "lies in Fortran order",
    }
    for name, reason in cases.items():
        with pytest.raises(ValueError, match=rf"^mapped: .*{name}.npy {reason}.*patchscore bank"):
            ps.PatchBank.open(tmp_path / f"{name}.npy", mapped=True)
    for source, reason in (
        (tmp_path / "zip.npz", "is no .npy file"),
        (images, "got ndarray"),
        (tmp_path / "no.npy", "cannot be mapped"),
    ):
        with pytest.raises(ValueError, match=rf"^mapped: .*{reason}"):
            ps.PatchBank.open(source, mapped=True)
    with pytest.raises(ValueError, match=r"^mapped: .* would be converted"):
        ps.PatchBank.open(file, mapped=True, size=4)
    with pytest.raises(ValueError, match=r"^mapped: .*value_range"):
        ps.PatchBank.open(file, mapped=True, value_range="data")
    with pytest.raises(TypeError, match=r"^mapped: got 1"):
        ps.PatchBank.open(file, mapped=1)


def test_floating_point_files_are_held_to_their_range(tmp_path):
    images = smooth_images(6, 2, 5, 5).numpy() / np.float32(127.5) - np.float32(1)
    np.save(tmp_path / "a.npy", images)
    assert torch.equal(ps.PatchBank.open(tmp_path / "a.npy", mapped=True).chunk(0, 6), torch.from_numpy(images))
    for bad, said in ((2.0, "values from"), (np.nan, "NaN or infinite")):
        images[3, 1, 2, 2] = bad
        np.save(tmp_path / "b.npy", images)
        with pytest.raises(ValueError, match=rf"b\.npy: {said}"):
            ps.PatchBank.open(tmp_path / "b.npy", mapped=True)


def test_labels_beside_a_file_fit_it(file):
    assert ps.PatchBank.open(file, labels=False, mapped=True).labels is None
    np.save(file.with_name("bank.labels.npy"), np.arange(39))
    with pytest.raises(ValueError, match=r"bank\.npy: labels of shape \[39\]"):
        ps.PatchBank.open(file)
    np.save(file.with_name("bank.labels.npy"), np.zeros(40))
    with pytest.raises(ValueError, match=r"bank\.labels\.npy: takes one integer"):
        ps.PatchBank.open(file)
    np.save(file.with_name("bank.labels.npy"), np.arange(40) % 3)
    file.with_name("bank.classes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bank\.classes\.json: takes a list"):
        ps.PatchBank.open(file)


# A file that changes.


def test_the_fingerprint_is_remembered_until_the_file_changes(file, monkeypatch):
    first = ps.PatchBank.open(file, mapped=True).fingerprint
    hashed = []
    monkeypatch.setattr(ps.PatchBank, "_hashed", lambda self: hashed.append(1) or "again")
    assert ps.PatchBank.open(file, mapped=True).fingerprint == first
    assert not hashed
    assert ps.PatchBank.open(file, mapped=True, labels=False).fingerprint == "again"  # other labels, another bank
    for spoil in (
        lambda: change(file),
        lambda: file.with_name("bank.remembered.json").write_text("{}"),
        lambda: file.with_name("bank.remembered.json").unlink(),
    ):
        ps.PatchBank.open(file, mapped=True).fingerprint  # noqa: B018
        hashed.clear()
        spoil()
        assert ps.PatchBank.open(file, mapped=True).fingerprint == "again"
        assert len(hashed) == 1


def test_content_that_changed_behind_a_restored_time_is_noticed(file):
    first, state = ps.PatchBank.open(file, mapped=True).fingerprint, os.stat(file)
    change(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert ps.PatchBank.open(file, mapped=True).fingerprint != first


def test_a_folder_that_cannot_be_written_is_no_error(file, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "write_record", full)
    assert ps.PatchBank.open(file, mapped=True).fingerprint == ps.PatchBank.open(file, mapped=False).fingerprint


def test_a_file_that_changed_is_named_before_and_after_a_call(file, monkeypatch):
    bank = ps.PatchBank.open(file, mapped=True)
    machine = ps.EquivariantLocalScore(bank, 3)
    z = torch.zeros(1, 3, 9, 8)
    machine.denoise(z, 0.5)
    serves = machine.engines[-1].posterior_sum
    calls = [
        lambda: machine.denoise(z, 0.5),
        lambda: machine.vjp(z, 0.5, z),
        lambda: machine.exact_sums(z, torch.ones(1).double(), bank, [machine.competition(3)]),
        lambda: bank.chunk(0, 1),
        lambda: bank.take([1]).chunk(0, 1),
        lambda: pickle.dumps(bank),
    ]

    def meanwhile(*args, **options):
        change(file)
        return serves(*args, **options)

    named = ps.EquivariantLocalScore(bank, 3, engine="reference")
    with monkeypatch.context() as patched:
        patched.setattr(type(machine.engines[-1]), "posterior_sum", lambda self, *a, **o: meanwhile(*a, **o))
        with pytest.raises(ValueError, match=r"bank\.npy: was changed while it was mapped"):
            named.denoise(z, 0.5)
    for call in calls:
        with pytest.raises(ValueError, match=r"bank\.npy: was changed while it was mapped"):
            call()
    assert ps.PatchBank.open(file, mapped=True).chunk(0, 1).shape == (1, 3, 9, 8)


def test_a_file_that_is_replaced_is_still_the_old_one(file):
    bank = ps.PatchBank.open(file, mapped=True)
    before = bank.images.clone()
    np.save(file.with_name("new.npy"), np.zeros_like(np.load(file)))
    os.replace(file.with_name("new.npy"), file)
    assert torch.equal(bank.chunk(0, 40, torch.float64), ps.PatchBank(before).chunk(0, 40, torch.float64))
    with pytest.raises(ValueError, match=r"bank\.npy: was changed since the bank that maps it was pickled"):
        pickle.loads(pickle.dumps(bank))


# Pickles.


def test_a_pickled_bank_holds_a_path_and_not_the_images(tmp_path):
    path = tmp_path / "large.npy"
    np.save(path, smooth_images(400, 3, 16, 16).numpy())
    bank = ps.PatchBank.open(path, mapped=True)
    for some in (bank, bank.take(range(5, 25))):
        written = pickle.dumps(some)
        assert len(written) < 4000
        again = pickle.loads(written)
        assert again.mapped
        assert torch.equal(again.chunk(0, 20), some.chunk(0, 20))
        assert again.fingerprint == some.fingerprint


# Indexes.

INDEX_FILES = ("ids.bin", "rows.bin", "cells.safetensors")


def built(bank, folder, k=3, **options):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    index = ps.PatchIndex.build(bank, k, folder, cells=64, progress=False, **options)
    assert {path.name for path in (folder / f"k{k:02d}").iterdir()} == {*INDEX_FILES, "meta.json"}
    return index, [(folder / f"k{k:02d}" / name).read_bytes() for name in INDEX_FILES]


@pytest.mark.parametrize("classes", [None, ["cat", "owl"]])
@pytest.mark.parametrize(("k", "most"), [(3, None), (3, 1200), (9, None)])
def test_an_index_is_the_same_from_a_file_and_with_little_memory(tmp_path, monkeypatch, classes, k, most):
    path = tmp_path / "bank.npy"
    np.save(path, smooth_images(60, 3, 12, 11).numpy())
    np.save(tmp_path / "bank.labels.npy", np.arange(60) % 3)
    (tmp_path / "bank.classes.json").write_text('["cat", "dog", "owl"]')
    held, bank = ps.PatchBank.open(path), ps.PatchBank.open(path, mapped=True)
    if classes:
        held, bank = held.select(classes), bank.select(classes)
    _, expected = built(held, tmp_path / "held", k, max_windows=most)
    index, found = built(bank, tmp_path / "mapped", k, max_windows=most)
    assert found == expected
    # Ranges of a few hundred windows, their cells in a file, images read in parts.
    monkeypatch.setattr(build, "CHUNK_WINDOWS", 300)
    monkeypatch.setattr(build, "BLOCK_WINDOWS", 200)
    monkeypatch.setattr(build, "SCANNED_WINDOWS", 700)
    monkeypatch.setattr(build.Builder, "affordable_threads", lambda self, threads: 2)
    for of, name in ((bank, "mapped-little"), (held, "held-little")):
        _, found = built(of, tmp_path / name, k, max_windows=most, memory_limit=1)
        assert found[:2] == expected[:2]
    z = torch.randn(1, 3, 12, 11, generator=torch.Generator().manual_seed(0))
    els = ps.EquivariantLocalScore
    pair = [els(of, k, index=ps.PatchIndex.open(index.path, of), budget=0.1).denoise(z, 1.0) for of in (held, bank)]
    assert torch.equal(*pair)


def test_a_build_takes_as_many_threads_as_memory_has_room_for(tmp_path):
    bank = ps.PatchBank(smooth_images(60, 3, 12, 11).numpy())
    meta = {"seed": 0, "max_windows": None, "rank": None, "cells": 64}
    needed = None
    for threads in (1, 2, 5):
        with pytest.raises(ValueError, match=r"^memory_limit: got 10 bytes, to build 64 cells takes") as raised:
            build.Builder(bank, 3, tmp_path, meta, False, 10)
        needed = int(str(raised.value).split("takes ")[1].split(";")[0])
        builder = build.Builder(bank, 3, tmp_path, meta, False, 2**40)
        assert builder.affordable_threads(threads) == threads
    builder.memory_limit = needed
    assert builder.affordable_threads(5) == 1
    builder.memory_limit = needed - 1
    with pytest.raises(ValueError, match=r"pass more, or fewer cells"):
        builder.affordable_threads(5)


@pytest.mark.skipif(sliding_cpu.missing is not None, reason="the native module is missing")
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", [(9, 8), (17, 14)])
@pytest.mark.parametrize("label", [None, 1])
def test_a_step_is_done_with_some_images_before_it_reads_others(file, monkeypatch, padding_mode, size, label):
    bank = ps.PatchBank.open(file, mapped=True)
    machine = ps.EquivariantLocalScore(bank, 5, padding_mode, engine="sliding")
    z = torch.randn(2, bank.shape[0], *size, generator=torch.Generator().manual_seed(0))
    expected = machine.estimate(z, 0.7, label, moments=True)
    monkeypatch.setattr("patchscore.bank.PIECE_BYTES", 7 * bank.images[0].nbytes)
    visited, serve = [], sliding_cpu._sums_of_piece

    def visit(z, sigma, bank, *rest):
        visited.append(bank.indices.min().item())
        return serve(z, sigma, bank, *rest)

    monkeypatch.setattr(sliding_cpu, "_sums_of_piece", visit)
    found = machine.estimate(z, 0.7, label, moments=True)
    assert visited == sorted(visited)
    assert len(set(visited)) == -(-len(bank.of_class(label)) // 7) > 1
    assert found.pairs == expected.pairs
    for name in ("mean", "ess", "variance", "entropy"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5), name


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the map of this process's memory is Linux's")
def test_an_index_of_images_that_lie_together_holds_none_of_them(file, tmp_path):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    bank = ps.PatchBank.open(file, mapped=True)
    for number, (images, copied) in enumerate([(range(40), False), (range(3, 31), False), ([3, 5, 6, 7], True)]):
        part = bank.take(images)
        index = ps.PatchIndex.build(part, 3, tmp_path / f"{number}.index", cells=16, progress=False)
        assert torch.equal(index.images, bank.images[list(images)])
        assert is_file_backed(index.images, file) != copied
