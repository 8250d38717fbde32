"""CIFAR-10 and CIFAR-100 as downloaded: Python batches or binary ones, in their folder or still in the tar.gz.

The Python batches are pickles. They are read by an unpickler that knows numpy arrays alone and builds them itself.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import labelled_array, unflattened
from .source import Source, Wanted, joined, listed, named, one_line

FOLDERS = ("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")
MOST_BATCH_BYTES = 1 << 29

Read = Callable[[str], bytes]
"""What a file of a given name holds."""

# Files of each split, and the two kinds of labels of CIFAR-100.
_PYTHON = {"train": r"data_batch_\d+|train", "test": r"test_batch|test"}
_BINARY = {"train": r"data_batch_\d+\.bin|train\.bin", "test": r"test_batch\.bin|test\.bin"}
_LABELS = ("labels", "fine_labels", "coarse_labels")


def cifar_folder(folder: Path, wanted: Wanted) -> Source | None:
    """A folder with CIFAR's batches; None if it is not one."""
    patterns = [*_PYTHON.values(), *_BINARY.values()]
    named_so = [
        name
        for name in os.listdir(folder)
        if name in (*_META, *_META_TEXT) or any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    names = [name for name in named_so if os.path.isfile(folder / name)]
    return cifar(str(folder), names, lambda name: _bytes(folder / name), wanted)


def cifar(name: str, files: Iterable[str], read: Read, wanted: Wanted) -> Source | None:
    """The batches among some files; None where there are none."""
    files = sorted(files)
    binary = any(re.fullmatch(_BINARY["train"], file) or re.fullmatch(_BINARY["test"], file) for file in files)
    if not binary and not {"batches.meta", "meta"} & set(files):
        return None
    parts = {
        split: [file for file in files if re.fullmatch(pattern, file)]
        for split, pattern in (_BINARY if binary else _PYTHON).items()
    }
    held = [split for split in parts if parts[split]]
    if not held:
        return None
    split = wanted.choose_split(name, held, "train")
    batch = _binary_batch if binary else _python_batch
    meta = _names(files, read)
    return joined(name, [batch(os.path.join(name, file), read(file), meta, wanted) for file in parts[split]])


def cifar_file(path: Path, wanted: Wanted) -> Source:
    """One Python batch, or one binary batch by CIFAR's own file names; class names from the files beside it."""
    beside = [name for name in os.listdir(path.parent) if name in (*_META, *_META_TEXT)]
    meta = _names(beside, lambda name: _bytes(path.parent / name))
    batch = _binary_batch if is_binary_name(path.name) else _python_batch
    return batch(str(path), _bytes(path), meta, wanted)


def is_binary_name(name: str) -> bool:
    """Whether a file has the name of a binary batch."""
    return any(re.fullmatch(pattern, name) for pattern in _BINARY.values())


def _bytes(path: Path) -> bytes:
    with named(path):
        if os.path.getsize(path) > MOST_BATCH_BYTES:
            raise ValueError(f"takes batches of at most {MOST_BATCH_BYTES} bytes")
        return path.read_bytes()


# Batches.


def _python_batch(name: str, data: bytes, meta: dict[str, list[str]], wanted: Wanted) -> Source:
    with named(name):
        content = unpickled(data)
        if "data" not in content or not isinstance(content["data"], np.ndarray):
            raise ValueError(f"holds {listed(content)}, takes a batch of CIFAR with data")
        label_key = _label_key(name, [key for key in _LABELS if key in content], wanted)
        labels = None if label_key is None else content[label_key]
        images = unflattened(content["data"], name)
    return labelled_array(name, images, labels, meta.get(label_key or ""))


def _binary_batch(name: str, data: bytes, meta: dict[str, list[str]], wanted: Wanted) -> Source:
    """A record is the label, in CIFAR-100 the coarse and the fine one, then 3 x 32 x 32 pixels."""
    with named(name):
        before = 1 if os.path.basename(name).startswith(("data_batch", "test_batch")) else 2
        if not data or len(data) % (before + 3072):
            raise ValueError(f"{len(data)} bytes, takes records of {before + 3072}")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, before + 3072)
        columns = {"labels": 0} if before == 1 else {"fine_labels": 1, "coarse_labels": 0}
        label_key = _label_key(name, list(columns), wanted)
        labels = None if label_key is None else records[:, columns[label_key]]
    return labelled_array(name, records[:, before:].reshape(-1, 3, 32, 32), labels, meta.get(label_key or ""))


def _label_key(name: str, held: list[str], wanted: Wanted) -> str | None:
    if wanted.label_key is None:
        return held[0] if held and wanted.labels else None
    return wanted.choose_keys(name, ["data", *held], labels=_LABELS)[1]


# Class names.

_META: dict[str, dict[str, str]] = {
    "batches.meta": {"label_names": "labels"},
    "meta": {"fine_label_names": "fine_labels", "coarse_label_names": "coarse_labels"},
}

_META_TEXT = {
    "batches.meta.txt": "labels",
    "fine_label_names.txt": "fine_labels",
    "coarse_label_names.txt": "coarse_labels",
}


def _names(files: Iterable[str], read: Read) -> dict[str, list[str]]:
    """The names of the classes, by the kind of labels."""
    found: dict[str, list[str]] = {}
    for file in files:
        if file in _META_TEXT:
            found[_META_TEXT[file]] = read(file).decode("utf-8", "replace").split()
        elif kinds := _META.get(file):
            with named(file):
                content = unpickled(read(file))
            for key, kind in kinds.items():
                names = content.get(key)
                if isinstance(names, list) and all(isinstance(name, (bytes, str)) for name in names):
                    found[kind] = [
                        name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names
                    ]
    return found


# The unpickler.


class _Dtype:
    """What a pickle says of a numpy dtype: integers and floats only."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any = None, *_: Any):
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[uif][1248]|b1", code):
            raise pickle.UnpicklingError(f"arrays of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a byte order")
        self.order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """What a pickle says of a numpy array."""

    __slots__ = ("state",)

    def __init__(self, *state: Any):
        self.state: tuple[Any, ...] | None = state or None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.state = (data, dtype, shape, "F" if fortran else "C")

    def array(self) -> np.ndarray:
        if self.state is None:
            raise pickle.UnpicklingError("an array without values")
        data, dtype, shape, order = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array that is none")
        return np.frombuffer(data, dtype=dtype.dtype()).reshape(shape, order=order)


class _Call:
    """A function that a pickle may call; without attributes that it could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes to pickles that Python 2 can read."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding")
    return text.encode("latin1")


_REFUSED = {
    code[0]
    for code in (
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
        pickle.PERSID,
        pickle.BINPERSID,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
        pickle.INST,
        pickle.OBJ,
        pickle.NEWOBJ,
        pickle.NEWOBJ_EX,
    )
}


_Unpickler: Any = pickle._Unpickler
"""In Python: a few bytes make the one in C fill any amount of memory with places for remembered objects."""


class _ArraysOnly(_Unpickler):
    """Numbers, texts, lists, dicts and numpy arrays; any other thing in a pickle is an error."""

    dispatch = {  # noqa: RUF012
        code: function for code, function in _Unpickler.dispatch.items() if code not in _REFUSED
    }

    def _bytearray8(self) -> None:
        # pickle's own reserves the length that the file states, whatever the file holds.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BYTEARRAY8[0]] = _bytearray8

    def find_class(self, module: str, name: str) -> Any:
        if re.fullmatch(r"numpy\.(_?core)\.(multiarray|numeric)|numpy|_codecs", module):
            if name == "_reconstruct":
                return _Call(_reconstruct)
            if name == "_frombuffer":
                return _Call(_Array)
            if name in ("ndarray", "dtype"):
                return _Call(_Dtype)
            if (module, name) == ("_codecs", "encode"):
                return _Call(_encode)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def unpickled(data: bytes) -> dict[str, Any]:
    """A dict of numpy arrays, numbers and texts from a pickle; ValueError for anything else."""
    try:
        content = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        found = {
            key.decode("latin1") if isinstance(key, bytes) else str(key): value.array()
            if isinstance(value, _Array)
            else value
            for key, value in content.items()
        }
    except Exception as error:
        raise ValueError(
            f"a pickle that is not a dict of arrays ({one_line(error)}); other pickles can run code and are not loaded"
        ) from error
    return found
