"""Files that are whole or absent, and folders that one process writes at a time.

What is written appears under its name only once it is complete. A folder is locked while it is written; whatever a
killed process left under a temporary name is removed by the next one that holds the lock.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames; an interruption leaves the old file, or none."""
    # Named before it exists, so that an interruption at any moment knows what to remove.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with errors_name(path), open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # An interruption may come just after the rename.
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path) -> None:
    """Removes what killed calls of `write_atomically` left in a folder; takes the folder's lock to be held."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink()


@contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Holds the lock of a folder, which the operating system releases when the process ends, however it ends.

    The lock file is created where it is absent and never written to or followed.

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
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock: two writers are not noticed there.
            pass
        except BlockingIOError:
            raise ValueError(taken) from None
        except OSError as error:
            warnings.warn(
                f"{path}: cannot be locked here ({error.strerror}); let no other process write this folder",
                stacklevel=3,
            )
        yield
    finally:
        os.close(descriptor)
