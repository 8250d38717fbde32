"""The cells of an index: centroids by k-means in three levels, and the cell of a window.

Groups of parents, parents, and the SIBLINGS cells of each parent. FAISS does the arithmetic, one thread a task, so that
the result does not depend on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SIBLINGS = 16
"""Cells under one parent: expected weights are computed for parents first, then for the cells of those that matter."""

ITERATIONS = 8
"""Of each k-means; more moves centroids by less than the spread of their windows."""

PER_GROUP = 256
"""Training windows for each centroid of the top level."""


def faiss() -> Any:
    try:
        import faiss as module
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise ImportError('PatchIndex needs FAISS: pip install "patchscore[cpu]", or "patchscore[gpu]"') from None
    except ImportError as error:
        raise ImportError(f"PatchIndex needs FAISS, which is installed but cannot be loaded: {error}") from None
    return module


class Tree:
    """Centroids of parents, reached through groups of them, and of the cells of each parent.

    Args:
        sample: [n, rank] float32 features of training windows.
        parents: how many parents.
        seed: of k-means.
        threads: tasks side by side; the result does not depend on it.
    """

    def __init__(self, sample: np.ndarray, parents: int, seed: int, threads: int):
        groups = max(1, round(math.sqrt(parents))) if parents > 64 else 1
        (self.top,) = in_threads(lambda _: _kmeans(sample[: PER_GROUP * groups], groups, seed), [0], 1)
        members = split(np.concatenate(in_threads(
            lambda at: _nearest(self.top, sample[at : at + 65536]), range(0, len(sample), 65536), threads
        )), groups)  # fmt: skip
        # Parents in proportion to a group's windows.
        share = np.maximum(1, [parents * len(rows) // len(sample) for rows in members])
        while share.sum() > parents:
            share[np.argmax(share)] -= 1
        share[np.argmax([len(rows) for rows in members])] += parents - share.sum()

        def parents_of(g: int) -> np.ndarray:
            inside = sample[members[g]]
            return _kmeans(inside, share[g], seed) if len(inside) else self.top[g : g + 1]

        found = in_threads(parents_of, range(groups), threads)
        owners = np.concatenate([np.full(len(part), g) for g, part in enumerate(found)])
        self.parents = np.concatenate(found)
        # A window looks among the parents of its own group and of the nearest neighbouring groups.
        (near,) = in_threads(lambda _: _flat(self.top).search(self.top, min(groups, 4))[1], [0], 1)
        self.candidates = [np.flatnonzero(np.isin(owners, near[g])) for g in range(groups)]
        self.searchers = [_flat(self.parents[candidates]) for candidates in self.candidates]
        of_parent = split(np.concatenate(in_threads(
            lambda at: self.parent(sample[at : at + 65536]), range(0, len(sample), 65536), threads
        )), len(self.parents))  # fmt: skip

        def children_of(p: int) -> np.ndarray:
            inside = sample[of_parent[p]]
            return _kmeans(inside, SIBLINGS, seed) if len(inside) else self.parents[p : p + 1]

        self.children = in_threads(children_of, range(len(self.parents)), threads)
        padded = np.zeros((len(self.parents), SIBLINGS, sample.shape[1]), np.float32)
        for own, children in zip(padded, self.children, strict=True):
            own[: len(children)] = children
        self.centroids = padded.reshape(-1, sample.shape[1])

    def parent(self, block: np.ndarray) -> np.ndarray:
        """[n] the parent of each window; called in a task of `in_threads`."""
        parent = np.empty(len(block), np.int32)
        for g, rows in enumerate(split(_nearest(self.top, block), len(self.top))):
            if len(rows):
                parent[rows] = self.candidates[g][self.searchers[g].search(block[rows], 1)[1][:, 0]]
        return parent

    def cells(self, block: np.ndarray) -> np.ndarray:
        """[n] the cell of each window; called in a task of `in_threads`."""
        cell = np.empty(len(block), np.int32)
        for p, rows in enumerate(split(self.parent(block), len(self.parents))):
            if len(rows):
                cell[rows] = p * SIBLINGS + _nearest(self.children[p], block[rows])
        return cell


def split(number: np.ndarray, count: int) -> list[np.ndarray]:
    """Where each of 0 .. count - 1 stands in `number`."""
    order = np.argsort(number, kind="stable")
    return np.split(order, np.searchsorted(number[order], np.arange(1, count)))


def in_threads(work: Callable[[int], Any], items: Iterable[int], threads: int) -> list[Any]:
    """`work` of each item, side by side, with FAISS, torch and BLAS on one thread each."""
    return list(each_in_threads(work, items, threads))


def each_in_threads(work: Callable[[int], Any], items: Iterable[int], threads: int) -> Iterator[Any]:
    """The same, one by one in order: what was taken is not kept."""

    def single(item: int) -> Any:
        faiss().omp_set_num_threads(1)
        return work(item)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(single, items)


def _kmeans(points: np.ndarray, cells: int, seed: int) -> np.ndarray:
    if cells >= len(points):
        return points.copy()
    if cells == 1:
        return points.mean(0, keepdims=True)
    means = faiss().Kmeans(
        points.shape[1], cells, niter=ITERATIONS, seed=seed + 1, min_points_per_centroid=1,
        max_points_per_centroid=10**9,
    )  # fmt: skip
    means.train(np.ascontiguousarray(points))
    return means.centroids


def _flat(points: np.ndarray) -> Any:
    index = faiss().IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(points))
    return index


def _nearest(centroids: np.ndarray, points: np.ndarray) -> np.ndarray:
    return _flat(centroids).search(np.ascontiguousarray(points), 1)[1][:, 0]
