"""`python -m patchscore` is the command `patchscore`."""

from .cli import main

main(prog_name="patchscore")
