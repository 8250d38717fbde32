"""LMDB databases of encoded images, as LSUN is distributed: the values in the order of their keys.

The file is read here and not by the lmdb library, which trusts what it maps: a damaged file could end the process. A
database is a B+ tree of pages. Page 0 and 1 are meta pages, of which the one with the higher transaction number holds
the root; branch pages list pages, leaf pages keys and values, and a large value lies on overflow pages.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import struct
from pathlib import Path

from .image import MOST_FILE_BYTES, Encoded
from .source import Source, Wanted, named

_MAGIC = 0xBEEFC0DE
_HEADER = struct.Struct("<QHHHH")  # page number, padding, flags, lower, upper
_META = struct.Struct("<IIQQ48s48sQQ")  # magic, version, address, size, two databases, last page, transaction
_DATABASE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, three counts of pages, entries, root
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG = 1
_NONE = 2**64 - 1
_DUPLICATES = 0x04
_DEEPEST = 32


def lmdb_folder(folder: Path, wanted: Wanted) -> Source | None:
    """A folder with data.mdb; None if it is not one."""
    path = folder / "data.mdb"
    return lmdb_file(path, wanted) if os.path.isfile(path) else None


def is_lmdb(start: bytes) -> bool:
    """Whether a file begins as an LMDB database does."""
    return len(start) >= 20 and struct.unpack_from("<I", start, 16)[0] == _MAGIC


def lmdb_file(path: Path, wanted: Wanted) -> Source:
    """The values of a database as images. LSUN's have no labels: a database is one class."""
    with named(path):
        database = _Database(path)
        places = database.values()

    def item(i: int) -> tuple[Encoded, None]:
        offset, size = places[i]
        return Encoded(io.BytesIO(database.data[offset : offset + size])), None

    threads = min(8, os.cpu_count() or 1)
    return Source(str(path), len(places), item, lambda i: f"{path}, value {i}", threads=threads)


class _Database:
    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.page_size = 4096
        first = self._meta(0)
        self.page_size = first[2]
        if self.page_size < 512 or self.page_size & (self.page_size - 1):
            raise ValueError(f"not an LMDB database: pages of {self.page_size} bytes")
        metas = [first]
        # A database that was cut off before its second transaction has one good meta page.
        with contextlib.suppress(ValueError):
            metas.append(self._meta(1))
        _, self.root, _, self.entries, flags = max(metas)
        if flags & _DUPLICATES:
            raise ValueError("an LMDB database with several values a key, takes one image a key")

    def _meta(self, page: int) -> tuple[int, int, int, int, int]:
        """Transaction number, root page, page size, entries and flags of a meta page."""
        at = page * self.page_size
        if at + _HEADER.size + _META.size > len(self.data):
            raise ValueError("not an LMDB database: cut short")
        magic, version, _, _, free, main, _, transaction = _META.unpack_from(self.data, at + _HEADER.size)
        if magic != _MAGIC or version != 1:
            raise ValueError("not an LMDB database")
        flags, _, _, _, _, entries, root = _DATABASE.unpack(main)[1:]
        return transaction, root, _DATABASE.unpack(free)[0], entries, flags

    def values(self) -> list[tuple[int, int]]:
        """Where each value lies: offset and size, in the order of the keys."""
        found: list[tuple[int, int]] = []
        seen: set[int] = set()
        if self.root == _NONE:
            return found
        pages = [(self.root, 0)]
        while pages:
            page, depth = pages.pop()
            if page in seen or depth > _DEEPEST:
                raise ValueError(f"damaged: page {page} is in a circle")
            seen.add(page)
            flags, nodes = self._nodes(page)
            if flags & _BRANCH:
                below = []
                for at in nodes:
                    low, high, top, _ = struct.unpack_from("<HHHH", self.data, at)
                    below.append((low | high << 16 | top << 32, depth + 1))
                pages += reversed(below)
            elif flags & _LEAF:
                found += [self._value(at) for at in nodes]
            else:
                raise ValueError(f"damaged: page {page} is neither branch nor leaf")
        if len(found) != self.entries:
            raise ValueError(f"damaged: {len(found)} values, its header says {self.entries}")
        return found

    def _nodes(self, page: int) -> tuple[int, list[int]]:
        at = page * self.page_size
        if page < 2 or at + self.page_size > len(self.data):
            raise ValueError(f"cut short: it has no page {page}")
        _, _, flags, lower, _ = _HEADER.unpack_from(self.data, at)
        if not _HEADER.size <= lower <= self.page_size:
            raise ValueError(f"damaged: page {page}")
        places = struct.unpack_from(f"<{(lower - _HEADER.size) // 2}H", self.data, at + _HEADER.size)
        if any(place + 8 > self.page_size for place in places):
            raise ValueError(f"damaged: page {page}")
        return flags, [at + place for place in places]

    def _value(self, at: int) -> tuple[int, int]:
        low, high, flags, key_size = struct.unpack_from("<HHHH", self.data, at)
        offset, size = at + 8 + key_size, low | high << 16
        if flags & _BIG:
            if offset + 8 > len(self.data):
                raise ValueError("damaged: a value beyond the file")
            (page,) = struct.unpack_from("<Q", self.data, offset)
            offset = page * self.page_size + _HEADER.size
        elif flags:
            raise ValueError("an LMDB database within an LMDB database, takes one image a key")
        if offset + size > len(self.data) or size > MOST_FILE_BYTES:
            raise ValueError("damaged: a value beyond the file")
        return offset, size
