"""Many processes under torchrun: their exchanges (ranks.py), parts of a bank (parts.py) and their indexes
(indexes.py), machines whose bank is
spread over ranks (sharded.py), and ranks that share the images of a run (team.py)."""

from __future__ import annotations

from .indexes import build_shards, open_shards, shards_in
from .parts import SpreadBank, shard
from .ranks import Disagreement, RankError, Ranks, first_to_say, join, launched
from .sharded import Sharded
from .team import Team

__all__ = [
    "Disagreement",
    "RankError",
    "Ranks",
    "Sharded",
    "SpreadBank",
    "Team",
    "build_shards",
    "first_to_say",
    "join",
    "launched",
    "open_shards",
    "shard",
    "shards_in",
]
