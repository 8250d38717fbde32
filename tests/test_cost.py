"""The cost model against what it was made of: published kernels, counts of machine code, and the kernels' own tiles."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import smooth_images

import patchscore as ps
from patchscore import engines
from patchscore.engines import cost
from patchscore.engines.fused import launch
from patchscore.engines.fused.launch import Fused
from patchscore.engines.sliding.cuda import SlidingCuda

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def pairs_per_second(teraflops: float, head: int) -> float:
    """Attention counts four operations a number of the head and pair."""
    return teraflops * 1e12 / (4 * head)


@pytest.mark.parametrize("head", [64, 128, 256])
def test_published_attention_kernels_lie_in_the_ranges_taken_from_them(head):
    shared = cost.attention(head, cluster=1 if head == 64 else 2)
    low, high = cost.rate(shared, cost.H100, cost.SPECIALISED)
    assert low <= pairs_per_second(cost.PUBLISHED["FlashAttention-3"][head], head) <= high
    if head in cost.PUBLISHED["Triton"]:
        low, high = cost.rate(cost.attention(head), cost.H100, cost.TRITON)
        measured = pairs_per_second(cost.PUBLISHED["Triton"][head], head)
        assert low * 0.99 <= measured <= high * 1.01


def test_flash_attention_3_at_head_size_64_does_1_94e12_pairs_a_second():
    assert pairs_per_second(cost.PUBLISHED["FlashAttention-3"][64], 64) == pytest.approx(1.94e12, rel=2e-3)


@pytest.mark.parametrize(
    ("columns", "patches", "bytes_a_pair", "allowed"),  # 64 patches and whole rows up to 256 columns, then blocks
    [(64, 64, 1.25, 4.4e12), (256, 64, 4.25, 1.3e12), (320, 128, 10.25, 0.54e12), (896, 128, 28.25, 0.19e12),
     (1792, 64, 84.25, 0.065e12)],
)  # fmt: skip
def test_l2_bytes_are_those_of_the_tiles(columns, patches, bytes_a_pair, allowed):
    work = cost.fused(columns, tile=(128, patches), whole=columns <= 256).scaled(1 / (1 + cost.PILOT))
    assert work.l2_bytes == pytest.approx(bytes_a_pair)
    assert cost.H100.l2_rate / work.l2_bytes == pytest.approx(allowed, rel=0.03)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("title", ["rank 61", "rank 253", "k = 17, pixels"])
def test_instructions_are_those_counted_in_the_machine_code(title):
    import compile_report

    plan = compile_report.PLANS[title]
    configuration = launch.configurations(plan, (9, 0), False)[0]
    row = compile_report.report(title, plan, configuration, 90)
    work = cost.fused(plan.columns).scaled(1 / (1 + cost.PILOT))  # the pilot is another loop
    assert work.instructions == pytest.approx(row["per_pair"], rel=0.2)
    assert work.exponentials == row["exponentials_per_pair"]
    assert work.l2_bytes == row["l2_bytes_per_pair"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sliding_counts_are_those_of_the_machine_code(channels):
    rows = json.loads((RESULTS / "sliding_cuda_sass.json").read_text())["rows"]
    bank = ps.PatchBank(torch.zeros(1, channels, 32, 32))
    for row in (row for row in rows if row["channels"] == channels):
        competition = ps.EquivariantLocalScore(bank, row["k"], padding_mode="circular").competition(row["k"])
        work = cost.sliding(competition, bank.shape)
        assert work.instructions == pytest.approx(row["instructions_per_pair"], rel=0.05)


@dataclass(frozen=True)
class Plan:
    columns: int
    size: int = 0
    exact: bool = False
    pilot: bool = True


def fastest(competition, plan, images=50_000, batch=16, shape=(3, 32, 32), device=cost.H100):
    """The engine that takes less, by group."""
    chosen = {}
    for group in competition.groups:
        dense = cost.fused_seconds(device, group, images, batch, plan)
        slides = cost.sliding_seconds(device, competition.only([group]), images, batch, shape)
        chosen[group] = "fused" if dense <= slides else "sliding"
    return chosen


def competition_of(k, mode):
    return ps.EquivariantLocalScore(ps.PatchBank(torch.zeros(1, 3, 32, 32)), k, padding_mode=mode).competition(k)


@pytest.mark.parametrize("device", [cost.H100, cost.H200, cost.A100], ids=lambda device: device.name)
def test_few_columns_go_to_fused_and_wide_patches_to_sliding(device):
    assert set(fastest(competition_of(5, "circular"), Plan(64), device=device).values()) == {"fused"}
    assert set(fastest(competition_of(17, "circular"), Plan(896), device=device).values()) == {"sliding"}
    assert set(fastest(competition_of(17, "circular"), Plan(1792, 867, True, False), device=device).values()) == {
        "sliding"
    }


def test_the_choice_changes_once_as_columns_grow():
    competition = competition_of(17, "circular")
    chosen = [next(iter(fastest(competition, Plan(columns)).values())) for columns in range(64, 1793, 64)]
    assert chosen[0] == "fused"
    assert chosen[-1] == "sliding"
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("batch", [1, 16])
def test_groups_locked_on_both_axes_go_to_sliding(batch):
    chosen = fastest(competition_of(7, "zeros"), Plan(64), batch=batch)
    corners = [group for group in chosen if group.rows.locked and group.cols.locked]
    assert len(corners) == 4
    assert {chosen[group] for group in corners} == {"sliding"}
    local = ps.LocalScore(ps.PatchBank(torch.zeros(1, 3, 32, 32)), 5).competition(5)
    assert set(fastest(local, Plan(64), batch=batch).values()) == {"sliding"}


def test_filler_rows_of_locked_coordinates_are_counted():
    (edge,) = [g for g in competition_of(7, "zeros").groups if g.rows.locked and not g.cols.locked][:1]
    few, filled = (cost.fused_seconds(cost.H100, edge, images, 1, Plan(320)) for images in (1, 4))
    assert few == pytest.approx(filled)  # 26 and 104 windows fill the same 128 rows


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "known"),
    [("NVIDIA H100 80GB HBM3", (9, 0), 132, cost.H100), ("NVIDIA H200", (9, 0), 132, cost.H200),
     ("NVIDIA A100-SXM4-80GB", (8, 0), 108, cost.A100), ("NVIDIA H100 PCIe", (9, 0), 114, cost.H100)],
)  # fmt: skip
def test_devices_are_known_by_name_and_size(name, capability, multiprocessors, known):
    device = cost.device_of(name, capability, multiprocessors, 80 * 2**30)
    assert device.units == pytest.approx(known.units * multiprocessors / known.multiprocessors)
    assert device.memory_rate == pytest.approx(known.memory_rate * multiprocessors / known.multiprocessors)


# What the engines say of themselves, on a CPU that the model takes for an H100.


@pytest.mark.parametrize(
    ("k", "sigma", "padding", "expected"),
    [(3, 0.5, "circular", "fused"), (17, 0.5, "circular", "sliding"), (17, 0.02, "circular", "sliding")],
)
def test_engines_expect_what_the_model_says(k, sigma, padding, expected, monkeypatch):
    monkeypatch.setattr(cost, "known", lambda device: cost.H100)
    bank = ps.PatchBank(smooth_images(40, 3, 32, 32))
    competition = ps.EquivariantLocalScore(bank, k, padding_mode=padding).competition(k)
    z, levels = torch.zeros(16, 3, 32, 32), torch.full((16,), sigma, dtype=torch.float64)
    seconds = {engine.name: engine.seconds(z, levels, bank, competition) for engine in (Fused(), SlidingCuda())}
    assert min(seconds, key=seconds.get) == expected
    assert seconds["sliding"] == cost.sliding_seconds(cost.H100, competition, 40, 16, (3, 32, 32))


def test_engines_expect_nothing_of_a_device_that_is_not_known():
    bank = ps.PatchBank(smooth_images(2, 1, 8, 8))
    competition = ps.EquivariantLocalScore(bank, 3, padding_mode="circular").competition(3)
    arguments = torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.float64), bank, competition
    found = {type(engine).__name__: engine.seconds(*arguments) for engine in engines.EXACT}
    # What `pruned` is held to on the CPU: 64 pixels, 36 windows in each of two images.
    assert found.pop("SlidingCpu") == pytest.approx(64 * 72 * 0.9e-9)
    assert set(found.values()) == {None}
