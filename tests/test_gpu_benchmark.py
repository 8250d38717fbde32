"""benchmarks/gpu_quick.sh and gpu.py, which run where minutes are few: the plan, a dry run of every step, failures."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_quick.sh"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
COMMAND_LIMIT = 600
"""Seconds that one command of a rented machine may take."""


def run(out, *options, **environment):
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, **environment}
    return subprocess.run([SCRIPT, *options], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)


def steps(out):
    with (out / "steps.tsv").open() as file:
        return {row["step"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def gpu():
    sys.path.append(str(ROOT / "benchmarks"))
    strict = os.environ.get("PATCHSCORE_STRICT")
    import gpu

    os.environ.pop("PATCHSCORE_STRICT")
    if strict is not None:
        os.environ["PATCHSCORE_STRICT"] = strict
    return gpu


# The plan.


def test_the_steps_fit_in_one_command_and_each_in_its_limit(tmp_path):
    done = run(tmp_path, "--plan")
    assert done.returncode == 0
    planned = re.findall(r"^(\S+) +(\d+) s, at most +(\d+) s$", done.stdout, re.MULTILINE)
    total = sum(int(estimate) for _, estimate, _ in planned)
    assert done.stdout.splitlines()[-1].startswith(f"together {total} s of ")
    assert total <= 560 < COMMAND_LIMIT
    assert all(int(estimate) < int(limit) for _, estimate, limit in planned)
    assert all(limit == "20" for name, _, limit in planned if name.startswith("smoke-"))
    names = [name for name, _, _ in planned]
    assert names[0] == "machine"
    assert names.index("bench-fused") < names.index("bench-sliding")
    assert run(tmp_path, LIMIT=str(total - 1)).returncode == 2


@pytest.mark.skipif(not os.environ.get("PATCHSCORE_GPU_DRY"), reason="takes minutes; PATCHSCORE_GPU_DRY=1 runs it")
@needs_triton
def test_a_dry_run_goes_through_every_step(tmp_path):
    done = run(tmp_path, "--dry")
    found, log = steps(tmp_path), (tmp_path / "log.txt").read_text()
    bad = {name: row for name, row in found.items() if row["status"] not in ("passed", "absent")}
    assert not bad, log
    planned = [line.split()[0] for line in run(tmp_path, "--plan").stdout.splitlines()[:-1]]
    assert list(found) == planned
    for engine, section in (("fused", "peers"), ("gemm", "peers"), ("fused", "batches"), ("fused", "samples")):
        assert f"| {section} | {engine} |" in log
    # A dry run is no result.
    assert not list(tmp_path.glob("gpu-*"))
    assert done.stdout.count("\n") == len(planned) + 1


def test_only_what_did_not_pass_runs_again(tmp_path):
    earlier = tmp_path / "earlier.tsv"
    rows = [("machine", "passed"), ("build", "passed"), ("smoke-fused", "failed"), ("tests-fused", "skipped")]
    others = [line.split()[0] for line in run(tmp_path, "--plan").stdout.splitlines()[:-1]]
    rows += [(name, "passed") for name in others if name not in dict(rows)]
    lines = ["step\tstatus\tseconds\testimated\tnote", *(f"{name}\t{status}\t1\t1\t" for name, status in rows)]
    earlier.write_text("\n".join(lines) + "\n")
    (tmp_path / "gpu-x.json").write_text('{"rows": []}')
    # No command works, so nothing is computed: what is asked is which steps begin.
    run(tmp_path / "out", "--failed", str(earlier), PYTHON="false")
    found = steps(tmp_path / "out")
    assert found["smoke-fused"]["status"] == "skipped"
    assert found["machine"]["status"] == "failed"
    assert (tmp_path / "out" / "gpu-x.json").exists()
    assert found["tests-fused"]["note"] == "smoke-fused did not pass"
    assert found["bench-sliding"] | {"status": "passed", "note": "in the earlier run"} == found["bench-sliding"]


def test_a_step_that_hangs_costs_its_limit_and_what_needs_it_is_skipped(tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text('#!/bin/sh\ncase "$*" in *gpu_smoke*) sleep 60 ;; esac\n')
    hanging.chmod(0o755)
    # The whole run may take 8 seconds: they cut the limit of the step short.
    done = run(tmp_path, "--only", "smoke-fused", "tests-fused", "samples", PYTHON=str(hanging), LIMIT="8")
    found = steps(tmp_path)
    assert done.returncode == 1
    assert found["smoke-fused"]["status"] == "timeout"
    assert int(found["smoke-fused"]["seconds"]) < 20
    assert found["tests-fused"]["status"] == found["samples"]["status"] == "skipped"


def test_tests_that_all_skip_are_no_pass(tmp_path):
    skipping = tmp_path / "python"
    skipping.write_text('#!/bin/sh\ncase "$*" in *pytest*) echo "50 skipped in 1.0s" ;; esac\n')
    skipping.chmod(0o755)
    run(tmp_path, "--only", "tests-fused", PYTHON=str(skipping))
    assert (
        steps(tmp_path)["tests-fused"] | {"status": "failed", "note": "no GPU test ran"}
        == steps(tmp_path)["tests-fused"]
    )


def test_bad_arguments_are_named(tmp_path):
    for options, word in (
        (["--fast"], "--fast"),
        (["--only", "nothing"], "nothing"),
        (["--failed", "no.tsv"], "no.tsv"),
    ):
        done = run(tmp_path, *options)
        assert done.returncode == 2
        assert word in done.stderr
        assert len(done.stderr.splitlines()) == 1


# gpu.py.


def bench_of(gpu, monkeypatch, tmp_path, only=None):
    monkeypatch.setattr(gpu.record, "RESULTS", tmp_path)
    return gpu.Bench(SimpleNamespace(dry=False, quick=True, seconds=1000.0, only=only))


def written(tmp_path):
    return json.loads((tmp_path / "gpu-cpu.json").read_text())


@needs_triton
def test_what_fails_or_comes_too_late_is_noted_and_the_rest_goes_on(gpu, monkeypatch, tmp_path, capsys):
    bench = bench_of(gpu, monkeypatch, tmp_path)

    def broken(bench):
        bench.add(engine="first")
        raise RuntimeError("so it goes")

    assert bench.section("peers", broken) is None
    assert bench.section("banks", lambda bench, number: number, 3) == 3
    assert [row["engine"] for row in written(tmp_path)["rows"]] == ["first"]
    assert written(tmp_path)["failed"] == ["peers: RuntimeError: so it goes"]
    bench.deadline = 0.0
    assert bench.section("samples", broken) is None
    assert bench.content["skipped"] == ["samples: out of time"]
    assert len(bench.content["failed"]) == 1
    capsys.readouterr()


@needs_triton
def test_a_guest_that_cannot_do_a_case_is_skipped_and_an_engine_that_cannot_has_failed(
    gpu, monkeypatch, tmp_path, capsys
):
    bench = bench_of(gpu, monkeypatch, tmp_path)
    bench.repeats = 1

    def cannot():
        raise RuntimeError("No available kernel")

    def both(bench):
        works = {"ours": cannot, "guest": cannot, "good": lambda: None}
        return list(bench.interleaved(works, guests=["guest"]))

    assert bench.section("peers", both) == ["good"]
    assert written(tmp_path)["failed"] == ["peers: ours: RuntimeError: No available kernel"]
    assert written(tmp_path)["skipped"] == ["peers: guest: RuntimeError: No available kernel"]
    capsys.readouterr()


@needs_triton
def test_a_run_of_some_sections_keeps_the_others_of_the_same_commit(gpu, monkeypatch, tmp_path, capsys):
    def adding(bench, engine):
        bench.add(engine=engine)

    bench = bench_of(gpu, monkeypatch, tmp_path)
    bench.section("peers", adding, "old peers")
    bench.section("sliding", adding, "sliding")
    again = bench_of(gpu, monkeypatch, tmp_path, only=["peers"])
    again.section("sliding", adding, "not wanted")
    again.section("peers", adding, "new peers")
    assert {row["engine"] for row in written(tmp_path)["rows"]} == {"sliding", "new peers"}
    monkeypatch.setenv("PATCHSCORE_COMMIT", "another")
    bench_of(gpu, monkeypatch, tmp_path, only=["peers"]).section("peers", adding, "newest")
    assert {row["engine"] for row in written(tmp_path)["rows"]} == {"newest"}
    capsys.readouterr()


@needs_triton
def test_no_speed_is_reported_of_an_engine_that_is_wrong_or_did_not_serve(gpu, monkeypatch, tmp_path, capsys):
    bench = bench_of(gpu, monkeypatch, tmp_path)
    bank = gpu.ps.PatchBank(gpu.record.smooth(3, 8, 4))
    call = gpu.Call(bank, 3, 0.5, bank.chunk(0, 1) + 0.1)
    right = gpu.ps.EquivariantLocalScore.estimate

    def off(self, z, sigma, labels=None, **options):
        est = right(self, z, sigma, labels, **options)
        return est if self.engine == "reference" else gpu.ps.Estimate(est.mean + 0.01, *list(vars(est).values())[1:])

    monkeypatch.setattr(gpu.ps.EquivariantLocalScore, "estimate", off)
    with pytest.raises(gpu.Wrong, match=r"off by 0\.01"):
        call.error("sliding")
    monkeypatch.setattr(gpu, "first_images", lambda bank, count: bank)
    monkeypatch.setattr(gpu, "BATCH", 1)
    monkeypatch.setattr(gpu, "QUICK", ((3, 0.02), (7, 0.99)))
    bench.section("sliding", gpu.beside_peers, bank, "sliding")
    assert not [row for row in written(tmp_path)["rows"] if row["engine"] == "sliding"]
    assert all("Wrong" in what for what in written(tmp_path)["failed"])

    def other(self, z, sigma, labels=None, **options):
        est = right(self, z, sigma, labels, **options)
        return gpu.ps.Estimate(*list(vars(est).values())[:4], engine="reference")

    monkeypatch.setattr(gpu.ps.EquivariantLocalScore, "estimate", other)
    with pytest.raises(gpu.Wrong, match="reference served"):
        call.work("sliding")()
    capsys.readouterr()


@needs_triton
def test_exact_sums_stand_beside_the_images_of_golddiff(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "GOLDDIFF_CASES", ((3, 0.5),))
    bench = bench_of(gpu, monkeypatch, tmp_path)
    bench.section("golddiff", gpu.chosen_images, gpu.ps.PatchBank(gpu.record.smooth(3, 12, 60)), "sliding")
    rows = written(tmp_path)["rows"]
    assert written(tmp_path)["failed"] == []
    assert [row["engine"] for row in rows] == ["sliding", "GoldDiff's images, sliding"]
    assert rows[1]["rms"] > rows[0]["error"]
    capsys.readouterr()


@needs_triton
def test_rates_of_engines_whose_tests_are_red_are_withheld(gpu, tmp_path):
    rows = [{"section": "peers", "engine": engine, "pairs_per_second": 2e12, "seconds_median": 1.0, "batch": 16}
            for engine in ("fused", "sliding", "gemm")]  # fmt: skip
    steps = [{"step": "tests-fused", "status": "failed"}, {"step": "tests-sliding", "status": "passed"}]
    (tmp_path / "gpu-x.json").write_text(json.dumps({"rows": rows}))
    lines = ["step\tstatus", *(f"{step['step']}\t{step['status']}" for step in steps)]
    (tmp_path / "steps.tsv").write_text("\n".join(lines) + "\n")
    gpu.record.add_steps(tmp_path)
    record = json.loads((tmp_path / "gpu-x.json").read_text())
    table = gpu.tables.gpu_table(record["rows"], gpu.tables.red_engines(record))
    fused, sliding, gemm = table.splitlines()[2:]
    assert "2.000" not in fused
    assert "tests are red" in fused
    assert "2.000" in sliding
    assert "2.000" in gemm


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
def test_the_prototype_of_specialised_warps_compiles_without_spills(gpu):
    program = (
        "import compile_report, specialised\n"
        "used, sass = compile_report.resources(specialised.compiled(64))\n"
        "assert used['spilled_bytes'] == 0 and used['wgmma'] > 0, used\n"
        "assert used['shared_bytes'] <= compile_report.SHARED_LIMIT[90], used\n"
        "assert 'USETMAXREG' in sass and 'UTMALDG' in sass  # warps of different registers, bulk copies\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_clock_and_power_are_medians_of_the_span(gpu):
    import sensors

    found = sensors.Sensors.__new__(sensors.Sensors)
    found.readings = [(t, [1000.0 + t, 300.0, 50.0]) for t in range(10)]
    assert found.between(2, 4) == {"clock_mhz": 1003.0, "power_watts": 300.0, "celsius": 50.0}
    assert found.between(20, 30) == {}


@needs_triton
def test_ceilings_count_what_they_do(gpu):
    works = gpu.ceilings.works(torch.device("cpu"), dry=True)
    assert works["memory_bytes_per_second"][1] == 2 * 2**20
    assert works["l2_bytes_per_second"][1] == 64 * 2**20
    assert works["fp16_multiply_adds_per_second"][1] == 256**3
    assert works["exponentials_per_second"][1] == 2 * 3 * 1024
