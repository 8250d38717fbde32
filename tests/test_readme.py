"""The README is true: its code runs as it stands, its commands exist, its pictures are there."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchscore.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_block_runs_as_it_stands():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["x0"].shape == names["est"].mean.shape == (2, 1, 28, 28)
    assert names["images"].shape == (4, 1, 28, 28)


@pytest.mark.parametrize("line", re.findall(r"^patchscore (.*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_commands_are_understood(line):
    command, source, *options = line.split()
    assert command in main.commands
    known = {name for parameter in main.commands[command].params for name in parameter.opts}
    assert {option for option in options if option.startswith("-")} <= known
    help_text = CliRunner().invoke(main, [command, "--help"]).output
    assert source in help_text


def test_pictures_and_make_targets_exist():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
