"""torch's FlexAttention over materialised windows, compiled, in half floats; |p|^2 as one more column."""

from __future__ import annotations

import torch

from .rows import images_of, with_bias


def prepare(z, sigma, train, k):
    from torch.nn.attention.flex_attention import flex_attention

    q, p, v = with_bias(z, sigma, train, k, torch.float16)
    # It wants head sizes that are powers of two.
    width = 1 << (q.shape[-1] - 1).bit_length()
    q, p, v = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p, v))
    compiled = torch.compile(flex_attention, dynamic=False)

    def work():
        return images_of(compiled(q, p, v, scale=1.0)[0, 0], z)

    return work


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it is for cuda"
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
