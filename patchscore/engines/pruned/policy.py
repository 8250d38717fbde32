"""Every constant of the engine `pruned`, with its unit, its source and its effect. C++ gets them from here.

The sampling fraction of a cell follows from them: `allocation` in naive.py, and `solve` in csrc/pruned/pruned.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What decides how windows and images are sampled."""

    certain_from: float = 0.75
    """Sampling fraction from which a stratum is evaluated whole: the last quarter costs little and removes its
    variance (Cochran 1977, 5.8: strata whose optimum allocation exceeds their size)."""

    prior_degrees: float = 10.0
    """Degrees of freedom that the expected variance counts for beside those of the observed one, where it is the larger
    (moderated variance, Smyth 2004, eq. 3.1). Weights are so unequal that a sample misses the few that decide more
    often than its own degrees of freedom tell; more widens the error bars of small samples. With 2, 91.4% of 8,112
    values lay within 2 standard errors (20,000 CIFAR-10 images, k = 7, sigma 0.84, 1%), with 10 93.1%, with 50 93.9%,
    where at 0.1% it is 97% and more already."""

    pooled: float = 0.1
    """Share of the mean variance of an image's pixels in that of each (naive.pooled). Their mean stays; pixels whose
    sample has not met what it lacks state more. Values beyond 6 standard errors fall to between a half and a tenth, and
    the share within 3 rises from 96.6..99.9 to 98.8..99.9% (10,000 Fashion-MNIST and 20,000 CIFAR-10 images, k = 3 to
    15, budgets of 0.1 to 1%). With 0.03 about half as much is gained, with 0.3 little more."""

    trimming: float = 0.5
    """Of n windows evaluated, one counts for at most n^-trimming of the sum, or as itself: beyond it a weight that was
    expanded by its sampling fraction is trimmed (truncated importance weights, Ionides 2008; the power is his). A heavy
    window drawn by chance would otherwise be expanded to hundreds like it, which do not exist. Trimming takes a sixth
    to a third off the rms error; the stated variance is that of the untrimmed estimate. 0 trims nothing."""

    misfit: float = 7.2
    """Bits (5 nats). Where the sample holds that much more weight than was expected of all windows, or where that much
    more was expected of the sampled strata than was found altogether, the query is unlike what the cells' moments
    describe. Held-out images differ by less than 3 nats, except that near cells, which are evaluated whole, often hold
    less than expected and windows known surely more: both are exact."""

    reach: float = 1.0
    """A query is sampled as long as the log-weights of windows of one cell scatter by (2 reach log N)^(1/2) at most
    (naive.least_log_weight); images of which more than half the pixels are farther from the bank get exact sums. Eight
    of 1,000 attacks on 1,500 images, little noise on checkerboards or noise, had been wrong by 0.2 to 0.6 with an error
    bar of zero: scatters of 10 to 49, where held-out images of CIFAR-10 and Fashion-MNIST have 1 to 5 (at k = 3 and
    sigma = 0.078 3 to 12), and (2 log N)^(1/2) is 5 to 6."""

    unknown: float = 0.1
    """Standard error, in units of pixels, from which a pixel is sampled again with a larger budget; what was found
    heavier than its known windows is then known."""

    further: float = 2.0
    """By how much that budget grows: a pixel then costs at most twice what the budget would that suffices. (With 8, one
    pixel in fifty took as much as all others: it shares what it reads with none.)"""

    further_most: float = 0.1
    """Budget up to which it grows, and from which an exact sum for the pixel takes less: windows that one pixel draws
    alone take it 60 ns (held by the index) to 300 ns (gathered) each, and a pixel that is not known by then is mostly
    unlike the bank, and never is (docs/notes/pruned.md)."""

    exact_pixels: int = 20
    """Pixels that an exact sum over a rectangle could have more in the same time, as sums slide from pixel to pixel
    (4,000 CIFAR-10 images: one pixel takes what 16, 20, 26, 39 of a whole image do at k = 3, 7, 11, 17). Decides which
    pixels share a rectangle, and when the whole image is one."""

    pilot: float = 0.25
    """Fraction of a budget in which heavy windows are searched, in the cells of the largest expected weight."""

    recalled_pilot: float = 0.06
    """The same where windows are remembered from the noise level before, along a trajectory (k = 7, sigma 0.99 to 0.84,
    20,000 CIFAR-10 images: rms at 0.1 / 0.3 / 1% 0.0149 / 0.0095 / 0.0067 without a memory, 0.0133 / 0.0087 / 0.0064
    with one, 0.0126 / 0.0080 / 0.0029 with this share)."""

    pilot_cells: int = 64
    """Cells in which a pixel's first known windows are looked for, at most."""

    sweeps: int = 4
    """Over the pixels, of neighbours proposing the windows they know: how many pixels a find can travel."""

    known: int = 16
    """Heavy windows of each pixel that are counted surely. More leave lighter tails to the sample and take longer to
    find."""

    opened_from: float = 1.0
    """Tiles that a parent is to get for its cells to be planned one by one. Fewer predict weights better and take
    longer to plan."""

    exact_budget: float = 0.2
    """Budget from which the exact engine serves: a window compared byte by byte costs two to five times what a sliding
    sum takes for it."""

    pixel_seconds: float = 1.3e-4
    cell_seconds: float = 7.5e-9
    window_seconds: float = 1e-8
    gathered_seconds: float = 5e-8
    """Seconds of one thread: of a pixel, for each cell of the index, and for each window of the budget, where the index
    holds its bytes and where they are gathered from images. Read off what k = 3, 7, 11, budgets of 0.03 to 5%, and
    300 to 20,000 CIFAR-10 images took (docs/notes/pruned.md), within a factor of 1.5. With the time of exact sums
    they decide which of the two serves when the engine is "auto"."""

    gpu_call_seconds: float = 2e-3
    gpu_cell_seconds: float = 1.2e-11
    gpu_window_seconds: float = 3e-11
    """The same on a GPU, for an image, and for each cell and window of a pixel. Derived for an H200 from the operations
    and bytes of each step (docs/notes/pruned.md); not measured."""

    pilot_pixels: int = 64
    """Pixels by which a budget is found for a tolerance."""

    pilot_budget: float = 1e-3
    """Budget that the search for a tolerance starts with."""

    image_groups: int = 16
    """Random groups of a sample of images (Wolter 2007, 2.2); their scatter has one degree of freedom less."""

    pilot_images: int = 32
    """Images by which is judged how flat weights are."""

    flat: float = 0.2
    """Effective sample size, as a fraction of the windows that compete, from which whole images are drawn in place of
    windows: then every cell matters, and a window that is read from anywhere takes as long as thirty to three hundred
    that lie in a row (20,000 CIFAR-10 images, in the same time: as good at 0.26, k = 7, sigma 4; three times the error
    at 0.04, k = 7, sigma 2.5)."""

    flat_from: float = 1.0
    """Noise level, in units of pixels, below which weights of windows that differ are never as flat."""

    image_pairs: float = 20.0
    """Pairs of a window and a pixel that are summed image by image for each one of a budget; see `flat`."""

    exact_share: float = 0.5
    """Fraction of the images from which all of them are summed."""

    sharpest: float = 0.005
    """Least noise level, in units of pixels. Below, the rounding of a query to 1/128 of a byte moves log-weights by
    more than 0.02, and the exact engine serves."""


POLICY = Policy()
