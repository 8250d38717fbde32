"""A folder of image files, as a tree. Links are followed, hidden files are not seen."""

from __future__ import annotations

import os
from pathlib import Path

from .source import Source, Wanted
from .tree import Parts, Tree, tree_source


def folder(path: Path, wanted: Wanted) -> Source:
    """The images below a folder, in the order of their paths."""
    files, folders = _walked(path)
    tree = Tree(str(path), files, folders, lambda parts: path.joinpath(*parts), min(8, os.cpu_count() or 1))
    return tree_source(tree, wanted)


def _walked(top: Path) -> tuple[list[Parts], list[Parts]]:
    files: list[Parts] = []
    below: list[Parts] = []

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror or error}") from error

    for root, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        # A link back to a folder above would go round for ever.
        above = os.path.realpath(root) + os.sep
        folders[:] = [
            name
            for name in folders
            if _is_visible(name) and not above.startswith(os.path.realpath(os.path.join(root, name)) + os.sep)
        ]
        here = Path(root).relative_to(top).parts
        below += [(*here, name) for name in folders]
        for name in names:
            path = os.path.join(root, name)
            # Pipes and devices are no images; a dangling link is one that cannot be read.
            if _is_visible(name) and (os.path.isfile(path) or not os.path.exists(path)):
                files.append((*here, name))
    return sorted(files), sorted(below)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
