"""Whole files or none: what is written appears under its name only once it is complete."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames; an interruption leaves the old file, or none."""
    # Named before it exists, so that an interruption at any moment knows what to remove.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # An interruption may come just after the rename.
        temporary.unlink(missing_ok=True)
        raise
