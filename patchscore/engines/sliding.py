"""Placeholder until the C++ engine lands."""

import torch


def unavailable(device: torch.device) -> str | None:
    return "the C++ extension was not built"
