"""Atomic file writes, folders that one process writes at a time, and the headers of files.

What is written appears under its name only once it is complete. A folder is locked while it is written; whatever a
killed process left under a temporary name is removed by the next one that holds the lock. JSON files carry a format
and a version (a header), and a hash where a flipped bit would otherwise go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LOCK = ".lock"
"""Name of the file in a folder that its writer holds locked. It is empty, and stays when the lock is released."""

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names that `write_atomically` gives to unfinished files."""


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Puts `path` into errors of the operating system that name no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, content: bytes, sync: bool = True) -> None:
    """Writes to a temporary name beside `path`, then renames; an interruption leaves the old file, or none.

    Args:
        sync: wait until the content is on the disk, so that this holds for a power cut too. Files whose hash is kept
            elsewhere and checked later do without.
    """
    # Named before it exists, so that an interruption at any moment knows what to remove.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with errors_name(path), open(temporary, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # An interruption may come just after the rename.
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """OSError where a folder, or the nearest one above it that exists, cannot be written; nothing is made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: {there} cannot be written")


def remove_temporaries(folder: Path, names: Collection[str] | None = None) -> None:
    """Removes what killed calls of `write_atomically` left in a folder, of all or some files; takes them as locked."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and (names is None or path.name[1:-13] in names):
            path.unlink()


@contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Holds the lock of a folder, which the operating system releases when the process ends, however it ends.

    What killed calls of `write_atomically` left in the folder is removed. The lock file is created where it is absent,
    and never written to or followed.

    Raises:
        ValueError: another process holds it (the message is `taken`), or something else has its name.
        OSError: the folder cannot be written.
    """
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: not a lock file of patchscore; take another folder")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: not a lock file of patchscore; take another folder")
        if hold(descriptor, path, taken):
            remove_temporaries(folder)
        yield
    finally:
        os.close(descriptor)


def hold(descriptor: int, path: str | Path, taken: str) -> bool:
    """Locks an open file until it is closed, and says whether it is known to be locked.

    Raises:
        ValueError: another process holds it; the message is `taken`.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock: two writers are not noticed there.
        return False
    except BlockingIOError:
        raise ValueError(taken) from None
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be locked here ({error.strerror}); let no other process write beside it", stacklevel=4
        )
        return False
    return True


def sha256(content: bytes) -> str:
    """The SHA-256 hash in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def parse_json(content: bytes) -> Any:
    """The value of a JSON text; ValueError for whatever is none, and for one nested too deeply to read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_npy(path: Path, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, mapped read-only or in memory; ValueError, without the path, where there is none.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # numpy parses a damaged header with Python's tokenizer, whose errors come through
        raise ValueError(f"not a whole .npy file: {' '.join(str(error).split())}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError("not a .npy file")
    return found


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its content under "sha256", which `unsealed` checks."""
    content = json.loads(json.dumps(record))  # as it will be read back: tuples become lists, keys strings
    return {**content, "sha256": _seal(content)}


def unsealed(record: Any) -> dict[str, Any]:
    """The content of a JSON object that `sealed` made; ValueError for any other."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    content = {name: value for name, value in record.items() if name != "sha256"}
    if record.get("sha256") != _seal(content):
        raise ValueError("was changed since it was written")
    return content


def _seal(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


class Additions:
    """What has been added to a file since it was written whole: records appended to another beside it.

    So a long computation saves its progress in time proportional to it: the file is written once it has a first part
    and again at the end, and every part between is appended. A record is a sealed line, and bytes that it counts.

    Args:
        path: of the file written whole; the additions are in path + ".added".
        of: what they belong to, as a JSON value; those of anything else are dropped.
    """

    def __init__(self, path: str | os.PathLike[str], of: Any):
        self.path = Path(f"{os.fspath(path)}.added")
        self.of = sha256(json.dumps(of, sort_keys=True).encode())

    def read(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The records and their bytes, as far as they are whole; what follows is cut off."""
        if not self.path.exists():
            return
        whole = 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    record = unsealed(parse_json(line))
                    content = file.read(record["bytes"])
                    if not line.endswith(b"\n") or record["of"] != self.of or record["content"] != sha256(content):
                        break
                except (ValueError, KeyError, TypeError):
                    break
                whole = file.tell()
                yield record["record"], content
        with errors_name(self.path), open(self.path, "r+b") as file:
            file.truncate(whole)

    def append(self, record: Mapping[str, Any], content: bytes = b"") -> None:
        """Adds a record, and bytes that belong to it."""
        line = sealed({"of": self.of, "record": record, "bytes": len(content), "content": sha256(content)})
        with errors_name(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n" + content)

    def remove(self) -> None:
        """Once the file has them all."""
        self.path.unlink(missing_ok=True)


def header(kind: str, version: int) -> dict[str, Any]:
    """What every JSON object that patchscore writes to a file begins with."""
    return {"format": kind, "version": version}


def check_header(found: Any, kind: str, *versions: int) -> None:
    """ValueError, unless a JSON object (or metadata, whose values are text) has the header of this kind of file."""
    if not isinstance(found, Mapping) or found.get("format") != kind:
        raise ValueError(f"not a {kind.replace('-', ' ')}")
    version = found.get("version")
    if str(version) not in map(str, versions):
        raise ValueError(f"format version {version!r}, this release reads {' and '.join(map(str, versions))}")


def write_record(path: Path, kind: str, version: int, content: Mapping[str, Any], seal: bool = False) -> None:
    """Writes a JSON object with its header, and sealed where nobody should write it by hand."""
    record = {**header(kind, version), **content}
    text = json.dumps(sealed(record) if seal else record, indent=1)
    write_atomically(path, (text + "\n").encode())


def read_record(path: Path, kind: str, *versions: int) -> dict[str, Any]:
    """Reads a JSON object and checks its header; ValueError says what is wrong, without the path."""
    found = parse_json(path.read_bytes())
    check_header(found, kind, *versions)
    return found
