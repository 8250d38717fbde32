"""How far float32 sums of a window's squared differences are from float64 ones, in the order in which `sliding` adds.

Source of DISTANT_BITS in csrc/sliding/task.h: prints the relative error by patch size, and what it makes of the
log-weight of a window that differs from z by the noise alone, C k^2 / 2 nats.
"""

import numpy as np


def chain(terms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sums of the last axis, as a suffix of one block and a prefix of the next, each added one by one in float32."""
    cut = int(rng.integers(0, terms.shape[-1]))
    suffix, prefix = (np.zeros(terms.shape[:-1], np.float32) for _ in range(2))
    for i in reversed(range(cut)):
        suffix = suffix + terms[..., i]
    for i in range(cut, terms.shape[-1]):
        prefix = prefix + terms[..., i]
    return suffix + prefix


def main(channels: int = 3, windows: int = 500) -> None:
    rng = np.random.default_rng(0)
    print("| k | rms | worst | log-weight of the noise, nats | its rms error, nats |\n| --- | --- | --- | --- | --- |")
    for k in (7, 17, 27, 29, 35, 63):
        shape = (windows, k, k * channels)
        p = rng.integers(0, 256, shape) / 127.5 - 1
        z = (rng.uniform(-1, 1, shape) + rng.standard_normal(shape)).astype(np.float32)
        exact = np.square(z - p).sum((1, 2))
        got = chain(chain(np.square(z - p.astype(np.float32)), rng), rng)
        error, nats = (got - exact) / exact, channels * k * k / 2
        print(f"| {k} | {error.std():.1e} | {np.abs(error).max():.1e} | {nats:.0f} | {error.std() * nats:.1e} |")


if __name__ == "__main__":
    main()
