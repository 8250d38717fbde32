"""Runs of `patchscore sample`: folders of samples that say how each was made, and that can be continued."""

from .folder import MOST_IMAGES, RunFolder
from .reopen import reopen, report_memorisation, warn_of_others
from .run import Run

__all__ = ["MOST_IMAGES", "Run", "RunFolder", "reopen", "report_memorisation", "warn_of_others"]
