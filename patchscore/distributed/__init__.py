"""Many processes under torchrun: their exchanges (ranks.py), parts of a bank (parts.py), machines whose bank is
spread over ranks (sharded.py), and ranks that share the images of a run (team.py)."""

from __future__ import annotations

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
    "first_to_say",
    "join",
    "launched",
    "shard",
]
