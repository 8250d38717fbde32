"""Runs of `patchscore sample`: folders of samples that say how each was made, and that can be continued."""

from .batches import MOST_IMAGES
from .folder import RunFolder
from .formats import BLOCK_IMAGES, FORMATS, Shown
from .reopen import described_run, is_run, reopen, report_memorisation, samples_have_range, samples_of, warn_of_others
from .run import Run

__all__ = [
    "BLOCK_IMAGES",
    "FORMATS",
    "MOST_IMAGES",
    "Run",
    "RunFolder",
    "Shown",
    "described_run",
    "is_run",
    "reopen",
    "report_memorisation",
    "samples_have_range",
    "samples_of",
    "warn_of_others",
]
