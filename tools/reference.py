"""Writes docs/cli.md from the options of the commands.

python tools/reference.py           # rewrites the page
python tools/reference.py --check   # fails if it is not what the code says
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from patchscore.cli import main as command_line

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
MADE = "<!-- Written by tools/reference.py; change the commands instead. -->"
INTRODUCTION = (
    "`patchscore COMMAND --help` prints the same in the terminal. An error that you can fix is one line on stderr and "
    "exit code 2."
)


def cli() -> str:
    parts = ["# The command line", MADE, INTRODUCTION]
    rows = [[f"[{name}](#patchscore-{name})", first_line(command)] for name, command in command_line.commands.items()]
    parts.append(table(["command", "what it does"], rows))
    for name, command in command_line.commands.items():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join(["patchscore", name, *((p.name or "").upper() for p in arguments), "[OPTIONS]"])
        parts += [f"## patchscore {name}", f"```text\n{usage}\n```", inspect.cleandoc(command.help or "")]
        options = [p for p in command.params if isinstance(p, click.Option)]
        parts.append(table(["option", "default", ""], [row(option) for option in options]))
        parts += epilog(command.epilog or "")
    return "\n\n".join(parts) + "\n"


def first_line(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def row(option: click.Option) -> list[str]:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.secondary_opts:
        names += ", " + ", ".join(f"`{name}`" for name in option.secondary_opts)
    if not option.is_flag:
        if option.metavar:
            takes = option.metavar
        elif isinstance(option.type, click.Choice):
            takes = "|".join(str(choice) for choice in option.type.choices)
        else:
            takes = {"integer": "N", "float": "X"}.get(option.type.name, option.type.name.upper())
        names += " " + takes.replace("|", " \\| ")
    # Click marks "no default" differently from release to release.
    default = option.default
    plain = isinstance(default, (str, int, float, Path)) and not (option.is_flag and default is False)
    shown = "required" if option.required else f"`{default}`" if plain and str(default) else ""
    return [names, shown, " ".join((option.help or "").split()).replace("|", "\\|")]


def epilog(text: str) -> list[str]:
    """Examples as a block, the rest as paragraphs."""
    parts = []
    for paragraph in text.replace("\b\n", "").strip().split("\n\n"):
        if paragraph.startswith("Examples:"):
            commands = [line.strip() for line in paragraph.splitlines()[1:]]
            parts.append("```sh\n" + "\n".join(commands) + "\n```")
        elif paragraph.strip():
            parts.append(" ".join(paragraph.split()))
    return parts


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(cli())
    elif not PAGE.exists() or PAGE.read_text() != cli():
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what the code says: run python tools/reference.py")


if __name__ == "__main__":
    main()
