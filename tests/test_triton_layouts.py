"""Sums that must agree to the last bit are taken in one layout: `allocate_kernel` counts what `list_kernel` writes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
compiles = [needs_triton, pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")]


def scans(ttgir):
    """Layouts of the running sums of floats, spelled out."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    found = re.findall(r"\(tensor<(\d+)xf32, (#\w+)>\) -> tensor<\d+xf32", "".join(_scan_ends(ttgir)))
    return {(size, names[layout]) for size, layout in found}


def _scan_ends(ttgir):
    """The line that closes each scan, which has its types."""
    inside = False
    for line in ttgir.splitlines():
        inside = inside or '"tt.scan"' in line
        if inside and "}) :" in line:
            inside = False
            yield line + "\n"


class TestLayouts:
    pytestmark = compiles

    @pytest.mark.parametrize("capability", [80, 90])
    def test_counting_and_listing_add_chances_in_one_layout(self, capability, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import compile_report

        counted = scans(
            compile_report.compiled_list("allocate", compile_report.LISTS["allocate"], capability, 4).asm["ttgir"]
        )
        assert len(counted) == 1
        for values in (4, 16):
            constants = compile_report.LISTS["list"] | {"NM": values}
            listed = scans(compile_report.compiled_list("list", constants, capability, 4).asm["ttgir"])
            assert listed == counted
