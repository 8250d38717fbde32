"""compare: a machine agrees with itself, figures are what numpy makes of them, and reports hold together."""

import csv
import json

import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore.evaluate import (
    FIGURES,
    THEORIES,
    Agreement,
    Comparison,
    bootstrap_interval,
    correlation,
    figures_of,
    theories_named,
)


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
    assert row["correlation_squared_median"] == pytest.approx(np.median(of.r2))
    low, high = row["correlation_squared_interval"]
    assert low <= row["correlation_squared_median"] <= high


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


def test_each_figure_is_what_its_name_says():
    """Against numpy, one image after the other; the three that papers print as r^2 differ."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(5, 3, 4, 4, generator=generator) * 2 - 1
    x = 0.5 * y + 0.4 * torch.randn(y.shape, generator=generator)  # beyond [-1, 1] too
    found = figures_of(x, y)
    assert list(found) == list(FIGURES)
    for i in range(5):
        a, b = x[i].double().numpy().ravel(), y[i].double().numpy().ravel()
        r = np.corrcoef(a, b)[0, 1]
        assert found["correlation"][i] == pytest.approx(r)
        assert found["correlation_squared"][i] == pytest.approx(r**2)
        assert found["determination"][i] == pytest.approx(1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum())
        assert found["mse"][i] == pytest.approx(((a - b) ** 2).mean())
        unit = [np.clip((part + 1) / 2, 0, 1) for part in (a, b)]
        assert found["mse_unit"][i] == pytest.approx(((unit[0] - unit[1]) ** 2).mean())
    inverted = figures_of(-y, y)
    assert inverted["correlation_squared"].min() > 0.999
    assert inverted["determination"].max() < 0
    flat = torch.zeros(1, 1, 2, 2)
    assert figures_of(flat, flat)["determination"].item() == 1
    assert figures_of(flat + 0.5, flat)["determination"].item() == -np.inf
    assert figures_of(flat + 0.5, flat)["mse"].item() == 4 * figures_of(flat + 0.5, flat)["mse_unit"].item() == 0.25


def made_up(figures):
    """A Comparison whose machines have these squared correlations, and errors of one minus them."""
    machines = {}
    for name, values in figures.items():
        values = torch.tensor(values, dtype=torch.float64)
        parts = {figure: values if of.more_is_nearer else 1 - values for figure, of in FIGURES.items()}
        steps = {figure: torch.stack([part, part]) for figure, part in parts.items()}
        machines[name] = Agreement(torch.zeros(len(values), 1, 2, 2), parts, steps)
    n = len(values)
    return Comparison(torch.zeros(n, 1, 2, 2), machines, [2.0, 1.0], None, {})


def test_paired_differences_tell_what_medians_do_not():
    """A machine that is nearer by 0.01 in every image, beside images that differ by far more."""
    of_images = np.random.default_rng(0).uniform(0.2, 0.9, 30)
    found = made_up({"b": of_images, "a": of_images + 0.01, "c": np.random.default_rng(1).permutation(of_images)})
    assert found.league() == ["a", "b", "c"] or found.league()[0] == "a"
    rows = {(row["first"], row["second"]): row for row in found.differences()}
    row = rows["a", "b"]
    assert (row["nearer"], row["wins"]) == ("a", 1.0)
    assert row["median"] == pytest.approx(0.01)
    assert row["interval"] == pytest.approx([0.01, 0.01])
    other = next(row for pair, row in rows.items() if set(pair) == {"b", "c"})
    assert other["nearer"] is None
    assert other["interval"][0] < 0 < other["interval"][1]
    by_error = {(row["first"], row["second"]): row for row in found.differences("mse")}["a", "b"]
    assert (by_error["nearer"], by_error["wins"]) == ("a", 1.0)
    assert by_error["median"] == pytest.approx(-0.01)
    few = made_up({"a": of_images[:5] + 0.01, "b": of_images[:5]}).differences()[0]
    assert (few["nearer"], few["wins"]) == (None, 1.0)
    same = made_up({"a": of_images, "b": of_images}).differences()[0]
    assert (same["nearer"], same["wins"], same["interval"]) == (None, 0.5, [0, 0])


def test_rows_and_csv_hold_every_figure_and_step(tmp_path):
    found = made_up({"a": [0.5, 0.7, 0.9], "b": [0.1, 0.2, 0.3]})
    rows = found.rows()
    assert rows[0]["correlation_squared_median"] == 0.7
    assert rows[0]["step_mse_median"] == pytest.approx([0.3, 0.3])
    low, high = rows[0]["step_mse_interval"][1]
    assert low <= 0.3 <= high
    found.save_csv(tmp_path / "league.csv")
    lines = list(csv.DictReader((tmp_path / "league.csv").read_text().splitlines()))
    assert len(lines) == 2 * len(FIGURES) * (1 + 2)
    (line,) = (
        of for of in lines if (of["machine"], of["figure"], of["place"]) == ("b", "correlation_squared", "image")
    )
    assert float(line["median"]) == 0.2
    assert line["sigma"] == ""
    assert {of["sigma"] for of in lines if of["place"] == "1"} == {"1.0"}


class Counted(ps.LocalScore):
    """A machine that counts its calls, and is interrupted at one of them."""

    calls, stop = 0, 10**9

    def estimate(self, *arguments, **options):
        self.calls += 1
        if self.calls > self.stop:
            raise KeyboardInterrupt
        return super().estimate(*arguments, **options)


def test_an_interrupted_comparison_continues_and_takes_more(bank, tmp_path):
    path = tmp_path / "comparison.npz"
    network, options = ps.LocalScore(bank, 5), {"steps": 4, "labels": [0, 1], "batch_size": 2, "progress": False}
    whole = ps.compare(network, {"a": Counted(bank, 3), "b": ps.IdealScore(bank)}, n=4, **options)
    machine = Counted(bank, 3)
    machine.stop = 1 + 6 + 2  # the probe, a batch of three steps twice, and a part of the next
    with pytest.raises(KeyboardInterrupt):
        ps.compare(network, {"a": machine, "b": ps.IdealScore(bank)}, n=4, resume=path, **options)
    machine.calls, machine.stop = 0, 10**9
    found = ps.compare(network, {"a": machine, "b": ps.IdealScore(bank)}, n=4, resume=path, **options)
    assert machine.calls == 1 + 6  # the second batch alone
    for name in ("a", "b"):
        assert torch.equal(found.machines[name].images, whole.machines[name].images)
        for figure in FIGURES:
            assert torch.equal(found.machines[name].figures[figure], whole.machines[name].figures[figure])
            assert torch.equal(found.machines[name].steps[figure], whole.machines[name].steps[figure])
    assert torch.equal(found.images, whole.images)

    # More images in other batches, another machine, fewer again.
    machine.calls = 0
    more = ps.compare(
        network,
        {"a": machine, "c": ps.LocalScore(bank, 7)},
        n=5,
        resume=path,
        **{**options, "batch_size": 3},
    )
    assert machine.calls == 1 + 6
    assert torch.equal(more.machines["a"].images[:4], found.machines["a"].images)
    assert len(more.machines["c"].images) == len(more.images) == 5
    machine.calls = 0
    fewer = ps.compare(network, {"b": ps.IdealScore(bank), "a": machine}, n=2, resume=path, **options)
    assert machine.calls == 1
    assert torch.equal(fewer.machines["a"].images, found.machines["a"].images[:2])
    assert len(fewer.images) == 2


def test_another_comparisons_file_is_refused_by_name(bank, tmp_path):
    path = tmp_path / "comparison.npz"
    network = ps.LocalScore(bank, 5)
    options = {"n": 1, "steps": 3, "resume": path, "progress": False}
    ps.compare(network, {"a": ps.IdealScore(bank)}, **options)
    for change, message in (({"seed": 1}, "seed"), ({"along": False}, "along"), ({"labels": [0]}, "labels")):
        with pytest.raises(ValueError, match=rf"comparison\.npz: holds a comparison of {message}"):
            ps.compare(network, {"a": ps.IdealScore(bank)}, **{**options, **change})
    with pytest.raises(ValueError, match="of another network"):
        ps.compare(ps.IdealScore(bank), {"a": ps.IdealScore(bank)}, **options)
    with pytest.raises(ValueError, match="with another a"):
        ps.compare(network, {"a": ps.LocalScore(bank, 3)}, **options)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    for damaged in (bytes(content), b"", b"{}\n", content[:100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"comparison\.npz: no comparison to go on from"):
            ps.compare(network, {"a": ps.IdealScore(bank)}, **options)


def test_all_theories_can_be_named(bank):
    machines = theories_named(THEORIES, bank, ps.ScaleTable.constant(3))
    assert list(machines) == list(THEORIES)
    found = ps.compare(machines["ideal"], machines, n=1, steps=3, progress=False)
    assert found.league("mse")[0] == "ideal"
    with pytest.raises(ValueError, match="theories: got 'magic'"):
        theories_named(["magic"], bank, ps.ScaleTable.constant(3))


def test_the_report_is_json_and_complete(bank, tmp_path):
    found = ps.compare(ps.LocalScore(bank, 5), ps.baselines(bank, ps.ScaleTable.constant(3)), 2, 4, progress=False)
    assert list(found.machines) == ["els-zeros", "els-circular", "local", "ideal", "gaussian"]
    found.save(tmp_path / "report.json")

    def refuse(name):
        raise AssertionError(name)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert [row["machine"] for row in report["rows"]] == list(found.machines)
    assert report["images"]["ideal"]["correlation_squared"] == found.machines["ideal"].r2.tolist()
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
