"""PatchBank.convert and `patchscore bank`: any source as a file that is mapped, resumed where it was interrupted."""

import errno
import io
import os
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore.cli import main
from patchscore.sources import writing

COUNT = 9


def encoded(kind="PNG", gray_first=False):
    """Image files by name, in two folders, which are their classes."""
    for i, pixels in enumerate(smooth_images(COUNT, 3, 14, 11).numpy()):
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        written = io.BytesIO()
        (image.convert("L") if gray_first and i < 2 else image).save(written, kind)
        yield f"{'cats' if i % 3 else 'dogs'}/{i}.{kind.lower()}", written.getvalue()


def folder(path, **options):
    for name, content in encoded(**options):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in encoded():
            archive.writestr(name, content)
    return path


def tarred(path):
    with tarfile.open(path, "w") as archive:
        for name, content in encoded():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"image": [{"bytes": content, "path": name} for name, content in encoded()]}
    columns["label"] = [name.split("/")[0] for name, _ in encoded()]
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def same(left, right):
    return left.fingerprint == right.fingerprint and left.class_names == right.class_names


@pytest.mark.parametrize("make", [folder, zipped, tarred, parquet])
@pytest.mark.parametrize("options", [{}, {"size": 6, "limit": 5, "channels": 1}])
def test_the_file_is_the_bank_that_open_reads(make, options, tmp_path):
    source = make(tmp_path / f"source{'' if make is folder else '.' + make.__name__}")
    written = ps.PatchBank.convert(source, tmp_path / "bank.npy", **options)
    assert written.mapped
    assert written.class_names is not None
    assert same(written, ps.PatchBank.open(source, **options))
    assert same(ps.PatchBank.open(tmp_path / "bank.npy"), written)
    left = {path.name for path in tmp_path.iterdir()} - {source.name}
    assert left == {"bank.npy", "bank.labels.npy", "bank.classes.json", "bank.remembered.json"}


@pytest.mark.filterwarnings("ignore:.*left out")
def test_gray_among_colour_and_others_in_the_place_of_bad_ones(tmp_path):
    source = folder(tmp_path / "source", gray_first=True)
    (source / "cats" / "1.png").write_bytes(b"no image")
    for options in ({}, {"limit": 4}):
        written = ps.PatchBank.convert(source, tmp_path / "bank.npy", skip_bad=True, overwrite=True, **options)
        assert written.shape[0] == 3
        assert same(written, ps.PatchBank.open(source, skip_bad=True, **options))
    with pytest.warns(UserWarning, match=r"left out 1 images that cannot be read: .*1\.png"):
        ps.PatchBank.convert(source, tmp_path / "again.npy", skip_bad=True)


def test_floats_are_written_as_open_reads_them(tmp_path):
    bytes_ = smooth_images(6, 1, 7, 7).numpy()
    unit, signed = bytes_ / np.float32(255), bytes_ / np.float32(127.5) - np.float32(1)
    mixed = np.concatenate([unit[:2], signed[2:]])  # the first look like 8 bits
    for source in (unit, signed, mixed):
        written = ps.PatchBank.convert(source, tmp_path / "bank.npy", overwrite=True)
        assert same(written, ps.PatchBank.open(source))
    with pytest.raises(ValueError, match=r"could mean \[0, 1\] or \[-1, 1\]"):
        ps.PatchBank.convert(unit * np.float32(0.99), tmp_path / "other.npy")


@pytest.mark.parametrize("make", [folder, tarred])
def test_images_are_decoded_side_by_side(make, tmp_path, monkeypatch):
    source = make(tmp_path / f"source{'' if make is folder else '.tar'}")
    monkeypatch.setattr(writing.os, "cpu_count", lambda: 3)
    together = threading.Barrier(3)  # broken, and with it the call, unless three are in hand at once

    def prepared(*args, original=writing.prepared):
        together.wait(timeout=20)
        return original(*args)

    monkeypatch.setattr(writing, "prepared", prepared)
    assert same(ps.PatchBank.convert(source, tmp_path / "bank.npy"), ps.PatchBank.open(source))


# Interruptions.


def interrupted_after(count, error, monkeypatch):
    """Has the writer fail at an image, and counts how many it takes."""
    added = []

    def add(self, i, image, original=writing._Writer.add):
        if len(added) == count:
            raise error
        added.append(i)
        original(self, i, image)

    monkeypatch.setattr(writing._Writer, "add", add)
    return added


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.filterwarnings("ignore:.*left out")
def test_an_interrupted_call_goes_on_where_it_was(error, tmp_path, monkeypatch):
    source = folder(tmp_path / "source", gray_first=True)
    (source / "dogs" / "0.png").write_bytes(b"no image")
    monkeypatch.setattr(writing, "NOTED_SECONDS", -1)  # every image
    whole = ps.PatchBank.open(source, skip_bad=True)
    with monkeypatch.context() as patched:
        interrupted_after(7, error, patched)
        with pytest.raises(type(error)) as raised:
            ps.PatchBank.convert(source, tmp_path / "bank.npy", skip_bad=True)
    if isinstance(error, OSError):
        assert raised.value.filename == str(tmp_path / "bank.npy.partial")
    assert not (tmp_path / "bank.npy").exists()
    # A killed process may have written more than it noted, and half a line of a note.
    with open(tmp_path / "bank.npy.partial", "ab") as file:
        file.write(b"half an image")
    with open(tmp_path / "bank.npy.progress", "ab") as file:
        file.write(b'{"items": [')
    added = interrupted_after(10**6, error, monkeypatch)
    written = ps.PatchBank.convert(source, tmp_path / "bank.npy", skip_bad=True)
    assert 0 < len(added) < len(whole)
    assert same(written, whole)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".progress", ".sorted")]


def test_another_source_or_other_arguments_begin_again(tmp_path, monkeypatch):
    source = folder(tmp_path / "source")
    monkeypatch.setattr(writing, "NOTED_SECONDS", -1)
    with monkeypatch.context() as patched:
        interrupted_after(5, KeyboardInterrupt(), patched)
        with pytest.raises(KeyboardInterrupt):
            ps.PatchBank.convert(source, tmp_path / "bank.npy")
    os.rename(source / "cats" / "1.png", source / "cats" / "1a.png")
    added = interrupted_after(10**6, None, monkeypatch)
    assert same(ps.PatchBank.convert(source, tmp_path / "bank.npy"), ps.PatchBank.open(source))
    assert len(added) == COUNT


def test_an_error_in_the_first_image_leaves_nothing(tmp_path):
    source = folder(tmp_path / "source")
    for path in source.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image"):
        ps.PatchBank.convert(source, tmp_path / "bank.npy")
    with pytest.raises(ValueError, match=r"none of its 9 images can be read"):
        ps.PatchBank.convert(source, tmp_path / "bank.npy", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    images = smooth_images(4, 1, 5, 5).numpy()
    ps.PatchBank.convert({"images": images, "labels": [0, 1, 2, 3]}, tmp_path / "bank.npy")
    with pytest.raises(ValueError, match=r"^out: .*bank\.npy exists already; pass overwrite"):
        ps.PatchBank.convert(images, tmp_path / "bank.npy")
    assert ps.PatchBank.convert(images[::-1].copy(), tmp_path / "bank.npy", overwrite=True).labels is None
    assert not (tmp_path / "bank.labels.npy").exists()
    # Into its own place, and labels that lie where none should.
    again = ps.PatchBank.convert(tmp_path / "bank.npy", tmp_path / "bank.npy", overwrite=True, limit=2)
    np.testing.assert_array_equal(again.images, images[:1:-1])
    np.save(tmp_path / "other.labels.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"other\.labels\.npy exists already"):
        ps.PatchBank.convert(images, tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"^out: got .* ends in \.npy"):
        ps.PatchBank.convert(images, tmp_path / "bank.npz")


def test_what_a_killed_call_left_of_labels_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / ".bank.labels.npy.0123abcd.tmp"
    for path in (left, tmp_path / ".other.labels.npy.0123abcd.tmp", tmp_path / ".bank.npy.tmp"):
        path.write_bytes(b"half")
    ps.PatchBank.convert(folder(tmp_path / "photos"), tmp_path / "bank.npy")
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".bank.npy.tmp", ".other.labels.npy.0123abcd.tmp"]


def test_the_command_says_what_it_wrote_and_what_stopped_it(tmp_path, monkeypatch):
    source, out = folder(tmp_path / "source"), tmp_path / "new" / "bank.npy"

    def run(*words):
        return CliRunner().invoke(main, ["bank", str(source), *words])

    assert run("--out", str(source / "bank.npy")).output.startswith("patchscore: error: --out: ")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    full = run("--out", str(out))
    assert full.exit_code == 2
    assert "9 images of 3 x 14 x 11 take 4.16e-06 GB, the disk has 1e-08 GB" in full.output
    monkeypatch.undo()
    done = run("--out", str(out), "--size", "6")
    assert done.exit_code == 0
    assert "PatchBank(9 images, 3 x 6 x 6, uint8, 2 classes, mapped)" in done.output
    assert "exists already" in run("--out", str(out)).output
