"""What is written about an index beside its data: descriptions, checksums, and what is refused when it is opened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..bank import PatchBank
from ..files import write_atomically

FORMAT = 3
OPTIONS = ("padding_mode", "rank", "cells", "max_windows", "seed")
PART = ("bank", *OPTIONS)
"""What the description of a patch size repeats of the index's, as "of", so that a part of another index is refused."""

VERIFIED_AT_OPEN = 64 << 20
REBUILD = "build it again with `patchscore index` (PatchIndex.build) in another folder"


def read_meta(path: Path, bank: PatchBank) -> dict[str, Any]:
    """The description of the index in `path`; ValueError where there is none, or it is not of this bank and format."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text())
        form = meta["format"]
        if form == FORMAT:
            _ = [meta[name] for name in ("bank", "images", "shape", "patch_sizes", *OPTIONS)]
            if meta["checksum"] != _checksum(meta):
                raise KeyError
    except FileNotFoundError:
        raise ValueError(f"{path}: no index here; PatchIndex.build or `patchscore index` makes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file}: damaged, not the description of an index") from None
    if form != FORMAT:
        raise ValueError(f"{path}: index format {form}, this version reads {FORMAT}; {REBUILD}")
    if meta["bank"] != bank.fingerprint:
        raise ValueError(f"{path}: the index of another bank: {_difference(meta, bank)}")
    return meta


def _difference(meta: dict[str, Any], bank: PatchBank) -> str:
    """How the bank of an index differs from this one, and what usually makes them differ."""
    (n, shape), (images, own) = (meta.get("images"), meta.get("shape")), (len(bank), list(bank.shape))
    if shape != own:
        then, now = (" x ".join(map(str, part)) for part in (shape or ["?"], own))
        return f"it has images of {then}, this bank of {now}; --size and --channels must be as they were"
    if n != images:
        return f"it has {n} images, this bank {images}; --limit and --skip-bad must be as they were"
    return f"as many images of the same shape, {n}, but other pixels or labels"


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    _write(path / "meta.json", meta)


def write_part_meta(folder: Path, meta: dict[str, Any], record: dict[str, Any]) -> None:
    """Describes one patch size: what it is of, how it was made, and its files."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    held = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    _write(folder / "meta.json", {"format": FORMAT, "of": {name: meta[name] for name in PART}, **record, "files": held})


def read_part_meta(folder: Path, meta: dict[str, Any], k: int, verify: bool) -> dict[str, Any]:
    """The description of one patch size; ValueError where it, or a file, is missing, damaged or of another index."""
    file = folder / "meta.json"
    try:
        part = json.loads(file.read_text())
        if part["checksum"] != _checksum(part):
            raise KeyError
        files, of = part["files"], part["of"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file}: missing or damaged; build the index again") from None
    for name in PART:
        if of[name] != meta[name]:
            raise ValueError(
                f"{folder}: part of another index ({name} {_short(of[name])}, this index has {_short(meta[name])})"
            )
    if part["patch_size"] != k or part["format"] != FORMAT:
        raise ValueError(f"{folder}: part of another index (patch size {part['patch_size']}, format {part['format']})")
    for name, expected in files.items():
        found = folder / name
        size = found.stat().st_size if found.is_file() else -1
        if size != expected["bytes"]:
            is_now = "is missing" if size < 0 else f"has {size} bytes instead of {expected['bytes']}"
            raise ValueError(f"{found}: {is_now}; build the index again")
        if (verify or size <= VERIFIED_AT_OPEN) and sha256(found) != expected["sha256"]:
            raise ValueError(f"{found}: was changed since it was written; build the index again")
    return part


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    content = {name: value for name, value in content.items() if name != "checksum"}
    write_atomically(path, (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode())


def _checksum(content: dict[str, Any]) -> str:
    kept = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) else repr(value)
