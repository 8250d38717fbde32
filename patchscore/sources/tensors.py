"""Images in .pt files, read with weights_only so that no code in them runs, and in .safetensors files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .arrays import array_source, labelled_array
from .dataset import dataset, mapping
from .image import as_numpy
from .source import Source, Wanted, named


def torch_file(path: Path, wanted: Wanted) -> Source:
    """A tensor, (images, labels), a list of images, or a dict of them, as torch.save writes it."""
    with named(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
                raise ValueError("holds other things than tensors, lists and dicts; save the tensors alone") from error
            raise
        return _renamed(_of_content(str(path), content, wanted), path)


def _of_content(name: str, content: Any, wanted: Wanted) -> Source:
    if isinstance(content, Tensor):
        return array_source(name, as_numpy(content))
    if isinstance(content, dict):
        return mapping(content, wanted)
    if isinstance(content, (tuple, list)) and len(content) == 2 and all(isinstance(part, Tensor) for part in content):
        images, labels = content
        if labels.ndim == 1 and len(labels) == len(images):
            return labelled_array(name, as_numpy(images), as_numpy(labels) if wanted.labels else None)
    if isinstance(content, (tuple, list)):
        return dataset(content, wanted)
    raise ValueError(f"holds {type(content).__name__}, takes a tensor, (images, labels), a list or a dict of them")


def _renamed(source: Source, path: Path) -> Source:
    """The same under the name of its file."""
    name = str(path)
    return Source(
        name,
        source.count,
        source.item,
        lambda i: f"{name}, image {i}",
        source.labels,
        source.class_names,
        source.threads,
    )


def safetensors_file(path: Path, wanted: Wanted) -> Source:
    """The tensors of a .safetensors file; one alone may have any name."""
    with named(path), safe_open(path, framework="pt") as held:
        keys = sorted(held.keys())
        if len(keys) == 1 and wanted.image_key is None and wanted.label_key is None:
            return array_source(str(path), as_numpy(held.get_tensor(keys[0])))
        image_key, label_key = wanted.choose_keys(str(path), keys)
        labels = None if label_key is None else as_numpy(held.get_tensor(label_key))
        return labelled_array(str(path), as_numpy(held.get_tensor(image_key)), labels)


def read_values(source: Any, image_key: str | None = None) -> Any:
    """An array, or the one in a .npy, .pt or .safetensors file, with its own values and axes.

    Raises:
        ValueError: a file of another kind, unreadable, or of several arrays without `image_key`.
        TypeError: neither an array nor a path.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, with a value_range takes an array or a file of one")
    path = Path(source)
    with named(path):
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix in (".pt", ".pth"):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError("no file of tensors alone; save the tensors with torch.save") from error
            held = {"": content} if isinstance(content, Tensor) else content
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                held = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        else:
            raise ValueError("with a value_range takes a .npy, .pt or .safetensors file")
        if not isinstance(held, dict):
            raise ValueError(f"holds {type(held).__name__}, takes a tensor or a dict of them")
        if image_key is None and len(held) > 1:
            raise ValueError(f"holds {', '.join(sorted(map(str, held)))}; image_key says which are the images")
        key = next(iter(held)) if image_key is None and held else image_key
        if not isinstance(held.get(key), Tensor):
            raise ValueError(f"holds no tensor {key!r}")
        return held[key]
