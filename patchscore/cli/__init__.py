"""The command line: `patchscore sample`, `synthesize`, `bank`, `index`, `info`, `calibrate`, `compare`, `explain`,
`evaluate`, `likelihood` and `bench`.

A thin layer: it turns arguments into the library's objects, prints results, and turns every error that a user can cause
into one line on stderr and exit code 2.
"""

from __future__ import annotations

import click

from ..version import __version__
from .bank import bank
from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .evaluate import evaluate
from .explain import explain
from .index import index
from .info import info
from .likelihood import likelihood
from .options import Commands
from .sample import sample
from .synthesize import synthesize_command

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="patchscore")
def main() -> None:
    """Sample new images from training patches: the score of a diffusion model, computed without a network."""


for command in (
    sample,
    synthesize_command,
    bank,
    index,
    info,
    calibrate,
    compare,
    explain,
    evaluate,
    likelihood,
    bench,
):
    main.add_command(command)
