"""PatchAverage: the definition in plain loops, and both engines."""

import naive
import numpy as np
import pytest
import torch
from conftest import noisy, smooth_images

import patchscore as ps
from patchscore.engines import sliding


def by_loops(z, sigma, train, machine, k):
    """D(z) of one noisy image [C, H, W], window by window."""
    _, height, width = z.shape
    sums, counts, r = np.zeros(z.shape), np.zeros((height, width)), k // 2
    for i in range(height):
        for j in range(width):
            logits, places = [], []
            for image, a, b in naive.competitors(train, machine, k, i, j):
                logits.append(
                    -naive.window_distance(z, image, i, j, a, b, k, wrap=machine == "els-circular") / (2 * sigma**2)
                )
                places.append((image, a, b))
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            for u in range(-r, r + 1):
                for v in range(-r, r + 1):
                    y, x = i + u, j + v
                    if machine == "els-circular":
                        y, x = y % height, x % width
                    if not (0 <= y < height and 0 <= x < width):
                        continue
                    values = [naive.pixel(image, a + u, b + v) for image, a, b in places]
                    sums[:, y, x] += weights @ np.array(values)
                    counts[y, x] += 1
    return sums / counts


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("channels", "k"), [(1, 3), (2, 5)])
def test_it_is_the_definition(padding_mode, channels, k):
    bank = ps.PatchBank(smooth_images(2, channels, 7, 6))
    z = noisy(bank, 0.4)
    expected = by_loops(z[0].numpy(), 0.4, bank.chunk(0, 2, torch.float64).numpy(), f"els-{padding_mode}", k)
    found = ps.PatchAverage(bank, k, padding_mode, engine="reference").denoise(z, 0.4)
    torch.testing.assert_close(found[0], torch.from_numpy(expected), rtol=0, atol=1e-9)


@pytest.mark.skipif(sliding.cpu.native is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("k", [1, 3, 7, 11])
def test_sliding_is_the_reference(padding_mode, k):
    bank = ps.PatchBank(smooth_images(20, 3, 13, 11), torch.arange(20) % 2)
    z, sigma = noisy(bank, 0.4, batch=3, dtype=torch.float32), torch.tensor([0.1, 0.4, 3.0])
    expected = ps.PatchAverage(bank, k, padding_mode, engine="reference").estimate(z.double(), sigma, [0, None, 1])
    found = ps.PatchAverage(bank, k, padding_mode, engine="sliding").estimate(z, sigma, [0, None, 1])
    assert found.engine == "sliding"
    assert (found.mean - expected.mean).abs().max() < 1e-4
    torch.testing.assert_close(found.ess.double(), expected.ess, rtol=1e-2, atol=1e-3)


def test_windows_of_one_pixel_are_their_centres(bank):
    z = noisy(bank, 0.4)
    alone = ps.EquivariantLocalScore(bank, 1, engine="reference").denoise(z, 0.4)
    torch.testing.assert_close(ps.PatchAverage(bank, 1, engine="reference").denoise(z, 0.4), alone)


def test_it_is_sampled_and_has_no_moments(bank):
    machine = ps.PatchAverage(bank, ps.ScaleTable.constant(3))
    assert ps.sample(machine, 2, steps=3, progress=False).isfinite().all()
    z = noisy(bank, 0.4)
    with pytest.raises(ValueError, match=r"^moments: PatchAverage has none"):
        machine.divergence(z, 0.4)
    with pytest.raises(ValueError, match=r"^denoiser: PatchAverage has no Jacobian"):
        machine.vjp(z, 0.4, z)
    with pytest.raises(ValueError, match=r"^patch_size: 11 does not fit"):
        ps.PatchAverage(bank, 11, "circular")
