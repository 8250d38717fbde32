"""The definition a second time, as plain loops over numbers in float64, sharing no code with the package.

Written from the paper's table of who competes where; slow, so tests ask it for a few pixels at a time.
"""

import math

import numpy as np


def denoise_pixel(z, sigma, train, machine, k, i, j):
    """(mean [C], ess, number of competitors) of one pixel of one noisy image z [C, H, W]; train [N, C, H, W]."""
    logits, values = [], []
    for image, a, b in competitors(train, machine, k, i, j):
        if machine == "ideal":
            distance = sum((float(x) - float(y)) ** 2 for x, y in zip(z.flat, image.flat, strict=True))
        else:
            distance = window_distance(z, image, i, j, a, b, k, wrap=machine == "els-circular")
        logits.append(-distance / (2 * sigma**2))
        values.append(image[:, a, b])
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(weights)
    mean = [math.fsum(w * v[c] for w, v in zip(weights, values, strict=True)) / total for c in range(len(values[0]))]
    return np.array(mean), total**2 / math.fsum(w * w for w in weights), len(logits)


def competitors(train, machine, k, i, j):
    """Every (image, row, column) that competes at pixel (i, j)."""
    _, _, height, width = train.shape
    for image in train:
        if machine in ("ideal", "local"):
            yield image, i, j
        elif machine == "els-circular":
            for a in range(height):
                for b in range(width):
                    if inside(a, height, k) and inside(b, width, k):
                        yield image, a, b
        else:
            for a in range(height):
                for b in range(width):
                    if may_meet(i, a, height, k) and may_meet(j, b, width, k):
                        yield image, a, b


def inside(x, length, k):
    return x - k // 2 >= 0 and x + k // 2 <= length - 1


def may_meet(query, window, length, k):
    """Boundary-broken rule of one axis: interior meets interior, near a border only the same coordinate meets."""
    if inside(query, length, k):
        return inside(window, length, k)
    return window == query


def window_distance(z, image, i, j, a, b, k, wrap):
    total = 0.0
    r = k // 2
    _, height, width = z.shape
    for u in range(-r, r + 1):
        for v in range(-r, r + 1):
            noisy = z[:, (i + u) % height, (j + v) % width] if wrap else pixel(z, i + u, j + v)
            clean = pixel(image, a + u, b + v)
            for x, y in zip(noisy, clean, strict=True):
                total += (float(x) - float(y)) ** 2
    return total


def pixel(image, i, j):
    """Zero outside the image."""
    channels, height, width = image.shape
    if 0 <= i < height and 0 <= j < width:
        return image[:, i, j]
    return np.zeros(channels)
