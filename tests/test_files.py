"""Files that are whole or absent, and the lock of a folder."""

import errno
import os
import subprocess
import sys

import pytest

from patchscore.files import locked, remove_temporaries, write_atomically


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
