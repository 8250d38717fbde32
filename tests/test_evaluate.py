"""compare: a machine agrees with itself, figures are what numpy makes of them, and reports hold together."""

import json

import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore.evaluate import bootstrap_interval, correlation


def test_a_machine_agrees_with_itself(bank):
    machine = ps.EquivariantLocalScore(bank, 3)
    found = ps.compare(machine, machine, n=3, steps=5, labels=[0, 1], batch_size=2, progress=False)
    (of,) = found.machines.values()
    torch.testing.assert_close(of.r2, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(of.mse, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(of.step_r2, torch.ones(4, 3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert found.labels == [0, 1, 0]
    assert torch.equal(found.images, ps.sample(machine, 3, steps=5, labels=[0, 1], progress=False))


def test_images_and_figures_are_those_of_sampling_each(bank):
    network, machine = ps.LocalScore(bank, 5), ps.IdealScore(bank)
    found = ps.compare(network, {"ideal": machine}, n=4, steps=6, seed=3, first=2, progress=False)
    a = ps.sample(network, 4, steps=6, seed=3, first=2, progress=False)
    b = ps.sample(machine, 4, steps=6, seed=3, first=2, progress=False)
    of = found.machines["ideal"]
    assert torch.equal(of.images, b)
    for i in range(4):
        r = np.corrcoef(a[i].flatten().double().numpy(), b[i].flatten().double().numpy())[0, 1]
        assert of.correlation[i] == pytest.approx(r, abs=1e-9)
        assert of.r2[i] == pytest.approx(r**2, abs=1e-9)
        assert of.mse[i] == pytest.approx(float(((a[i] - b[i]) ** 2).mean()), abs=1e-6)
    (row,) = found.rows()
    assert row["r2_median"] == pytest.approx(np.median(of.r2))
    low, high = row["r2_interval"]
    assert low <= row["r2_median"] <= high


def test_steps_are_compared_along_the_networks_own_walk(bank):
    network, machine = ps.LocalScore(bank, 5), ps.LocalScore(bank, 3)
    steps = []
    ps.sample(network, 2, steps=5, callback=steps.append, progress=False)
    found = ps.compare(network, machine, n=2, steps=5, progress=False)
    (of,) = found.machines.values()
    for step in steps:
        x0 = machine.denoise(step.x / step.alpha, step.sigma / step.alpha)
        torch.testing.assert_close(of.step_r2[step.index], correlation(x0, step.x0) ** 2)
    (without,) = ps.compare(network, machine, n=2, steps=5, along=False, progress=False).machines.values()
    assert without.step_r2.isnan().all()
    assert torch.equal(without.r2, of.r2)


def test_the_report_is_json_and_complete(bank, tmp_path):
    found = ps.compare(ps.LocalScore(bank, 5), ps.baselines(bank, ps.ScaleTable.constant(3)), 2, 4, progress=False)
    assert list(found.machines) == ["els-zeros", "els-circular", "local", "ideal", "gaussian"]
    found.save(tmp_path / "report.json")

    def refuse(name):
        raise AssertionError(name)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert [row["machine"] for row in report["rows"]] == list(found.machines)
    assert report["images"]["ideal"]["r2"] == found.machines["ideal"].r2.tolist()
    assert len(report["sigmas"]) == 3
    assert report["settings"]["n"] == 2


def test_baselines_of_large_patches_fit_the_circle(bank):
    machines = ps.baselines(bank, ps.ScaleTable([0.5, 2.0], [3, 17]))
    assert machines["els-circular"].patch_size.sizes == (3, 9)
    assert machines["els-zeros"].patch_size.sizes == (3, 17)


def test_correlation_of_a_constant_image_is_zero():
    a = torch.zeros(2, 1, 3, 3)
    a[1, 0, 0, 0] = 1
    assert correlation(a, a).tolist() == pytest.approx([0, 1])


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.normal(size=31))
        covered += low <= 0 <= high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n:"),
        ({"machines": {}}, ValueError, "machines"),
        ({"machines": {"mine": 3}}, TypeError, "mine"),
        ({"network": "resnet"}, TypeError, "network"),
        ({"machines": ps.IdealScore(ps.PatchBank(torch.zeros(2, 1, 8, 8)))}, ValueError, "IdealScore"),
        ({"sampler": "rk4"}, ValueError, "sampler"),
    ],
)
def test_bad_input_is_named(bank, options, error, message):
    good = {"network": ps.LocalScore(bank, 3), "machines": ps.IdealScore(bank), "n": 1, "steps": 4, "progress": False}
    with pytest.raises(error, match=message):
        ps.compare(**{**good, **options})
