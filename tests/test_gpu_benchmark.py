"""benchmarks/gpu.py, which is run where minutes are few: all of it on tiny data, and what it does when a part fails."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_a_dry_run_goes_through_every_contender_and_writes_nothing():
    results = ROOT / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.glob("gpu-*")}
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines() if line[:1] == "|"]
    wanted = {(peer, "beside peers") for peer in ("fused", "attention fp16", "attention fp32", "gemm", "convolution")}
    wanted |= {("fused", section) for section in ("sizes", "banks", "samples")}
    if importlib.util.find_spec("faiss"):
        wanted.add(("pruned", "pruned"))
    assert wanted <= {(engine, section) for section, engine in rows}
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("gpu-*")}


def test_what_fails_or_comes_too_late_is_noted_and_the_rest_goes_on(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    written = []
    monkeypatch.setattr(gpu.record, "write", lambda name, what, **content: written.append(content))
    bench = gpu.Bench(SimpleNamespace(dry=False, seconds=1000.0))

    def broken_part(bench):
        bench.add(engine="first")
        raise RuntimeError("so it goes")

    assert bench.section(broken_part) is None
    assert bench.section(lambda bench, number: number, 3) == 3
    assert [row["engine"] for row in written[-1]["rows"]] == ["first"]
    assert "broken part: RuntimeError: so it goes" in written[-1]["failed"]
    bench.deadline = 0.0
    assert bench.section(broken_part) is None
    assert written[-1]["failed"] == bench.content["failed"]
    assert len(bench.content["failed"]) == 1
    assert bench.content["skipped"] == ["broken part: out of time"]
    capsys.readouterr()
