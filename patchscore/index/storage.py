"""What is written about an index beside its data: descriptions, checksums, and what is refused when it is opened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..bank import PatchBank
from ..files import parse_json, sealed, unsealed, write_atomically

FORMAT = 4
"""Since 4 cells hold where their windows lie and their bytes; since 3 every description carries a hash."""

OPTIONS = ("padding_mode", "rank", "cells", "max_windows", "seed")
PART = ("bank", *OPTIONS)
"""What the description of a patch size repeats of the index's, so that a part of another index is refused."""

VERIFIED_AT_OPEN = 64 << 20


def read_meta(path: Path, bank: PatchBank) -> dict[str, Any]:
    """The description of the index in `path`; ValueError where there is none, or it is not of this bank and format."""
    try:
        meta = _read(path / "meta.json")
    except FileNotFoundError:
        raise ValueError(f"{path}: no index here; PatchIndex.build or `patchscore index` makes one") from None
    if meta.get("format") != FORMAT:
        sizes = ",".join(map(str, meta.get("patch_sizes") or ["3"]))
        raise ValueError(
            f"{path}: index format {meta.get('format')!r}, this version reads {FORMAT}; build it again elsewhere: "
            f"patchscore index SOURCE --patch-sizes {sizes} --out {path}-{FORMAT}"
        )
    whole = {"images", "shape", "patch_sizes", *PART} <= meta.keys() and isinstance(meta["patch_sizes"], list)
    if not whole or not all(isinstance(k, int) for k in meta["patch_sizes"]):
        raise ValueError(f"{path / 'meta.json'}: damaged, not the description of an index")
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
    _write(folder / "meta.json", {"format": FORMAT, **{name: meta[name] for name in PART}, **record, "files": held})


def read_part_meta(folder: Path, meta: dict[str, Any], k: int, verify: bool) -> dict[str, Any]:
    """The description of one patch size; ValueError where it, or a file, is missing, damaged or of another index."""
    try:
        part = _read(folder / "meta.json")
    except OSError:
        raise ValueError(f"{folder / 'meta.json'}: missing; build the index again") from None
    for name, expected in {"format": FORMAT, "patch_size": k, **{n: meta[n] for n in PART}}.items():
        if part.get(name) != expected:
            what = "bank" if name == "bank" else f"{name} {part.get(name)!r} instead of {expected!r}"
            raise ValueError(f"{folder}: part of an index of another {what}; build the index again")
    try:
        files = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in part["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{folder / 'meta.json'}: damaged, not the description of an index") from None
    for name, (length, digest) in files.items():
        found = folder / name
        size = found.stat().st_size if found.is_file() else -1
        if size != length:
            is_now = "is missing" if size < 0 else f"has {size} bytes instead of {length}"
            raise ValueError(f"{found}: {is_now}; build the index again")
        if (verify or size <= VERIFIED_AT_OPEN) and sha256(found) != digest:
            raise ValueError(f"{found}: was changed since it was written; build the index again")
    return part


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A description, its hash checked; one of another format as it is."""
    try:
        record = parse_json(path.read_bytes())
        return unsealed(record) if record["format"] == FORMAT else record
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged, not the description of an index") from None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes a description with its hash."""
    write_atomically(path, (json.dumps(sealed(content), indent=1) + "\n").encode())
