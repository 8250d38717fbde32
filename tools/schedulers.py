"""Writes the table of diffusers' schedulers in docs/adapters.md; with --check it only says whether it is fresh."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import diffusers
from diffusers import schedulers

from patchscore.adapters.diffusers import convention

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
BEGIN, END = "<!-- schedulers of diffusers -->\n", "<!-- /schedulers of diffusers -->"
TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def kinds() -> dict[str, type]:
    """The schedulers that diffusers exports, by name."""
    found = {name: getattr(schedulers, name, None) for name in dir(schedulers) if name.endswith("Scheduler")}
    return {name: kind for name, kind in sorted(found.items()) if inspect.isclass(kind)}


def table() -> str:
    """Served schedulers with their prediction types, then the others with the reason."""
    served, refused = [], []
    for name, kind in kinds().items():
        flows = (False, True) if "use_flow_sigmas" in inspect.signature(kind.__init__).parameters else (False,)
        for flow in flows:
            try:
                _, predictions = convention(kind, flow)
            except ValueError as error:
                reason = str(error).split(": ", 2)[-1] if "not served" in str(error) else "it is not known"
                refused += [] if flow else [f"| {name} | {reason} |"]
                continue
            cells = ["runs" if one in predictions else "refused" for one in TYPES]
            served.append(f"| {name}{', use_flow_sigmas' if flow else ''} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"diffusers {diffusers.__version__}:",
            "",
            f"| scheduler | {' | '.join(TYPES)} |",
            "| --- " * (1 + len(TYPES)) + "|",
            *served,
            "",
            "| refused by name | why |",
            "| --- | --- |",
            *refused,
            "",
        ]
    )


def main() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    fresh = before + BEGIN + table() + END + rest.split(END, 1)[1]
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(fresh)
    elif page != fresh:
        sys.exit("docs/adapters.md is not what the code says: run python tools/schedulers.py")


if __name__ == "__main__":
    main()
