"""Files that are whole or absent, and the lock of a folder."""

import errno
import os
import subprocess
import sys

import pytest
from conftest import smooth_images

import patchscore as ps
from patchscore import files
from patchscore.files import Additions, locked, remove_temporaries, write_atomically


def test_a_full_disk_is_told_with_the_path_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_only_our_own_temporary_files_are_removed(tmp_path):
    mine = [".notes.tmp", "a.0123abcd.tmp", ".a.0123ABCD.tmp", ".a.0123abcd.tmp.txt"]
    for name in [*mine, ".a.png.0123abcd.tmp"]:
        (tmp_path / name).write_text("x")
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)


HOLD = """
import sys
from pathlib import Path
from patchscore.files import locked
with locked(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="taken"), locked(tmp_path, "taken"):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path, "taken"), pytest.raises(ValueError, match="taken"), locked(tmp_path, "taken"):
        pass


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".pairs.png.0123abcd.tmp").write_text("half")
    (tmp_path / "notes.tmp").write_text("mine")
    with locked(tmp_path, "taken"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "notes.tmp"]


def test_a_lock_file_is_neither_emptied_nor_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    lock = tmp_path / "folder" / ".lock"
    lock.write_text("mine")
    with locked(lock.parent, "taken"):
        pass
    assert lock.read_text() == "mine"
    lock.unlink()
    (tmp_path / "victim").write_text("precious")
    lock.symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="not a lock file of patchscore"), locked(lock.parent, "taken"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_where_locks_are_not_supported_a_warning_says_so(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked here"), locked(tmp_path, "taken"):
        pass


def test_additions_are_read_as_far_as_they_are_whole_and_go_on_from_there(tmp_path):
    path = tmp_path / "a.json"
    for i in range(4):
        Additions(path, "mine").append({"i": i}, bytes(range(i)))
    whole = (tmp_path / "a.json.added").read_bytes()
    assert [(record["i"], len(content)) for record, content in Additions(path, "mine").read()] == [
        (i, i) for i in range(4)
    ]
    ends = [0]
    for i in range(4):
        ends.append(whole.index(b"\n", ends[-1]) + 1 + i)
    for at in range(len(whole)):
        (tmp_path / "a.json.added").write_bytes(whole[:at])
        added = Additions(path, "mine")
        before = sum(at >= end for end in ends) - 1
        assert [record["i"] for record, _ in added.read()] == list(range(before)), at
        added.append({"i": 9})
        assert [record["i"] for record, _ in added.read()] == [*range(before), 9]
    for at in range(0, len(whole), 7):
        (tmp_path / "a.json.added").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert len(list(Additions(path, "mine").read())) == sum(at >= end for end in ends) - 1
    (tmp_path / "a.json.added").write_bytes(whole)
    assert not list(Additions(path, "another").read())
    Additions(path, "mine").remove()
    assert not list(Additions(path, "mine").read())


class Written:
    """Counts the bytes written to files that `patchscore.files` opens."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        monkeypatch.setattr(files, "open", self.opened, raising=False)

    def opened(self, path, mode="r", *more):
        file = open(path, mode, *more)  # noqa: SIM115
        write = file.write if "b" in mode and mode != "rb" else None
        if write is None:
            return file
        counted = type("Counted", (), {})()

        def count(content):
            self.bytes += len(content)
            return write(content)

        counted.write = count
        for name in ("flush", "fileno", "truncate", "seek"):
            setattr(counted, name, getattr(file, name))

        class Opened:
            def __enter__(self):
                return counted

            def __exit__(self, *arguments):
                file.close()

        return Opened()


def saved_by(kind, path, n):
    """Computes for n images, one a batch, and saves the progress in `path`."""
    bank = ps.PatchBank(smooth_images(42, 1, 6, 6))
    network, options = ps.IdealScore(bank), {"steps": 3, "batch_size": 1, "progress": False}
    if kind == "calibrate":
        ps.calibrate(network, bank, [1, 3], n=n, resume=path, **options)
    elif kind == "compare":
        ps.compare(network, {"a": network}, n=n, resume=path, **options)
    else:
        ps.held_out_errors(bank, [1, 3], [0.5, 1.0], images=n, resume=path, progress=False)


@pytest.mark.parametrize("kind", ["calibrate", "compare", "held out"])
def test_progress_is_saved_in_time_proportional_to_it(tmp_path, monkeypatch, kind):
    """Bytes written for 10, 20 and 40 images, one a batch: twice the images take twice as many."""

    def bytes_for(n):
        with monkeypatch.context() as patched:
            written, path = Written(patched), tmp_path / f"{n}.json"
            saved_by(kind, path, n)
            assert not path.with_name(f"{n}.json.added").exists()
            return written.bytes

    few, more, most = (bytes_for(n) for n in (10, 20, 40))
    assert (most - more) / (more - few) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("kind", ["calibrate", "compare", "held out"])
def test_additions_that_the_file_has_already_are_removed(tmp_path, monkeypatch, kind):
    """As where a kill came between writing the file whole and removing them."""
    path = tmp_path / "a.json"
    with monkeypatch.context() as patched:
        patched.setattr(Additions, "remove", lambda self: None)
        saved_by(kind, path, 3)
    whole = path.read_bytes()
    assert path.with_name("a.json.added").exists()
    saved_by(kind, path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == whole
