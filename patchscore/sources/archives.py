"""Zip and tar archives of images, read where they lie; nothing is ever unpacked to disk.

A tree of images in an archive is read as the folder would be (EDM and StyleGAN zips have dataset.json). A tar whose
images have files of the same key beside them is a WebDataset shard: 000012.jpg, 000012.cls, 000012.json.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .cifar import FOLDERS, cifar
from .image import MOST_FILE_BYTES, Encoded
from .source import LABEL_KEYS, Source, Wanted, joined, listed, named
from .tree import Parts, Tree, is_image, tree_source

MOST_LABEL_BYTES = 1 << 16
"""Bytes of the largest file that holds the label of a WebDataset item."""

# Zip.


def zip_images(path: Path, wanted: Wanted) -> Source:
    """A zip of images."""
    with named(path):
        archive = zipfile.ZipFile(path)
        members = {_parts(info.filename): info for info in archive.infolist() if not info.is_dir()}
        folders = [_parts(info.filename) for info in archive.infolist() if info.is_dir()]

    def encoded(parts: Parts) -> BinaryIO:
        info = members[parts]
        with named(Path(path, *parts)):
            if info.file_size > MOST_FILE_BYTES:
                raise ValueError(f"declares {info.file_size} bytes, takes at most {MOST_FILE_BYTES}")
            with archive.open(info) as file:
                return io.BytesIO(file.read())

    return tree_source(_tree(path, members, folders, encoded, min(8, os.cpu_count() or 1)), wanted)


def _parts(name: str) -> Parts:
    parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    if ".." in parts or not parts:
        raise ValueError(f"entry {name!r} leads out of the archive")
    return parts


def _tree(path: Path, files: Any, folders: list[Parts], encoded: Any, threads: int) -> Tree:
    def visible(parts: Parts) -> bool:
        return not any(part.startswith(".") or part == "__MACOSX" for part in parts)

    shown = sorted(parts for parts in files if visible(parts))
    above = {parts[:n] for parts in [*shown, *folders] for n in range(1, len(parts))} | set(folders)
    return Tree(str(path), shown, sorted(filter(visible, above)), encoded, threads)


# Tar.


class _Member(tarfile.TarInfo):
    """A header, of which the kinds that are read into memory whole are of reasonable size."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if not self.isfile() and self.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass
class _Tar:
    """The files of a tar; one that is not compressed is read at any place, another forwards."""

    path: Path
    sizes: dict[Parts, tuple[int, int]] = field(default_factory=dict)  # offset and size
    folders: list[Parts] = field(default_factory=list)
    small: dict[Parts, bytes] = field(default_factory=dict)
    compressed: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: Any = None
        with tarfile.open(self.path, "r:*", tarinfo=_Member) as tar:
            self.compressed = not isinstance(tar.fileobj, io.BufferedReader)
            # Every entry takes some bytes, however well its neighbours compress.
            most = os.path.getsize(self.path) // 8 + 10_000
            for count, info in enumerate(_members(tar)):
                if count > most:
                    raise ValueError("has more entries than its size can hold")
                if info.isdir():
                    self.folders.append(_parts(info.name))
                elif info.isreg() and not info.issparse():
                    parts = _parts(info.name)
                    self.sizes[parts] = (info.offset_data, info.size)
                    if parts[-1].endswith((".cls", ".json", ".txt")) and info.size <= MOST_LABEL_BYTES:
                        self.small[parts] = self._file(tar, info).read()

    @staticmethod
    def _file(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
        file = tar.extractfile(info)
        if file is None:
            raise ValueError(f"{info.name} is no file")
        return file

    def read(self, parts: Parts, most: int = MOST_FILE_BYTES) -> bytes:
        if parts in self.small:
            return self.small[parts]
        offset, size = self.sizes[parts]
        with named(Path(self.path, *parts)):
            if size > most:
                raise ValueError(f"declares {size} bytes, takes at most {most}")
            data = self._at(offset, size)
            if len(data) < size:
                raise ValueError(f"cut short: {len(data)} of {size} bytes")
        return data

    def _at(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._stream is None:
                # Open as long as the source is.
                opened = tarfile.open(self.path, "r:*").fileobj if self.compressed else open(self.path, "rb")  # noqa: SIM115
                self._stream = opened
            self._stream.seek(offset)
            return self._stream.read(size)

    def encoded(self, parts: Parts) -> BinaryIO:
        return io.BytesIO(self.read(parts))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        yield info
        tar.members.clear()  # type: ignore[attr-defined]  # It keeps all that it has met.


def tar_images(path: Path, wanted: Wanted) -> Source:
    """A tar of images: CIFAR as downloaded, a WebDataset shard, or a tree."""
    with named(path):
        tar = _Tar(path)
    for folder in FOLDERS:
        inside = {parts[1]: parts for parts in tar.sizes if parts[0] == folder and len(parts) == 2}
        # `inside` is bound now: each folder has its own.
        found = cifar(str(path / folder), inside, lambda name, inside=inside: tar.read(inside[name]), wanted)  # type: ignore[misc]
        if found is not None:
            return found
    if _is_shard(tar):
        return _shard(tar, wanted)
    threads = 1 if tar.compressed else min(8, os.cpu_count() or 1)
    return tree_source(_tree(path, tar.sizes, tar.folders, tar.encoded, threads), wanted)


# WebDataset.


def shards(folder: Path, wanted: Wanted) -> Source | None:
    """A folder of tars, with what may describe them, read one after the other; None if it is not one."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    tars = [name for name in names if name.endswith(".tar")]
    if not tars or not all(name.endswith((".tar", ".json", ".txt", ".md")) for name in names):
        return None
    return joined(str(folder), [tar_images(folder / name, wanted) for name in tars])


def _key(parts: Parts) -> tuple[str, str]:
    """The key of an item and the kind of this part of it: a/000.seg.png is seg.png of a/000."""
    stem, _, kind = parts[-1].partition(".")
    return "/".join([*parts[:-1], stem]), kind.lower()


def _is_shard(tar: _Tar) -> bool:
    images = {_key(parts)[0] for parts in tar.sizes if is_image(parts)}
    return any(_key(parts)[0] in images for parts in tar.sizes if not is_image(parts))


def _shard(tar: _Tar, wanted: Wanted) -> Source:
    items: dict[str, dict[str, Parts]] = {}
    for parts in tar.sizes:
        key, kind = _key(parts)
        items.setdefault(key, {})[kind] = parts
    kinds = list(dict.fromkeys(kind for item in items.values() for kind in item))
    images = [kind for kind in kinds if any(is_image(item[kind]) for item in items.values() if kind in item)]
    image_kinds = [wanted.image_key] if wanted.image_key is not None else images[:1]
    wanted.unused -= {"image_key", "label_key"}
    if len(images) > 1 and wanted.image_key is None:
        raise ValueError(f"{tar.path}: its items hold {listed(images, 'and')}; pass image_key= to say which")
    chosen = [item for item in items.values() if image_kinds[0] in item]
    if not chosen and items:
        raise ValueError(f"{tar.path}: image_key: got {wanted.image_key!r}, its items hold {listed(kinds, 'and')}")
    places = [item[image_kinds[0]] for item in chosen]
    with named(tar.path):
        found = [_shard_label(tar, item, wanted) if wanted.labels else None for item in chosen]
    texts = all(isinstance(label, str) for label in found)
    known = None if texts or None in found else np.asarray(found)

    def item(i: int) -> tuple[Encoded, Any]:
        return Encoded(tar.encoded(places[i])), found[i]

    def item_name(i: int) -> str:
        return str(Path(tar.path, *places[i]))

    threads = 1 if tar.compressed else min(8, os.cpu_count() or 1)
    names: tuple[str, ...] | None = None
    if texts and found:
        # Numbers of the texts, so that `limit` takes of every class.
        names = tuple(sorted(set(found)))  # type: ignore[arg-type]
        known = np.searchsorted(np.array(names), np.array(found))
    if known is not None and known.dtype.kind not in "iu":
        known = None
    return Source(str(tar.path), len(chosen), item, item_name, known, names, threads)


def _shard_label(tar: _Tar, item: dict[str, Parts], wanted: Wanted) -> Any:
    """The label of an item: a number or a text in .cls, or in the JSON by a key."""
    asked = wanted.label_key
    for kind in [asked] if asked is not None else ["cls"]:
        if kind in item:
            text = tar.read(item[kind], MOST_LABEL_BYTES).decode("utf-8").strip()
            return int(text) if text.isascii() and text.removeprefix("-").isdecimal() else text
    if "json" in item:
        content = json.loads(tar.read(item["json"], MOST_LABEL_BYTES))
        if isinstance(content, dict):
            for key in [asked] if asked is not None else LABEL_KEYS:
                if isinstance(content.get(key), (int, str)):
                    return content[key]
    if asked is not None:
        raise ValueError(f"label_key: got {asked!r}, an item holds {listed(item, 'and')}")
    return None
