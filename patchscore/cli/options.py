"""What commands share: options that come in groups, words turned into objects, and one line for every error.

A group of options reaches its command as one object (`taking`), so that a command has a few parameters and not twenty.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import os
import signal
import sys
import sysconfig
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from .. import checks, engines
from ..bank import PatchBank
from ..denoiser import DEFAULT_MEMORY_LIMIT, ScoreMachine
from ..distributed import Disagreement, RankError, Sharded, first_to_say, join, launched
from ..draw import charts
from ..files import write_atomically
from ..machines import EquivariantLocalScore
from ..mixed import MixedBank, open_bank
from ..noise import SCHEDULES
from ..sampling import DEFAULT_BATCH, SAMPLER_NAMES
from ..scales import PUBLISHED, ScaleTable

Command = Callable[..., None]
Option = Callable[[Command], Command]


class OneLine(click.ClickException):
    """An error the user can mend: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Prints the line, once where several ranks have the same to say."""
        if first_to_say(self.message):
            say(f"patchscore: error: {self.message}", err=True)


def say(*lines: str, err: bool = False) -> None:
    """Prints lines, with control characters spelled out: names from files may hold a newline or an escape.

    Of several ranks the first prints alone, but for errors.
    """
    if launched() and os.environ["RANK"] != "0" and not err:
        return
    for line in lines:
        click.echo("".join(c if unicodedata.category(c)[0] != "C" else _spelled(c) for c in line), err=err)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


STOPPED = "patchscore: stopped; the same command goes on from what is written, or begins again"

IN_TEAMS = ("sample", "index")
"""The commands that several ranks work on together."""


def one_line_errors(command: Command) -> Command:
    """Turns errors that a user can cause into one line, and warnings into one each; of all ranks, where there are."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
            if not launched() or os.environ["RANK"] == "0":
                say(f"patchscore: warning: {message}", err=True)

        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            try:
                if launched():
                    _join_team(command.__name__)
                command(*args, **kwargs)
            except RankError as error:
                if error.reported:  # by the rank that failed
                    raise click.exceptions.Exit(2) from None
                # The others may be out of reach, and whatever waits for them would keep this process.
                say(f"patchscore: error: {error}", err=True)
                sys.stdout.flush()
                os._exit(2)
            except Disagreement as error:
                if error.reported:
                    raise click.exceptions.Exit(2) from None
                raise OneLine(str(error)) from None
            except (ValueError, TypeError, OSError, ImportError, OverflowError) as error:
                raise OneLine(" ".join(f"{error}{_place_outside(error)}".split())) from None
            except csv.Error as error:
                raise OneLine(f"--labels: {error}") from None
            except EOFError as error:
                raise OneLine(f"a file ends too early: {error}") from None
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise OneLine(
                    "not enough memory; take fewer or smaller images (--limit, --size), a smaller --batch-size or "
                    "--memory-limit"
                ) from None
            except KeyboardInterrupt:
                if first_to_say(STOPPED):
                    say("", STOPPED, err=True)
                raise click.exceptions.Exit(130) from None

    return wrapped


class Commands(click.Group):
    """Commands; Ctrl-C outside of one, while options are read or after its end, is told as it is within."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **more)
        code = 130
        try:
            code = run(*args, standalone_mode=False, **more) or 0
        except click.Abort:
            say(STOPPED, err=True)  # after click's empty line
        except click.ClickException as error:
            code, text = error.exit_code, io.StringIO()
            error.show(text)
            say(*text.getvalue().splitlines(), err=True)  # click repeats words, which may be names of files
        except KeyboardInterrupt:
            say("", STOPPED, err=True)
        sys.exit(code)


def _join_team(command: str) -> None:
    """Sets up what ranks of torchrun need: they know each other, and end as at Ctrl-C when another one failed."""
    if command not in IN_TEAMS:
        raise ValueError(f"{command}: takes one process; under torchrun there are {' and '.join(IN_TEAMS)}")
    join()
    signal.signal(signal.SIGTERM, _stopped)
    if os.environ["RANK"] != "0":  # one progress bar
        for name in ("display", "close"):
            setattr(tqdm, name, lambda *_, **__: None)


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt("torchrun ended its ranks, as it does when one fails")


OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "bad_alloc", "can't start new thread")
"""How errors without a type of their own say it: torch's allocator on the CPU, oneDNN, C++, Python's threads."""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(said in str(error) for said in OUT_OF_MEMORY)


def _place_outside(error: BaseException) -> str:
    """File and line of an error raised in a user's own code; nothing for one raised in an installed library."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = [Path(__file__).parent.parent, *(Path(p) for p in set(sysconfig.get_paths().values()))]
    if not frames or any(Path(frames[-1].filename).is_relative_to(place) for place in installed):
        return ""
    if not Path(frames[-1].filename).is_file():
        return ""
    return f" ({type(error).__name__} at {frames[-1].filename}, line {frames[-1].lineno})"


def taking(kind: type, *options: Option) -> Callable[[Command], Command]:
    """A decorator: the command takes `options`, collected in one object of the dataclass `kind`, by its name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            names = [field.name for field in dataclasses.fields(kind) if field.name in kwargs]
            values = {name: kwargs.pop(name) for name in names}
            command(*args, **{kind.__name__.lower(): kind(**values)}, **kwargs)

        taken: Command = wrapped
        for option in reversed(options):
            taken = option(taken)
        return taken

    return decorate


# ---- Training images.


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the training images are and how to read them."""

    source: str
    size: int | None
    channels: str | None
    limit: int | None
    skip_bad: bool
    split: str | None
    image_key: str | None
    label_key: str | None
    value_range: str | None = None

    def open(self) -> PatchBank:
        return PatchBank.open(**self.reading)

    def open_any(self) -> PatchBank | MixedBank:
        """`open`, with images of several sizes as they are where there is no --size."""
        return open_bank(**self.reading)

    @property
    def reading(self) -> dict[str, Any]:
        """What `PatchBank.open` takes."""
        channels = None if self.channels is None else int(self.channels)
        return {**dataclasses.asdict(self), "channels": channels, "value_range": range_named(self.value_range)}

    def at(self, source: str) -> Source:
        """Another source, read as this one is."""
        return dataclasses.replace(self, source=source)

    def check_not_around(self, out: Path) -> None:
        """ValueError where what is written would lie among the training images."""
        if Path(self.source).is_dir() and out.resolve().is_relative_to(Path(self.source).resolve()):
            raise ValueError(f"--out: {out} lies in the folder of training images")


source_options = taking(
    Source,
    click.argument("source"),
    click.option("--size", type=int, help="Resize to SIZE x SIZE pixels, after cropping to a square about the centre."),
    click.option("--channels", type=click.Choice(["1", "3"]), help="Convert to gray (1) or RGB (3)."),
    click.option("--limit", type=int, help="Largest number of images, from all classes as equally as possible."),
    click.option("--skip-bad", is_flag=True, help="Skip images that cannot be read, and report how many."),
    click.option("--split", help="The split to read where SOURCE has several, such as train."),
    click.option("--image-key", help="Name of the images in a source of several arrays or columns."),
    click.option("--label-key", help="Name of the labels in such a source."),
)

VALUE_RANGE = click.option(
    "--value-range",
    metavar="data|LOW,HIGH",
    help="SOURCE is a .npy, .pt or .safetensors file of floating point [N, C, H, W], such as latents, with any finite "
    "values, or those from LOW to HIGH. Noise levels are in the same units.",
)


# ---- Sampling: from noise to images.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    steps: int
    schedule: str
    sampler: str
    labels: str
    seed: int
    batch_size: int

    def check(self) -> None:
        checks.integer("--batch-size", self.batch_size, at_least=1)


def sampling_options(
    labels: Option, seed_help: str | None, batch_help: str, steps_help: str
) -> Callable[[Command], Command]:
    """The options of `Sampling`; commands explain them in their own words."""
    return taking(
        Sampling,
        click.option("--steps", type=int, default=20, show_default=True, help=steps_help),
        click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="cosine", show_default=True),
        click.option("--sampler", type=click.Choice(list(SAMPLER_NAMES)), default="ddim", show_default=True),
        labels,
        click.option("--seed", type=int, default=0, show_default=True, help=seed_help),
        click.option("--batch-size", type=int, default=DEFAULT_BATCH, show_default=True, help=batch_help),
    )


# ---- Where and with what it is computed.


@dataclasses.dataclass(frozen=True)
class Computing:
    """Engine, device and working memory."""

    engine: str
    device: str
    memory_limit: float

    @property
    def bytes(self) -> int:
        if not 0 < self.memory_limit < 2**30:
            raise ValueError(f"--memory-limit: got {self.memory_limit:g}, takes a positive number of GiB")
        return int(self.memory_limit * 2**30)

    @property
    def where(self) -> str:
        return device_named(self.device)


def computing_options(*names: str) -> Callable[[Command], Command]:
    """The options of Computing; `names` are engines beside the exact ones."""
    listed = "|".join(["auto", *engines.NAMES, *names])
    memory = DEFAULT_MEMORY_LIMIT / 2**30
    return taking(
        Computing,
        click.option("--engine", default="auto", show_default=True, metavar=listed),
        device_option("cpu, cuda, cuda:1 or mps; auto is cuda where available."),
        click.option("--memory-limit", type=float, default=memory, show_default=True, help="Working memory in GiB."),
    )


def device_option(explained: str = "auto is cuda where available.") -> Option:
    return click.option("--device", default="auto", show_default=True, help=explained)


def device_named(device: str) -> str:
    """The device, checked; "auto" is cuda where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(checks.device(device))


# ---- Words.


def named_table(table: str) -> ScaleTable:
    """A table by name, file or constant."""
    if table in PUBLISHED:
        return ScaleTable.published(table)
    if table.isdecimal() and len(table) < 10:
        return ScaleTable.constant(checks.odd("--table", int(table)))
    if Path(table).is_file():
        return ScaleTable.load(table)
    raise ValueError(f"--table: got {table!r}, takes a patch size, a file, or one of {', '.join(PUBLISHED)}")


def labels_named(labels: str, bank: PatchBank | MixedBank) -> list[int] | None:
    """none, all, one class name, or several between commas; a name that has a comma itself goes in double quotes."""
    if labels == "none":
        return None
    if labels == "all":
        if not bank.classes:
            raise ValueError("--labels: got all, but this source has no labels")
        return list(bank.classes)
    if labels in (bank.class_names or ()):
        return bank.label_ids([labels])
    listed = next(csv.reader([labels], skipinitialspace=True)) if '"' in labels else labels.split(",")
    return bank.label_ids([label.strip() for label in listed])


def numbers(option: str, text: str, takes: str) -> list[int]:
    """Numbers with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise ValueError(f"{option}: got {text!r}, takes {takes}")
    return [int(part) for part in parts]


def range_named(text: str | None) -> str | tuple[float, float] | None:
    """data, or LOW,HIGH, as `PatchBank` takes it; the bank says which numbers make a range."""
    if text is None or text == "data":
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--value-range: got {text!r}, takes data or LOW,HIGH such as -4,4") from None
    return low, high


def size_named(option: str, text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH, such as 48x80, or one number for both."""
    sides = text.lower().split("x")
    if not (len(sides) <= 2 and all(side.isdecimal() and len(side) < 10 and int(side) for side in sides)):
        raise ValueError(f"{option}: got {text!r}, takes HEIGHTxWIDTH such as 48x80")
    return int(sides[0]), int(sides[-1])


# ---- What is said and drawn.


def described(machine: ScoreMachine, device: str) -> str:
    """A machine in a line."""
    if isinstance(machine, Sharded):
        over = f", bank over {machine.ranks.size} ranks" if machine.ranks.size > 1 else ""
        return described(machine.leaf, device) + over
    parts = [type(machine).__name__]
    if isinstance(machine, EquivariantLocalScore):
        parts.append(f"padding {machine.padding_mode}")
    if isinstance(machine.patch_size, ScaleTable):
        parts.append(f"patch sizes {machine.patch_size.name}")
    return ", ".join([*parts, f"engine {machine.engine_on(device)} on {device}"])


def bytes_in_words(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.3g} TiB"


def seconds_since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def write_chart(path: Path, draw: Callable[[], Any]) -> None:
    """Draws one where matplotlib is; without it a warning says what is missing."""
    try:
        write_atomically(path, charts.png(draw()))
    except ImportError as error:
        warnings.warn(f"{path.name} is not drawn: {error}", stacklevel=2)
