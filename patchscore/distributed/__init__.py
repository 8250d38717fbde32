"""Many processes under torchrun: their exchanges (ranks.py), parts of a bank (parts.py), and machines whose bank is
spread over ranks (sharded.py)."""

from __future__ import annotations

from .parts import SpreadBank, shard
from .ranks import RankError, Ranks, join
from .sharded import Sharded

__all__ = ["RankError", "Ranks", "Sharded", "SpreadBank", "join", "shard"]
