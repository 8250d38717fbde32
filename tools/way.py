"""Counts the functions that noisy images pass from `denoise` to a kernel; docs/notes/tree.md has the table.

For each engine one call of EquivariantLocalScore.denoise, k = 3, on 300 images of 12 x 12 (3,000 where whole images are
drawn): the functions of patchscore that take z, a view or copy of it, or an object that holds one, on the stack when
the kernel is entered, and those that have returned. `fused` runs under Triton's interpreter, `sliding` on CUDA under
the emulator of tests/emulation.

    PYTHONPATH=. python tools/way.py [-v] [reference sliding cuda fused pruned pruned-flat]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

KERNELS = {
    "reference": ("reference.py", "_squared_norm"),
    "sliding": ("cpu.py", "_sums_of_piece"),
    "cuda": ("cuda.py", "_run"),
    "fused": ("launch.py", "run"),
    "pruned": ("cpu.py", "scan"),
    "pruned-flat": ("cpu.py", "scan"),
}
"""The last function before the kernel, by file and name."""
SIGMA = {"pruned": 0.5}


def machine_of(way: str, folder: str) -> Any:
    import torch
    from conftest import smooth_images

    import patchscore as ps
    from patchscore import engines

    options: dict[str, Any] = {"engine": way.split("-")[0]}
    bank = ps.PatchBank(smooth_images(3000 if way == "pruned-flat" else 300, 3, 12, 12))
    if way == "cuda":
        import emulated
        import pytest

        from patchscore.engines.sliding.cuda import SlidingCuda

        emulated.Emulation(emulated.load(emulated.build(folder)), pytest.MonkeyPatch())
        SlidingCuda.runs_on = lambda self, device: True  # type: ignore[method-assign]
        engines.EXACT = (SlidingCuda(), engines.EXACT[-1])
        options["engine"] = "sliding"
    elif way.startswith("pruned"):
        options |= {"index": ps.PatchIndex.build(bank, [3], f"{folder}/index", progress=False), "budget": 0.05}
    torch.manual_seed(0)
    return ps.EquivariantLocalScore(bank, 3, **options)


def passed(machine: Any, sigma: float, kernel: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The functions on the stack when the kernel is entered first, and those that have returned."""
    import torch

    z = machine.bank.chunk(0, 1).clone()
    z += sigma * torch.randn(z.shape)
    machine.denoise(z, sigma)
    storage = z.untyped_storage().data_ptr()

    def holds(value: Any, depth: int = 2) -> bool:
        if isinstance(value, torch.Tensor):
            view = value.untyped_storage().data_ptr() == storage
            return view or (value.shape == z.shape and torch.equal(value, z.to(value.dtype)))
        return depth > 0 and any(holds(x, depth - 1) for x in list(getattr(value, "__dict__", {}).values()))

    stack: list[tuple[FrameType, str, bool]] = []
    returned: dict[str, None] = {}
    entered: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and f"{os.sep}patchscore{os.sep}" in code.co_filename:
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            name = f"{Path(code.co_filename).name}: {getattr(code, 'co_qualname', code.co_name)}"
            stack.append((frame, name, any(holds(frame.f_locals.get(x)) for x in arguments)))
            if (Path(code.co_filename).name, code.co_name) == kernel and not entered:
                entered.extend(name for _, name, takes in stack if takes or name == stack[-1][1])
                sys.setprofile(None)
        elif event == "return" and stack and stack[-1][0] is frame:
            _, name, takes = stack.pop()
            if takes:
                returned[name] = None

    sys.setprofile(profile)
    try:
        machine.denoise(z, sigma)
    finally:
        sys.setprofile(None)
    return entered, list(returned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("-v", action="store_true", help="list the functions")
    options = parser.parse_args()
    for way in options.ways:
        if way == "fused":
            os.environ["TRITON_INTERPRET"] = "1"
        else:
            os.environ.pop("TRITON_INTERPRET", None)
        with tempfile.TemporaryDirectory() as folder:
            entered, returned = passed(machine_of(way, folder), SIGMA.get(way, 2.0), KERNELS[way])
        print(f"{way}: {len(entered)} on the way, {len(returned)} returned, {len(entered) + len(returned)} together")
        if options.v:
            print(*(f"  {name}" for name in entered), "returned:", *(f"  {name}" for name in returned), sep="\n")


if __name__ == "__main__":
    main()
