"""Parquet files and folders, and Hugging Face's save_to_disk folders (Arrow), through pyarrow.

A column of images holds encoded files, bare or as {bytes, path}, or arrays as nested lists. The columns are read in
batches as images are asked for; only that of the labels is read whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .image import file_or_array, image_formats
from .source import IMAGE_KEYS, Source, Wanted, joined, named
from .tree import integers, read_json

BATCH = 32
"""Rows that are decoded at a time."""

_SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?=[-_.]|$)", re.IGNORECASE)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"parquet and Arrow files need pyarrow: pip install 'patchscore[parquet]' ({error})"
        ) from None
    return pyarrow


def parquet_file(path: Path, wanted: Wanted) -> Source:
    """The images of one parquet file."""
    pyarrow = _pyarrow()
    with named(path):
        file = pyarrow.parquet.ParquetFile(path)

        def batches(column: str) -> Iterator[Any]:
            yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH, columns=[column])

        return _table(str(path), file.schema_arrow, file.metadata.num_rows, batches, wanted)


def parquet_folder(folder: Path, wanted: Wanted) -> Source | None:
    """A folder of parquet files, as data sets are published; None if there are none in it, or images beside them."""
    if _has_images(folder):
        return None
    found = sorted(path for path in folder.rglob("*.parquet") if path.is_file() and not path.name.startswith("."))
    if not found:
        return None
    splits: dict[str, list[Path]] = {}
    for path in found:
        match = _SPLIT.match(path.name) or _SPLIT.fullmatch(path.parent.name)
        splits.setdefault(match[1] if match else "", []).append(path)
    if "" in splits:
        if len(splits) > 1:
            raise ValueError(
                f"{folder}: {splits[''][0].name} is of no split, where others are; open the files one by one"
            )
        chosen = splits[""]
    else:
        chosen = splits[wanted.choose_split(str(folder), splits)]
    return joined(str(folder), [parquet_file(path, wanted) for path in chosen])


def _has_images(folder: Path) -> bool:
    suffixes = image_formats()[0]
    return any(os.path.splitext(name)[1].lower() in suffixes for _, _, names in os.walk(folder) for name in names)


def saved_dataset(folder: Path, wanted: Wanted) -> Source | None:
    """A folder that a Hugging Face dataset, or several as splits, wrote with save_to_disk; None if it is not one."""
    if os.path.isfile(folder / "dataset_dict.json"):
        with named(folder / "dataset_dict.json"):
            splits = read_json(folder / "dataset_dict.json")["splits"]
            if not isinstance(splits, list) or not all(_is_name(split) for split in splits):
                raise ValueError("takes a list of splits")
        below = folder / wanted.choose_split(str(folder), splits)
        found = saved_dataset(below, wanted)
        if found is None:
            raise ValueError(f"{below}: holds no state.json")
        return found
    if not os.path.isfile(folder / "state.json"):
        return None
    with named(folder / "state.json"):
        files = [entry["filename"] for entry in read_json(folder / "state.json")["_data_files"]]
        if not files or not all(_is_name(file) for file in files):
            raise ValueError("takes a list of data files in the same folder")
    return joined(str(folder), [_arrow_file(folder / file, wanted) for file in files])


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name and "\0" not in name


def _arrow_file(path: Path, wanted: Wanted) -> Source:
    pyarrow = _pyarrow()
    with named(path):
        if not os.path.getsize(path):
            raise ValueError("empty")
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as reader:
            schema = reader.schema
            # A view of the mapped file. Offsets that lead out of it are found here and not by reading them.
            held = list(reader)
            for batch in held:
                batch.validate(full=True)

        def batches(column: str) -> Iterator[Any]:
            for batch in held:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH).select([column])

        return _table(str(path), schema, sum(batch.num_rows for batch in held), batches, wanted)


# Both.


class _Column:
    """Values of one column, decoded in batches, forwards."""

    def __init__(self, batches: Callable[[str], Iterator[Any]], name: str):
        self._batches, self._name = batches, name
        self._start()

    def _start(self) -> None:
        self._rest = self._batches(self._name)
        self._first = 0
        self._values: Any = ()

    def __getitem__(self, i: int) -> Any:
        if i < self._first:
            self._start()
        while i >= self._first + len(self._values):
            self._first += len(self._values)
            batch = next(self._rest, None)
            if batch is None:
                raise ValueError(f"cut short: it has no row {i}")
            self._values = batch.column(0)
        return self._values[i - self._first].as_py()


def _table(name: str, schema: Any, count: int, batches: Callable[[str], Iterator[Any]], wanted: Wanted) -> Source:
    held = list(schema.names)
    images = [*(key for key in IMAGE_KEYS if key in held), *_encoded_columns(schema)]
    image_key, label_key = wanted.choose_keys(name, held, images)
    column = _Column(batches, image_key)
    labels, class_names = None, None
    if label_key is not None:
        with named(f"{name}: column {label_key!r}"):
            labels, class_names = _labels(schema, label_key, count, batches)

    def item(i: int) -> tuple[Any, Any]:
        with named(name):
            value = column[i]
        return file_or_array(value, f"{name}, row {i}"), None if labels is None else int(labels[i])

    return Source(name, count, item, lambda i: f"{name}, row {i}", labels, class_names)


def _encoded_columns(schema: Any) -> list[str]:
    """Columns that hold files: bytes, or Hugging Face's {bytes, path}."""
    types = _pyarrow().types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [
        field.name
        for field in schema
        if is_bytes(field.type)
        or (types.is_struct(field.type) and any(part.name == "bytes" and is_bytes(part.type) for part in field.type))
    ]


def _labels(
    schema: Any, key: str, count: int, batches: Callable[[str], Iterator[Any]]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    values = [value for batch in batches(key) for value in batch.column(0).to_pylist()]
    if None in values:
        raise ValueError("has empty labels; or pass labels=False")
    if values and all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[value] for value in values]), names
    numbers = integers(values, count)
    if (numbers == -1).all():
        return None, None
    found = _class_names(schema, key)
    fits = found is not None and len(numbers) and 0 <= numbers.min() <= numbers.max() < len(found)
    return numbers, found if fits else None


def _class_names(schema: Any, key: str) -> tuple[str, ...] | None:
    """The names that Hugging Face keeps in the metadata of a table."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][key]
        names = feature["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
