"""The CUDA half of engine `sliding`: prepares operands, cuts the bank into slabs, starts kernels, adds up their sums.

The kernels (csrc/sliding/sliding.cu) multiply signed bytes, so everything here is counted in steps of a byte pixel:
p = 127.5 v - 0.5 is a whole number for a uint8 image, and the noisy image becomes a number of three digits,
q = h (d0 + d1 / b + d2 / b^2) with h just large enough for the item. All memory is torch's; the library only computes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bank import PatchBank
from ...posterior import PosteriorSum
from ...windows import Axis, Competition, Group
from .. import cost
from .. import device as resident
from ..base import Combine, Engine, EngineError
from ..whole import whole_product
from .cpu import check_float32

STEPS = 127.5
"""Steps of a byte pixel in a unit of v."""
STRIP = 32  # query rows of a block
WARPS = 8  # of a block, as in the kernels
TILE, TILES = 8, 4  # window columns of a tile, tiles of a group; as in the kernel
LARGEST_CHUNK = 16  # groups a block adds up in float32 before float64 takes over
CHUNKS = 512  # a bank is cut into about so many, if it has as many groups
ALIGNED = LARGEST_CHUNK * TILES  # slabs of whole chunks, so that sums do not depend on where slabs end
STEP, AVERAGED, ADDED, GROUP = 64, 8, 256, 16  # whole images: as in the kernels; items that products take together
LARGEST_SLICE = 2**16  # values of a product, whose sum is then an int
SMALLEST_BASE = 8  # of noisy digits: below, too little is left of the noisy image
DIGIT_BASE = 254  # of noisy pixels, where sums are combined in float64
BLOCKS = 1024  # a product is cut into about so many, if it has as many values
ITEMS = 64  # of whole images, in one pass
SMALLEST_WEIGHT_BITS = 66  # below the largest of a slab: a lighter image is left out
SLAB_BYTES = 2**29  # larger slabs were not found to be of use
FORWARD, BACKWARD, AVERAGING = 0, 1, 2  # what a second pass sums, as in the kernel
SECOND_PASS_WARPS = 132 * 64  # of a second pass: four times as many as 132 multiprocessors hold, if there is work


class _Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("q0", "q1", "w0", "w1", "locked")]


class _Windows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("channel_quads", "planes", "values_per_pixel", "height", "width")),
        *((name, ctypes.c_int) for name in ("patch_size", "circular")),
        ("rows", _Axis),
        ("cols", _Axis),
        *((name, ctypes.c_int) for name in ("images", "items", "strip", "groups_per_chunk", "multiplier", "base")),
        ("moments", ctypes.c_int),
        ("outside", ctypes.c_int * 4),
        *((name, ctypes.c_void_p) for name in ("quads", "values", "norms", "fractions", "digits", "scale")),
        *((name, ctypes.c_void_p) for name in ("centres", "references", "sums")),
    ]


class _Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("channels", "height", "width", "images", "bytes", "base")),
        *((name, ctypes.c_int) for name in ("first_value", "values_per_pixel")),
        *((name, ctypes.c_void_p) for name in ("raw", "indices", "quads", "values", "squares")),
    ]


class _Norms(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("height", "width", "images", "patch_size")),
        ("unit", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("squares", "columns", "norms", "fractions")),
    ]


class _Products(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "values", "groups", "slice", "digits_of_floats")),
        *((name, ctypes.c_void_p) for name in ("bytes", "indices", "digits", "products", "norms")),
    ]


class _Average(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "values", "groups", "bytes")),
        *((name, ctypes.c_void_p) for name in ("raw", "indices", "weights", "sums")),
    ]


class _Jacobian(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("kind", "channels", "height", "width", "patch_size", "circular")),
        ("rows", _Axis),
        ("cols", _Axis),
        *((name, ctypes.c_int) for name in ("images", "items", "images_per_worker", "parts", "workers")),
        *((name, ctypes.c_void_p) for name in ("noisy", "training", "direction", "evidence", "mean", "scale", "sums")),
    ]


STRUCTURES = (_Windows, _Pack, _Norms, _Products, _Average, _Jacobian)


def load(path: str) -> ctypes.CDLL:
    """The kernels' library at `path`; OSError if it cannot be loaded or was built from other sources."""
    library = ctypes.CDLL(path)
    library.patchscore_layout.restype = ctypes.c_int64
    if library.patchscore_layout() != sum(ctypes.sizeof(structure) * 1000**i for i, structure in enumerate(STRUCTURES)):
        raise OSError(f"{path} was built from other sources; build it again")
    for name in ("windows", "pack", "norms", "products", "average", "jacobian"):
        name = f"patchscore_{name}"
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.patchscore_unavailable.restype = ctypes.c_char_p
    library.patchscore_shared_bytes.argtypes = [ctypes.c_void_p]
    library.patchscore_shared_limit.argtypes = [ctypes.c_int]
    return library


def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    spec = importlib.util.find_spec("patchscore._sliding_cuda")
    if spec is None or spec.origin is None:
        return None, "the CUDA extension was not built (no nvcc, or PATCHSCORE_CUDA=0)"
    try:
        return load(spec.origin), ""
    except (OSError, AttributeError) as error:
        return None, str(error)


library, _missing = _found()


class SlidingCuda(Engine):
    """`sliding` on CUDA devices; patches beyond its shared memory or integers are left to the next engine."""

    name = "sliding"
    moments = True
    gradients = True

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable()

    def lacks(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> str | None:
        if resident.recording():
            return "it reads the range of the pixels, which a CUDA graph cannot hold"
        if serves(bank, competition, z.device):
            return None
        return "its shared memory or its integers are too small for these patches"

    def seconds(self, z: Tensor, sigma: Tensor, bank: PatchBank, competition: Competition) -> float | None:
        device = cost.known(z.device)
        if device is None:
            return None
        floats = bank.images.dtype != torch.uint8
        return cost.sliding_seconds(device, competition, len(bank), len(z), bank.shape, floats)

    def posterior_sum(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        ess: bool = True,
        moments: bool = False,
    ) -> PosteriorSum:
        return posterior_sums(z, sigma, bank, [competition], memory_limit, moments)[0]

    def first_pass(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None,
    ) -> PosteriorSum:
        check_float32(z)
        if competition.patch_size is not None:
            _workers(*bank.shape[1:], z.device)  # whether the second pass has room, before the first
        return super().first_pass(z, sigma, bank, competition, memory_limit, combine)

    def posterior_sums(
        self, z: Tensor, sigma: Tensor, bank: PatchBank, competitions: Sequence[Competition], memory_limit: int
    ) -> list[PosteriorSum]:
        return posterior_sums(z, sigma, bank, competitions, memory_limit)

    def product(
        self,
        transposed: bool,
        z: Tensor,
        sigma: Tensor,
        direction: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> Tensor:
        """A second pass over the pairs, after one for weights and means.

        Raises:
            ValueError: z in float64; `memory_limit` cannot hold one image.
            EngineError: images too large for the kernel.
        """
        total = self.first_pass(z, sigma, bank, competition, memory_limit, combine)
        if competition.patch_size is None:
            return whole_product(z, sigma, direction, bank, total, memory_limit)
        kind = BACKWARD if transposed else FORWARD
        sums = _second_pass(kind, z, sigma, direction, bank, competition, total, memory_limit)
        return (sums / sigma.to(z.device, torch.float64).square().reshape(-1, 1, 1, 1)).to(direction.dtype)

    def window_sums(
        self,
        z: Tensor,
        sigma: Tensor,
        bank: PatchBank,
        competition: Competition,
        memory_limit: int,
        combine: Combine | None = None,
    ) -> tuple[PosteriorSum, Tensor]:
        total = self.first_pass(z, sigma, bank, competition, memory_limit, combine)
        return total, _second_pass(AVERAGING, z, sigma, torch.zeros_like(z), bank, competition, total, memory_limit)


def unavailable() -> str | None:
    """Why no CUDA device can be served, or None."""
    if library is None:
        return _missing
    reason = library.patchscore_unavailable()
    return f"CUDA: {reason.decode()}" if reason else None


def serves(bank: PatchBank, competition: Competition, device: torch.device) -> bool:
    """Whether the kernels have room for its patches: for their sums in integers, and for a block in shared memory."""
    if competition.patch_size is None:
        return True
    if _base(_values(bank, competition), _planes(bank)) < SMALLEST_BASE:
        return False
    return all(_smallest_block(bank, competition, group) <= _shared_limit(device) for group in competition.groups)


def posterior_sums(
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competitions: Sequence[Competition],
    memory_limit: int,
    moments: bool = False,
) -> list[PosteriorSum]:
    """The sums of every competition, of windows in one pass over the bank; arguments as of `Engine.posterior_sums`.

    Every competition must be one that `serves`. Work is queued on the current stream of z's device.
    """
    windows = [competition for competition in competitions if competition.patch_size is not None]
    firsts = range(0, z.shape[1], 4) if windows else ()
    with torch.cuda.device(z.device) if z.device.type == "cuda" else nullcontext():
        parts = [_some_channels(z, sigma, bank, windows, memory_limit, first, moments) for first in firsts]
        sums = map(_all_channels, zip(*parts, strict=True))
        return [
            _whole_images(z, sigma, bank, memory_limit, moments) if competition.patch_size is None else next(sums)
            for competition in competitions
        ]


def _all_channels(parts: tuple[PosteriorSum, ...]) -> PosteriorSum:
    """Of the sums of four channels each, whose weights are the same."""
    v2 = [part.v2 for part in parts if part.v2 is not None]
    return replace(parts[0], v=torch.cat([part.v for part in parts], 1), v2=torch.cat(v2, 1) if v2 else None)


@dataclass
class _Noisy:
    """Items of a batch whose digits weigh the same."""

    channels: int
    items: Tensor  # [n] positions in the batch
    top: int  # h, what a digit of the first plane is worth
    digits: Tensor  # [n, channel_quads, H, W, 4] int32: quads of the three planes, and nothing
    squares: Tensor  # [n, 1, H, W] float64: sum over channels of q^2
    sigma: Tensor  # [n] float64, in steps
    outside: tuple[int, ...]  # the digits of v = 0
    centres: Tensor | None  # [n, H, W, 1 or 4]: the pixels themselves, cut to [-1, 1]; with moments


@dataclass
class _Slab:
    """Training images as the kernel reads them."""

    images: int
    quads: Tensor
    values: Tensor
    squares: Tensor  # [images, H, W] float64


def _some_channels(
    z: Tensor,
    sigma: Tensor,
    bank: PatchBank,
    competitions: Sequence[Competition],
    memory_limit: int,
    first: int,
    moments: bool,
) -> list[PosteriorSum]:
    """The sums with the mean of channels first .. first + 3 only."""
    count = min(4, z.shape[1] - first)
    shape = (len(z), count, *z.shape[2:])
    base = min(_base(_values(bank, competition), _planes(bank)) for competition in competitions)
    batches = _noisy(z, sigma, base, range(first, first + count) if moments else None)
    totals = [
        [PosteriorSum.empty((len(b.items), *shape[1:]), z.device, moments=moments) for b in batches]
        for _ in competitions
    ]
    channels, height, width = bank.shape
    per_pixel = 4 * _planes(bank) * -(-channels // 4) + 16 + 8 + 8 + 4 + 4
    per_slab = _images_per_slab(bank, height * width * per_pixel, ALIGNED, memory_limit)
    per_slab = min(per_slab, (2**31 - 1) // (height * width) - 1)
    for raw, indices, images in _slabs(bank, z.device, per_slab):
        slab = _packed(raw, indices, images, base, first, count)
        for competition, parts in zip(competitions, totals, strict=True):
            for batch, total in zip(batches, parts, strict=True):
                unit = _unit(_values(bank, competition), batch.top)
                norms = _norms(slab, competition.patch_size or 0, unit)
                for group in competition.groups:
                    _add(total, batch, slab, norms, competition, group, base, unit, len(bank), memory_limit)

    gathered = [PosteriorSum.empty(shape, z.device, moments=moments) for _ in competitions]
    for whole, parts in zip(gathered, totals, strict=True):
        for batch, part in zip(batches, parts, strict=True):
            for name, x in part.fields.items():
                whole.fields[name][batch.items] = x
    return gathered


# Numbers: how many digits fit where.


def _planes(bank: PatchBank) -> int:
    """Digits of a training pixel: bytes have one, floats three."""
    return 1 if bank.images.dtype == torch.uint8 else 3


def _values(bank: PatchBank, competition: Competition) -> int:
    """How many values of an image one window can hold."""
    channels, height, width = bank.shape
    k = competition.patch_size or 0
    return channels * min(k, height) * min(k, width)


def _base(values: int, planes: int) -> int:
    """The largest b for which sums of lower digits, at most 65 b^2 (150 b^2 for floats) each, fit in 2^30."""
    return min(254, math.isqrt(2**30 // ((65 if planes == 1 else 150) * values)))


def _unit(values: int, top: int) -> int:
    """What distances are counted in, so that |p|^2 and 2 q.p together stay below 2^30: 1 unless noise is very high."""
    return 2 ** max(0, math.ceil(math.log2(values * (16538 + 32512 * top)) - 30))


def _noisy(z: Tensor, sigma: Tensor, base: int, centred: range | None = None) -> list[_Noisy]:
    """The batch in digits, items grouped by what their first digit is worth; with moments of channels `centred`."""
    q = z.detach().to(torch.float32).to(torch.float64) * STEPS - 0.5
    tops = [2 ** max(0, math.ceil(math.log2(largest / 126.5))) for largest in _largest(q)]
    batches = []
    for top in sorted(set(tops)):
        items = torch.tensor([i for i, other in enumerate(tops) if other == top], device=z.device)
        planes, rounded = _digits(q[items], top, base)
        quads = [_quads(plane) for plane in planes]
        outside, _ = _digits(torch.tensor(-0.5, dtype=torch.float64), top, base)
        batches.append(
            _Noisy(
                channels=z.shape[1],
                items=items,
                top=top,
                digits=torch.stack([*quads, torch.zeros_like(quads[0])], -1).contiguous(),
                squares=rounded.square().sum(1, keepdim=True),
                sigma=sigma.to(z.device, torch.float64)[items] * STEPS,
                outside=tuple((int(d) & 255) * 0x01010101 for d in outside),
                centres=None if centred is None else _centres(z[items][:, centred.start : centred.stop]),
            )
        )
    return batches


def _centres(z: Tensor) -> Tensor:
    """[n, H, W, 1 or 4] float32: pixels near which the values of all windows that weigh are, where noise is low."""
    pixels = z.detach().to(torch.float32).clamp(-1, 1).movedim(1, -1)
    return (pixels if z.shape[1] == 1 else F.pad(pixels, (0, 4 - z.shape[1]))).contiguous()


def _largest(q: Tensor) -> list[float]:
    return q.abs().flatten(1).amax(1).clamp(min=0.5).tolist()


def _digits(q: Tensor, top: int | Tensor, base: int) -> tuple[list[Tensor], Tensor]:
    """q as three digits (the first in -127 .. 127, the others in -b/2 .. b/2), and q as they give it back."""
    rest, value, weight, digits = q / top, torch.zeros_like(q), 1.0 * top, []
    for _ in range(3):
        digit = rest.round()
        digits.append(digit)
        value = value + digit * weight
        rest, weight = (rest - digit) * base, weight / base
    return digits, value


def _quads(digits: Tensor) -> Tensor:
    """[n, C, H, W] signed bytes as [n, ceil(C / 4), H, W] int32 of four channels each."""
    n, channels, height, width = digits.shape
    padded = F.pad(digits.to(torch.int8), (0, 0, 0, 0, 0, -channels % 4))
    return padded.reshape(n, -1, 4, height, width).permute(0, 1, 3, 4, 2).contiguous().view(torch.int32).squeeze(-1)


# The bank: slabs of it on the device, resident or streamed.


def _images_per_slab(bank: PatchBank, per_image: int, aligned: int, memory_limit: int) -> int:
    """Images whose operands, `per_image` bytes each, fit in a share of the working memory; if many, of whole chunks."""
    per_image += 2 * bank.images[0].nbytes  # of streamed slabs
    images = min(SLAB_BYTES, memory_limit // 2) // per_image
    if images < 1:
        raise ValueError(f"memory_limit: got {memory_limit} bytes, one image takes {2 * per_image}")
    return images // aligned * aligned if images >= aligned else images


def _slabs(bank: PatchBank, device: torch.device, per_slab: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """(images on the device, positions of the slab's in them or None, how many), slab after slab."""
    images = resident.on_device(bank.images, device)
    if images is None:
        yield from _streamed(bank, device, per_slab)
        return
    indices = None if bank.indices is None else bank.indices.to(device, torch.int64)
    if images.is_cuda:  # the copy outlives this call, but perhaps not what is queued on this stream
        images.record_stream(torch.cuda.current_stream(device))
    for start in range(0, len(bank), per_slab):
        count = min(per_slab, len(bank) - start)
        if indices is None:
            yield images[start : start + count], None, count
        else:
            yield images, indices[start : start + count].contiguous(), count


def _streamed(bank: PatchBank, device: torch.device, per_slab: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Slabs through two pinned buffers: while one is computed on, the next is on its way."""
    starts = range(0, len(bank), per_slab)
    shape = (min(per_slab, len(bank)), *bank.shape)
    pinned = [torch.empty(shape, dtype=bank.images.dtype, pin_memory=True) for _ in range(2)]
    arrived = [torch.empty(shape, dtype=bank.images.dtype, device=device) for _ in range(2)]
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    copied = [torch.cuda.Event() for _ in range(2)]
    copying.wait_stream(computing)  # which may still use what torch gave for `arrived`

    def send(number: int) -> None:
        half = number % 2
        chosen = slice(starts[number], starts[number] + per_slab)
        copied[half].synchronize()  # its pinned memory is free again
        if bank.indices is None:
            pinned[half][: len(bank.images[chosen])].copy_(bank.images[chosen])
        else:
            torch.index_select(bank.images, 0, bank.indices[chosen], out=pinned[half][: len(bank.indices[chosen])])
        with torch.cuda.stream(copying):
            arrived[half].copy_(pinned[half], non_blocking=True)
            copied[half].record(copying)

    try:
        send(0)
        for number, start in enumerate(starts):
            half = number % 2
            if number + 1 < len(starts):
                # The other half was computed on last; what is queued for it comes first.
                copying.wait_stream(computing)
                send(number + 1)
            computing.wait_event(copied[half])
            yield arrived[half], None, min(per_slab, len(bank) - start)
    finally:
        # Also where the caller fails: a copy may still be on its way into memory that torch would give to others.
        for tensor in arrived:
            tensor.record_stream(copying)


# Kernels.


def _run(name: str, task: ctypes.Structure, device: torch.device) -> None:
    """Starts a kernel on the device's current stream; RuntimeError, with its name, if that fails."""
    assert library is not None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    error = getattr(library, name)(ctypes.byref(task), _number(device), stream)
    if error:
        raise RuntimeError(error.decode())


def _number(device: torch.device) -> int:
    if device.type != "cuda":  # the emulation's
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _packed(raw: Tensor, indices: Tensor | None, images: int, base: int, first: int, count: int) -> _Slab:
    _, channels, height, width = raw.shape
    is_bytes = raw.dtype == torch.uint8
    planes, channel_quads = 1 if is_bytes else 3, -(-channels // 4)
    quads = torch.empty(images * planes * channel_quads * height * width, dtype=torch.int32, device=raw.device)
    # A tile more than there is, which idle lanes read.
    values = torch.zeros(images * height * width + TILE, 4 if count > 1 else 1, device=raw.device)
    squares = torch.empty(images, height, width, dtype=torch.float64, device=raw.device)
    task = _Pack(
        channels=channels, height=height, width=width, images=images, bytes=is_bytes, base=base,
        first_value=first, values_per_pixel=count, raw=raw.data_ptr(),
        indices=None if indices is None else indices.data_ptr(),
        quads=quads.data_ptr(), values=values.data_ptr(), squares=squares.data_ptr(),
    )  # fmt: skip
    _run("patchscore_pack", task, raw.device)
    return _Slab(images, quads, values, squares)


def _norms(slab: _Slab, k: int, unit: int) -> tuple[Tensor, Tensor]:
    """|p|^2 of the windows at every pixel, in units: whole numbers, and what they leave out."""
    _, height, width = slab.squares.shape
    columns = torch.empty_like(slab.squares)
    norms = torch.empty(slab.squares.shape, dtype=torch.int32, device=slab.squares.device)
    fractions = torch.empty(slab.squares.shape, device=slab.squares.device)
    task = _Norms(
        height=height, width=width, images=slab.images, patch_size=k, unit=unit, squares=slab.squares.data_ptr(),
        columns=columns.data_ptr(), norms=norms.data_ptr(), fractions=fractions.data_ptr(),
    )  # fmt: skip
    _run("patchscore_norms", task, slab.squares.device)
    return norms, fractions


def _add(
    total: PosteriorSum,
    batch: _Noisy,
    slab: _Slab,
    norms: tuple[Tensor, Tensor],
    competition: Competition,
    group: Group,
    base: int,
    unit: int,
    bank_size: int,
    memory_limit: int,
) -> None:
    """Adds what a slab gives to one group of pixels, as many items at a time as memory allows."""
    device = slab.squares.device
    rows, cols = group.rows, group.cols
    count, (height, width) = total.v.shape[1], total.v.shape[2:]
    task = _Windows(
        channel_quads=batch.digits.shape[1], planes=len(slab.quads) // slab.squares.numel() // batch.digits.shape[1],
        values_per_pixel=3 if count == 2 else count, height=height, width=width,
        patch_size=competition.patch_size, circular=competition.padding_mode == "circular",
        rows=_axis(rows), cols=_axis(cols), images=slab.images, multiplier=2 * batch.top // unit, base=base,
        outside=(*batch.outside, 0), quads=slab.quads.data_ptr(), values=slab.values.data_ptr(),
        norms=norms[0].data_ptr(), fractions=norms[1].data_ptr(), moments=batch.centres is not None,
    )  # fmt: skip

    # A block adds up one chunk; their size follows the bank's, so that sums do not depend on slabs or the batch.
    columns = min(16, len(cols.queries)) if cols.locked else len(cols.centres)
    tiles = -(-columns // TILE)
    groups = -(-bank_size * tiles // TILES)
    task.groups_per_chunk = min(LARGEST_CHUNK, 2 ** int(math.log2(max(1, groups // CHUNKS))))
    groups_here = -(-slab.images * tiles // TILES)
    chunks = -(-groups_here // task.groups_per_chunk)

    # log2 weights: bits a unit of distance, and a unit of the lower digits.
    precision = 0.5 / batch.sigma.square()
    lower = 2 * batch.top / base**2
    scale = torch.stack([precision * unit, precision * lower], 1).mul_(math.log2(math.e)).to(torch.float32)
    q2 = _query_norms(batch.squares, batch.channels, competition, group)

    values = task.values_per_pixel
    parts = 2 + values + (1 + values if task.moments else 0)
    per_item = chunks * height * width * (8 + 4 * parts + 8 * (parts + 3))
    at_a_time = max(1, min(65535, min(SLAB_BYTES, memory_limit // 2) // per_item))
    for first in range(0, len(batch.items), at_a_time):
        items = slice(first, min(first + at_a_time, len(batch.items)))
        n = items.stop - items.start
        references = torch.empty(chunks, n, height, width, 2, dtype=torch.int32, device=device)
        sums = torch.empty(chunks, n, parts, height, width, device=device)
        task.items, task.digits = n, batch.digits[items].data_ptr()
        task.centres = None if batch.centres is None else batch.centres[items].data_ptr()
        task.scale = scale[items].data_ptr()
        task.references, task.sums = references.data_ptr(), sums.data_ptr()
        for piece in _pieces(task, rows, device):
            task.rows = _axis(piece)
            _run("patchscore_windows", task, device)
            # Chunks together, in float64.
            row, col = (slice(axis.queries.start, axis.queries.stop) for axis in (rows, cols))
            coarse, fine = references[:, :, None, row, col].to(torch.float64).unbind(-1)
            exact = sums[..., row, col].to(torch.float64)
            distance = coarse * unit - fine * lower + q2[items, :, row, col]
            m = torch.where(exact[:, :, :1] > 0, -distance * precision[items].reshape(-1, 1, 1, 1), -torch.inf)
            top = m.amax(0)
            fade = torch.where(torch.isneginf(m), 0.0, (m - top).exp_())
            s, s2, v, *more = exact.split([1, 1, values, *([1, values] if task.moments else [])], 2)
            part = PosteriorSum(top, (s * fade).sum(0), (v * fade).sum(0)[:, :count], (s2 * fade.square()).sum(0))
            if batch.centres is not None:
                sl, squares = more
                risen = torch.where(torch.isneginf(m), 0.0, m - top)
                centre = batch.centres[items, row, col, :count].movedim(-1, 1).to(torch.float64)
                # Of values less their centre c: sum w v = sum w (v - c) + c sum w, and squares likewise.
                whole = part.v + centre * part.s
                v2 = (squares * fade).sum(0)[:, :count] + centre * (part.v + whole)
                part = replace(part, v=whole, v2=v2, sl=((sl * math.log(2) + risen * s) * fade).sum(0))
            total.add_(part, items, row, col)


def _pieces(task: _Windows, rows: Axis, device: torch.device) -> list[Axis]:
    """Sets the strip of query rows, and cuts the window rows, so that a block's shared memory holds them."""
    assert library is not None
    limit = _shared_limit(device)
    task.strip, windows = min(STRIP, len(rows.queries)), rows.windows
    while library.patchscore_shared_bytes(ctypes.byref(task)) > limit:
        if windows is not None and len(windows) > 2 * task.strip:
            windows = windows[: -(-len(windows) // 2)]
        elif task.strip > 1:
            task.strip = -(-task.strip // 2)
        elif windows is not None and len(windows) > 1:
            windows = windows[: -(-len(windows) // 2)]
        else:
            raise AssertionError("serves() says when nothing fits")
        task.rows = _axis(Axis(rows.queries, windows))
    if rows.windows is None or windows is None:
        return [rows]
    starts = range(0, len(rows.windows), len(windows))
    return [Axis(rows.queries, rows.windows[start : start + len(windows)]) for start in starts]


def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    assert library is not None
    limit = library.patchscore_shared_limit(_number(device))
    if limit < 1:
        raise RuntimeError(f"CUDA does not say how much shared memory a block may have on {device}")
    return limit


def _smallest_block(bank: PatchBank, competition: Competition, group: Group) -> int:
    """Bytes of shared memory for one query row and one row of windows, with moments."""
    assert library is not None
    channels, height, width = bank.shape
    row, centre = group.rows.queries.start, group.rows.centres.start
    rows = Axis(range(row, row + 1), None if group.rows.locked else range(centre, centre + 1))
    task = _Windows(
        channel_quads=-(-channels // 4), planes=_planes(bank), values_per_pixel=min(4, channels), height=height,
        width=width, patch_size=competition.patch_size, circular=competition.padding_mode == "circular",
        rows=_axis(rows), cols=_axis(group.cols), strip=1, moments=True,
    )  # fmt: skip
    return library.patchscore_shared_bytes(ctypes.byref(task))


def _axis(axis: Axis) -> _Axis:
    return _Axis(axis.queries.start, axis.queries.stop, axis.centres.start, axis.centres.stop, axis.locked)


def _query_norms(squares: Tensor, channels: int, competition: Competition, group: Group) -> Tensor:
    """|q|^2 of the window at every pixel, [n, 1, H, W] float64: outside, z is v = 0 where windows lie inside, and where
    an axis is locked both are outside together and differ by nothing."""
    k = competition.patch_size or 0
    r = k // 2
    paddings = [(group.rows.locked, (0, 0, r, r)), (group.cols.locked, (r, r, 0, 0))]
    for locked, padding in sorted(paddings):
        if competition.padding_mode == "circular":
            squares = F.pad(squares, padding, mode="circular")
        else:
            squares = F.pad(squares, padding, value=0.0 if locked else 0.25 * channels)
    return squares.unfold(2, k, 1).sum(-1).unfold(3, k, 1).sum(-1)


# Products with the Jacobian: a second pass, over float32 images.


def _second_pass(
    kind: int,
    z: Tensor,
    sigma: Tensor,
    direction: Tensor,
    bank: PatchBank,
    competition: Competition,
    total: PosteriorSum,
    memory_limit: int,
) -> Tensor:
    """[B, C, H, W] float64: the sums of the kernel's kind, over all windows of the bank."""
    device, (channels, height, width) = z.device, z.shape[1:]
    sigma2 = sigma.to(device, torch.float64).square().reshape(-1, 1, 1, 1)
    # Pixels that the competition leaves out have no weights.
    evidence = torch.where(total.s > 0, -2 * sigma2 * (total.m + total.s.log()), 0.0)
    mean = torch.where(total.s > 0, total.mean, 0.0)
    noisy, along, levels, means = (
        x.detach().to(device, torch.float32).contiguous() for x in (z, direction, evidence, mean)
    )
    scale = (math.log2(math.e) / (2 * sigma2)).flatten().to(torch.float32)
    task = _Jacobian(
        kind=kind, channels=channels, height=height, width=width, patch_size=competition.patch_size,
        circular=competition.padding_mode == "circular", workers=_workers(height, width, device),
    )  # fmt: skip
    result = torch.zeros(z.shape, dtype=torch.float64, device=device)
    image_bytes = 4 * z[0].numel()
    room = min(SLAB_BYTES, memory_limit // 2) // 2 // image_bytes  # for images; as much for sums of warps
    if room < task.workers:
        raise ValueError(f"memory_limit: got {memory_limit} bytes, one image takes {4 * task.workers * image_bytes}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for start in range(0, len(bank), room):
            training = bank.chunk(start, min(start + room, len(bank)), torch.float32, device).contiguous()
            task.images, task.training = len(training), training.data_ptr()
            at_a_time = min(len(z), 65535, room // task.workers)
            for first in range(0, len(z), at_a_time):
                items = slice(first, min(first + at_a_time, len(z)))
                task.items = items.stop - items.start
                task.noisy, task.direction = noisy[items].data_ptr(), along[items].data_ptr()
                task.evidence, task.mean = levels[items].data_ptr(), means[items].data_ptr()
                task.scale = scale[items].data_ptr()
                for group in competition.groups:
                    task.rows, task.cols = _axis(group.rows), _axis(group.cols)
                    # As many warps as fill a device, if there is the work: of images, then of displacements.
                    wanted = max(task.workers, min(SECOND_PASS_WARPS, room // task.items))
                    task.images_per_worker = -(-len(training) // wanted)
                    chunks = -(-len(training) // task.images_per_worker)
                    task.parts = max(1, min(wanted // chunks, _displacements(group, competition, height, width)))
                    warps = -(-chunks * task.parts // task.workers) * task.workers
                    sums = torch.empty(warps, task.items, channels, height, width, device=device)
                    task.sums = sums.data_ptr()
                    _run("patchscore_jacobian", task, device)
                    result[items] += sums.sum(0, dtype=torch.float64)
    return result


def _workers(height: int, width: int, device: torch.device) -> int:
    """Warps of a block that have room in shared memory for what they work on.

    Raises:
        EngineError: not one.
    """
    workers = min(WARPS, _shared_limit(device) // (12 * height * (width | 1)))
    if workers < 1:
        raise EngineError(f"its shared memory is too small for gradients of images of {height} x {width}")
    return workers


def _displacements(group: Group, competition: Competition, height: int, width: int) -> int:
    """Of noisy and training images in which some windows of a group compete."""
    count = 1
    for axis, size in ((group.rows, height), (group.cols, width)):
        if not axis.locked:
            circular = competition.padding_mode == "circular"
            count *= size if circular else len(axis.queries) + len(axis.centres) - 1
    return count


# Whole images: distances from one product of bytes, then sums of the bank's images by weight.


def _whole_images(z: Tensor, sigma: Tensor, bank: PatchBank, memory_limit: int, moments: bool) -> PosteriorSum:
    values, device = z[0].numel(), z.device
    items = max(1, min(ITEMS, len(z), memory_limit // 4 // (64 * values)))
    padded_items = -(-items // GROUP) * GROUP
    # Products, what float64 makes of them, float32 sums of ADDED images; float images as digits, or images in float64.
    per_image = padded_items * (12 * _slices(values, 1, 1)[1] + 96) + 4 * values * padded_items // ADDED
    per_image += 48 * values if _planes(bank) > 1 or moments else 0
    per_slab = _images_per_slab(bank, per_image, ADDED, memory_limit)
    total = PosteriorSum.empty((len(z), values, 1, 1), device, moments=moments)
    for first in range(0, len(z), items):
        chosen = slice(first, min(first + items, len(z)))
        noisy = _FlatNoisy(z[chosen], sigma[chosen])
        for raw, indices, images in _slabs(bank, device, per_slab):
            distance = _whole_distances(noisy, raw, indices, images)
            total.add_(_weighed(noisy, distance, raw, indices, moments), chosen, slice(None), slice(None))
    v2 = None if total.v2 is None else total.v2.reshape(z.shape)
    return replace(total, v=total.v.reshape(z.shape), v2=v2)


class _FlatNoisy:
    """Noisy images in digits, value by value; each item has a first digit of its own worth."""

    def __init__(self, z: Tensor, sigma: Tensor):
        q = z.detach().flatten(1).to(torch.float32).to(torch.float64) * STEPS - 0.5
        self.items, values = q.shape
        self.top = torch.exp2((q.abs().amax(1).clamp(min=0.5) / 126.5).log2().ceil().clamp(min=0.0))  # [B]
        self.sigma = sigma.to(z.device, torch.float64) * STEPS
        planes, rounded = _digits(q, self.top[:, None], DIGIT_BASE)
        self.squares = rounded.square().sum(1)  # [B]
        digits = torch.stack(planes, 1).to(torch.int8)
        digits = F.pad(digits, (0, -values % STEP, 0, 0, 0, -self.items % GROUP))
        self.groups = len(digits) // GROUP
        self.digits = digits.reshape(self.groups, GROUP, 3, -1).transpose(1, 2).contiguous()


def _slices(values: int, images: int, groups: int) -> tuple[int, int]:
    """Values of a slice, and how many there are: enough blocks, and sums that fit an int."""
    blocks = -(-images // 256) * groups
    wanted = max(1, min(BLOCKS // blocks, values // 256), -(-values // LARGEST_SLICE))
    size = -(-values // wanted // STEP) * STEP if wanted > 1 else -(-values // STEP) * STEP
    return size, -(-values // size)


def _whole_distances(noisy: _FlatNoisy, raw: Tensor, indices: Tensor | None, images: int) -> Tensor:
    """[B, images] squared distances in steps, float64."""
    if raw.dtype == torch.uint8:
        planes, squares = [raw], None
    else:
        own = raw[:images] if indices is None else raw[indices]
        planes, rounded = _digits(own.flatten(1).to(torch.float64) * STEPS - 0.5, 1, DIGIT_BASE)
        planes, squares, indices = [plane.to(torch.int8) for plane in planes], rounded.square().sum(1), None
    product = torch.zeros(images, noisy.groups * GROUP, dtype=torch.float64, device=raw.device)
    for place, plane in enumerate(planes):
        digits, norms = _products(noisy, plane, indices, images)
        squares = norms if squares is None else squares
        for digit in range(3):
            product += digits[:, :, digit].flatten(1).to(torch.float64) * DIGIT_BASE ** -float(place + digit)
    assert squares is not None
    return squares + noisy.squares[:, None] - 2 * noisy.top[:, None] * product.T[: noisy.items]


def _products(noisy: _FlatNoisy, plane: Tensor, indices: Tensor | None, images: int) -> tuple[Tensor, Tensor]:
    """[images, groups, 3, 16] products of bytes and digits, and [images] sums of squared bytes: whole numbers."""
    values = plane[0].numel()
    size, slices = _slices(values, images, noisy.groups)
    products = torch.empty(slices, images, noisy.groups, 3, GROUP, dtype=torch.int32, device=plane.device)
    norms = torch.empty(slices, images, 4, dtype=torch.int32, device=plane.device)
    task = _Products(
        images=images, values=values, groups=noisy.groups, slice=size, digits_of_floats=plane.dtype == torch.int8,
        bytes=plane.data_ptr(), indices=None if indices is None else indices.data_ptr(),
        digits=noisy.digits.data_ptr(), products=products.data_ptr(), norms=norms.data_ptr(),
    )  # fmt: skip
    _run("patchscore_products", task, plane.device)
    return products.sum(0), norms.sum((0, 2))


def _weighed(noisy: _FlatNoisy, distance: Tensor, raw: Tensor, indices: Tensor | None, moments: bool) -> PosteriorSum:
    """The sums of a slab's images, by their distances from each item."""
    images, values = distance.shape[1], raw[0].numel()
    bits = distance * (-0.5 * math.log2(math.e) / noisy.sigma.square())[:, None]  # log2 weights
    # Relative to a multiple of 16 bits: what float32 rounds does not depend on where slabs end.
    m = (bits.amax(1, keepdim=True) / 16).ceil() * 16
    w = torch.exp2(bits - m)
    w = torch.where(w < 2.0**-SMALLEST_WEIGHT_BITS, 0.0, w)
    s, s2 = w.sum(1, keepdim=True), w.square().sum(1, keepdim=True)
    if moments:
        v, v2 = _first_two_moments(w, raw, indices)
        sl = (w * (bits - m)).sum(1, keepdim=True) * math.log(2)
        total = PosteriorSum(m * math.log(2), s, v, s2, v2=v2, sl=sl)
        return total.mapped(lambda x: x[:, :, None, None])
    groups, parts = -(-noisy.items // AVERAGED), -(-images // ADDED)
    weights = F.pad(w.T.to(torch.float32), (0, -noisy.items % AVERAGED)).contiguous()
    sums = torch.empty(parts, groups * AVERAGED, values, device=raw.device)
    task = _Average(
        images=images, values=values, groups=groups, bytes=raw.dtype == torch.uint8, raw=raw.data_ptr(),
        indices=None if indices is None else indices.data_ptr(), weights=weights.data_ptr(), sums=sums.data_ptr(),
    )  # fmt: skip
    _run("patchscore_average", task, raw.device)
    v = sums[:, : noisy.items].sum(0, dtype=torch.float64)
    return PosteriorSum(*(x[:, :, None, None] for x in (m * math.log(2), s, v, s2)))


def _first_two_moments(w: Tensor, raw: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, values] each: sums of w x and w x^2 over a slab's images, in float64, where their difference is exact."""
    v = torch.zeros(len(w), raw[0].numel(), dtype=torch.float64, device=raw.device)
    v2 = torch.zeros_like(v)
    for first in range(0, w.shape[1], ADDED):
        some = slice(first, min(first + ADDED, w.shape[1]))
        own = (raw[some] if indices is None else raw[indices[some]]).flatten(1)
        x = own.to(torch.float64) / STEPS - 1 if raw.dtype == torch.uint8 else own.to(torch.float64)
        v.addmm_(w[:, some], x)
        v2.addmm_(w[:, some], x.square_())
    return v, v2
