"""The five nearest windows (arXiv 2606.04299) beside exact sums and `pruned`, one image as bank: error and CPU time.

The bank is a part of 256 x 256 of a photograph; denoised is a band of another part of it, at pixels whose window lies
inside. `sliding` sums over all windows and is compared with float64 sums at some of the pixels; the others are compared
with `sliding`. FAISS finds the five nearest windows of each pixel, in more and more of its 250 cells (440 of
Fashion-MNIST); `pruned` has an index and several budgets. Without an index `pruned` draws whole images, so it is
measured on Fashion-MNIST alone. Nobody's index is in their time. The photographs come with scikit-image (gravel and
coffee, both CC0). Writes results/nearest_cut.json.

    OMP_NUM_THREADS=1 python benchmarks/nearest_cut.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import rows as windows_of
from peers.nearest_cut import NEAREST, NearestCut
from pruned_cpu import interior, rms
from record import RESULTS, write
from torch.nn import functional

import patchscore as ps
from patchscore.engines.pruned.engine import Pruned
from patchscore.engines.sliding.cpu import SlidingCpu
from patchscore.pixels import to_values

MEMORY = 2**30
PATCH = 7
LEVELS = (0.1, 0.3, 1.0, 3.0)
BUDGETS = (0.001, 0.01)
NPROBES = (1, 4, 16, 64)
PHOTOGRAPHS = ("gravel", "coffee")
SETTINGS = (*PHOTOGRAPHS, "fashion-mnist")
SIDE = 256  # pixels, of a photograph's part
BAND = range(120, 136)  # rows of it that are denoised: a sixteenth, for the benchmark's own time
IMAGES = 400  # of Fashion-MNIST
HELD_OUT = 4
SPARSE = 16  # one pixel in so many is summed in float64
DRAWN = 0.25  # of the images of Fashion-MNIST, where `pruned` has no index
BRIEF = 1.0  # CPU seconds; what takes less is run thrice, and the median counts


def timed(run: Callable) -> tuple:
    """The result, and the median CPU seconds of all threads."""
    spent: list[float] = []
    while not spent or (len(spent) < 3 and spent[0] < BRIEF):
        start = time.process_time()
        result = run()
        spent.append(time.process_time() - start)
    return result, statistics.median(spent)


def photograph(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [1, C, 256, 256] twice: the upper left part and the lower right, which overlap little if at all."""
    from skimage import data

    image = torch.from_numpy(getattr(data, name)())
    image = (image[None] if image.ndim == 2 else image.permute(2, 0, 1))[None]
    return image[:, :, :SIDE, :SIDE].clone(), image[:, :, -SIDE:, -SIDE:].clone()


def clothes() -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [IMAGES, 1, 28, 28] and [HELD_OUT, 1, 28, 28] of Fashion-MNIST."""
    images = ps.PatchBank.open("fashion-mnist", limit=IMAGES + HELD_OUT).images
    return images[:IMAGES].clone(), images[IMAGES:].clone()


def in_double(queries: torch.Tensor, level: float, train: torch.Tensor) -> torch.Tensor:
    """[Q, C] posterior means of the queries [Q, d] over all windows: the definition, in float64."""
    windows, centres = (x.double() for x in windows_of.window_rows(train, PATCH))
    bias = windows.square().sum(1) / 2
    parts = [torch.softmax((q.double() @ windows.T - bias) / level**2, 1) @ centres for q in queries.split(64)]
    return torch.cat(parts)


def level_of(z, level, bank, competition, index, cut) -> Iterator[dict]:
    """Rows of one noise level."""
    (group,), r = competition.groups, PATCH // 2
    rows = group.rows.queries
    sigma = torch.full((len(z),), level, dtype=torch.float64)

    def ours(engine) -> ps.PosteriorSum:
        return engine.posterior_sum(z, sigma, bank, competition, MEMORY)

    def denoised(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, rows.start : rows.stop, r:-r]

    sums, seconds = timed(lambda: ours(SlidingCpu()))
    truth = denoised(sums.mean)
    band = z[:, :, rows.start - r : rows.stop + r]
    queries = functional.unfold(band, PATCH).transpose(1, 2).flatten(0, 1)[::SPARSE]
    definition = in_double(queries, level, to_values(bank.images))
    error = rms(truth.permute(0, 2, 3, 1).flatten(0, 2)[::SPARSE] - definition)
    yield {"method": "sliding", "at": 1, "seconds": seconds, "rms": error}
    engines = [("pruned", budget, Pruned(index, budget, None, seed=0)) for budget in BUDGETS]
    if len(bank) > 1:
        engines.append(("pruned, no index", DRAWN, Pruned(None, DRAWN, None, seed=0)))
    for name, budget, engine in engines:
        sums, seconds = timed(lambda engine=engine: ours(engine))
        error, stated = rms(denoised(sums.mean) - truth), rms(denoised(sums.stderr))
        yield {"method": name, "at": budget, "seconds": seconds, "rms": error, "stderr_rms": stated}
    for nprobe in NPROBES:
        mean, seconds = timed(lambda nprobe=nprobe: cut.interior_mean(band, level, nprobe))
        yield {"method": "nearest", "at": nprobe, "seconds": seconds, "rms": rms(mean - truth)}


def measured(setting: str, images: torch.Tensor, held_out: torch.Tensor, folder: str) -> list[dict]:
    """Rows of one bank."""
    bank, clean = ps.PatchBank(images), to_values(held_out)
    everywhere = interior(ps.EquivariantLocalScore(bank, PATCH, padding_mode="zeros").competition(PATCH))
    height, width = clean.shape[2:]
    some = BAND if height == SIDE else range(height)
    competition = everywhere.at(some, range(width))
    index = ps.PatchIndex.build(bank, [PATCH], Path(folder) / setting)
    cut = NearestCut(to_values(images), PATCH)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for level in LEVELS:
        z = clean + level * torch.randn(clean.shape, generator=generator)
        for row in level_of(z, level, bank, competition, index, cut):
            rows.append({"setting": setting, "sigma": level, **row})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="banks to measure; what there is of others stays")
    wanted = parser.parse_args().only or SETTINGS
    target = RESULTS / "nearest_cut.json"
    kept = json.loads(target.read_text())["rows"] if target.exists() else []
    what = " ".join((__doc__ or "").split("\n")[0].split())
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(name, *(photograph(name) if name in PHOTOGRAPHS else clothes()), folder)
        kept = [row for row in kept if row["setting"] != name] + rows
        kept.sort(key=lambda row: SETTINGS.index(row["setting"]))
        write("nearest_cut", what, k=PATCH, nearest=NEAREST, side=SIDE, band=len(BAND), images=IMAGES, rows=kept)


if __name__ == "__main__":
    main()
