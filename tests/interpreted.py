"""Triton's interpreter, stricter than a GPU: import it before the first kernel is started.

Programs run in random order. A load or store outside the tensors that the kernel was given is an error, and so is a
second store to an address by another program. torch.empty is filled with NaN. Under pytest's `-W error` a NaN or an
overflow inside the kernel is an error too; an overflow from weights to half floats is how `fused` tells that its pilot
was too low, and may pass.
"""

import random

import numpy as np
import torch
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """Triton 3.6 asks NumPy for the one number of an array, which NumPy 2.4 gives of arrays without axes only."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_lang_tensor

_builder = interpreter.interpreter_builder
_kinds = type(_builder)
_learn, _set_dim, _set_index = interpreter.GridExecutor._init_args_hst, _kinds.set_grid_dim, _kinds.set_grid_idx
_load, _store = _kinds.create_masked_load, _kinds.create_masked_store


class _Launch:
    """What is known of the launch that runs."""

    ranges = np.zeros((0, 2), np.uint64)
    order: list[int] = []  # noqa: RUF012
    program = 0
    written: dict[int, int] = {}  # noqa: RUF012


generator = random.Random(0)


def _learn_ranges(self, args, kwargs):
    args, kwargs = _learn(self, args, kwargs)
    tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "data_ptr")]
    found = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
    _Launch.ranges = np.array(found, np.uint64).reshape(-1, 2)
    return args, kwargs


def _set_grid_dim(self, *grid):
    _set_dim(self, *grid)
    _Launch.order = list(range(int(np.prod(grid))))
    generator.shuffle(_Launch.order)
    _Launch.written = {}


def _set_grid_idx(self, x, y, z):
    _, rows, depth = self.grid_dim
    _Launch.program = _Launch.order[(x * rows + y) * depth + z]
    left, z = divmod(_Launch.program, depth)
    _set_index(self, *divmod(left, rows), z)


def _check(ptrs, mask, what):
    size = np.uint64(ptrs.get_element_ty().primitive_bitwidth // 8)
    addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.uint64)
    inside = np.zeros(addresses.shape, bool)
    for start, end in _Launch.ranges:
        inside |= (addresses >= start) & (addresses + size <= end)
    if not inside.all():
        raise IndexError(f"{what} outside of every tensor, {np.count_nonzero(~inside)} of {inside.size} addresses")
    return addresses


def _masked_load(self, ptrs, mask, *rest):
    _check(ptrs, mask, "load")
    return _load(self, ptrs, mask, *rest)


def _masked_store(self, ptrs, value, mask, *rest):
    for address in _check(ptrs, mask, "store").tolist():
        other = _Launch.written.setdefault(address, _Launch.program)
        if other != _Launch.program:
            raise RuntimeError(f"programs {other} and {_Launch.program} store to one address")
    return _store(self, ptrs, value, mask, *rest)


interpreter.GridExecutor._init_args_hst = _learn_ranges
_kinds.set_grid_dim, _kinds.set_grid_idx = _set_grid_dim, _set_grid_idx
_kinds.create_masked_load, _kinds.create_masked_store = _masked_load, _masked_store

# torch fills what it allocates with NaN, and integers with their largest number.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
