"""Writes docs/api.md from the docstrings and docs/cli.md from the commands' own options.

python tools/reference.py           # rewrites both
python tools/reference.py --check   # fails if they are not what the code says
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import click

import patchscore as ps
from patchscore import noise
from patchscore.adapters import diffusers, k_diffusion, network
from patchscore.cli import main as command_line

ROOT = Path(__file__).parent.parent
MADE = "<!-- Written by tools/reference.py; change the {} instead. -->"

SECTIONS = {
    "Training images": ("PatchBank",),
    "Denoisers": (
        "Denoiser",
        "Estimate",
        "IdealScore",
        "LocalScore",
        "EquivariantLocalScore",
        "GaussianScore",
        "Guided",
        "Switch",
        "NetworkDenoiser",
    ),
    "Patch sizes and noise": ("ScaleTable", "Schedule", "get_schedule"),
    "Sampling": ("sample", "Step"),
    "The index": ("PatchIndex",),
    "Theory and network": ("calibrate", "Calibration", "compare", "Comparison", "baselines"),
    "Where pixels come from": ("explain", "Explanation", "explain_samples"),
    "Classification": ("classify", "Classification"),
    "Partial sums": ("PosteriorSum", "merge"),
}
"""Every public name, in the order in which a reader meets them."""

ADAPTERS = (
    (diffusers, "PatchScoreUNet"),
    (k_diffusion, "PatchScoreDenoiser"),
    (network, "from_network"),
    (network, "from_diffusers"),
)


def api() -> str:
    listed = [name for names in SECTIONS.values() for name in names]
    missing = set(ps.__all__) - {"__version__"} ^ set(listed)
    if missing:
        raise SystemExit(f"tools/reference.py: SECTIONS and patchscore.__all__ differ in {sorted(missing)}")
    parts = ["# The library", MADE.format("docstrings")]
    parts.append(
        "Everything below is an attribute of `patchscore`, usually imported as `ps`. B items, C channels, H x W."
    )
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        parts += [described(name, getattr(ps, name), "###") for name in names]
    parts.append("## Schedules")
    parts += [described(f"noise.{name}", function, "###") for name, function in noise.SCHEDULES.items()]
    parts.append("## Adapters")
    parts.append("Modules of `patchscore.adapters`; [adapters.md](adapters.md) shows them at work.")
    parts += [
        described(f"{module.__name__.removeprefix('patchscore.')}.{name}", getattr(module, name), "###")
        for module, name in ADAPTERS
    ]
    return "\n\n".join(parts) + "\n"


def described(name: str, thing: object, level: str) -> str:
    """Heading, signature, docstring; of a class also the public methods and properties it defines itself."""
    parts = [f"{level} {name}", f"```text\n{signature(name.rpartition('.')[2], thing)}\n```", prose(thing)]
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
            continue
        text = prose(function)
        # Without words of its own it does what the class it is from says.
        if text:
            whole = f"{name}.{member}"
            shown = whole if isinstance(function, property) else signature(whole, function)
            parts += [f"#### {whole}", f"```text\n{shown}\n```", text]
    return "\n\n".join(part for part in parts if part)


def signature(name: str, thing: object) -> str:
    """One line where it fits, else an argument a line."""
    shown = inspect.signature(thing)  # type: ignore[arg-type]
    arguments: list[str] = []
    kind = None
    for parameter in shown.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind is not parameter.KEYWORD_ONLY:
            arguments.append("*")
        kind = parameter.kind
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {named(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        arguments.append(f"{star}{parameter.name}{annotation}{default}")
    returns = "" if shown.return_annotation in (shown.empty, None, "None") else f" -> {named(shown.return_annotation)}"
    line = f"{name}({', '.join(arguments)}){returns}"
    return line if len(line) <= 110 else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returns}"


def named(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def prose(thing: object) -> str:
    """The docstring as Markdown: headings of sections in bold, argument lists as lists, indented blocks as they are."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    if text.startswith(f"{getattr(thing, '__name__', '')}("):  # what dataclass writes where there is none
        return ""
    lines: list[str] = []
    listing = item = False
    for line in text.splitlines():
        entry = re.fullmatch(r"    (\S.*?): (.*)" if listing else r"([a-z_0-9]+(?:, [a-z_0-9]+)*): +(.*)", line)
        if heading := re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            listing, item = True, False
            lines += [f"**{heading[1]}**", ""]
        elif entry:
            # A list begins after a blank line.
            lines += [""] * (not item and bool(lines) and lines[-1] != "") + [f"- `{entry[1]}`: {entry[2]}"]
            item = True
        elif item and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            lines.append(line.strip() if listing else line)
            listing, item = listing and line != "", False
    return "\n".join(lines)


def cli() -> str:
    parts = ["# The command line", MADE.format("commands")]
    parts.append(
        "`patchscore COMMAND --help` says the same on the terminal. Errors that you can mend take one line, and"
    )
    parts[-1] += " exit code 2."
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
    for path, made in ((ROOT / "docs" / "api.md", api()), (ROOT / "docs" / "cli.md", cli())):
        if "--check" not in sys.argv[1:]:
            path.write_text(made)
        elif not path.exists() or path.read_text() != made:
            sys.exit(f"{path.relative_to(ROOT)} is not what the code says: run python tools/reference.py")


if __name__ == "__main__":
    main()
