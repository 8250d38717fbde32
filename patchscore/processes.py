"""Forked children: GNU OpenMP, which torch and FAISS compute with, hangs in a child of a process that has used it.

The threads of its pool are not there after a fork, and it waits for them. With one thread it asks for none, so that is
what a child gets. The threads of our own C++ live for one call and know nothing of forks.
"""

from __future__ import annotations

import os
import sys

import torch


def one_thread() -> None:
    """Makes torch, and with it our engines, and FAISS if it was imported compute on one thread from now on."""
    torch.set_num_threads(1)
    if "faiss" in sys.modules and hasattr(sys.modules["faiss"], "omp_set_num_threads"):
        sys.modules["faiss"].omp_set_num_threads(1)


def after_forks() -> None:
    """Has `one_thread` called in every child that Python forks from this process, as DataLoader and multiprocessing do.

    Called once, when patchscore is imported. A child that wants more threads, because nothing was computed before the
    fork, calls torch.set_num_threads itself.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(after_in_child=one_thread)
