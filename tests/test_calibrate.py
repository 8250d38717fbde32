"""Calibration finds the table of a "network" that is itself a machine; it resumes, and refuses what is not its own."""

import json

import numpy as np
import pytest
import torch
from conftest import smooth_images

import patchscore as ps
from patchscore.calibrate import Calibration, denoised_by_each


@pytest.fixture
def table():
    ratios = ps.get_schedule("cosine", 8).ratios[:-1].flip(0).tolist()
    return ps.ScaleTable(ratios, [3, 3, 5, 5, 7, 9, 9])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_machine_is_given_its_own_table_back(bank, table, padding_mode, metric):
    network = ps.EquivariantLocalScore(bank, table, padding_mode)
    options = {"n": 3, "steps": 8, "padding_mode": padding_mode, "metric": metric, "labels": [0, None, 2]}
    found = ps.calibrate(network, bank, [9, 3, 7, 5], progress=False, **options)
    assert found.table() == table
    assert found.table("mode") == table
    assert found.patch_sizes == (3, 5, 7, 9)
    assert found.choices.shape == (7, 3)
    best = found.agreement.max(-1)
    np.testing.assert_allclose(best, 1 if metric == "cosine" else 0, atol=1e-4)


def test_a_local_machine_too(bank, table):
    found = ps.calibrate(ps.LocalScore(bank, table), bank, [3, 5, 7, 9], steps=8, n=2, machine="local", progress=False)
    assert found.table() == table


def test_a_wrapped_machine_too(bank, table):
    network = ps.theories.WrappedScore(bank, table)
    options = {"steps": 8, "n": 2, "padding_mode": "circular", "machine": "wrapped", "progress": False}
    found = ps.calibrate(network, bank, [3, 5, 7, 9], **options)
    assert found.table() == table
    assert found.settings["machine"] == "wrapped"
    with pytest.raises(ValueError, match="padding_mode: got 'zeros', the wrapped machine takes circular"):
        ps.calibrate(network, bank, [3], **{**options, "padding_mode": "zeros"})


def test_median_and_mode_of_known_choices():
    sizes = (3, 5, 7)
    choices = torch.tensor([[0, 0, 1, 2], [2, 2, 1, 0], [0, 2, 2, 2]])
    agreement = torch.nn.functional.one_hot(choices, 3).double().numpy()
    found = Calibration([3.0, 2.0, 1.0], sizes, agreement, {})
    assert found.choices.tolist() == [[3, 3, 5, 7], [7, 7, 5, 3], [3, 7, 7, 7]]
    assert found.median == [3, 5, 7]
    assert found.mode == [3, 7, 7]
    assert found.table("mode").sizes == (7, 7, 3)


def test_an_interrupted_calibration_continues(bank, table, tmp_path):
    class Interrupted(ps.LocalScore):
        calls = 0

        def estimate(self, *arguments, **options):
            self.calls += 1
            if self.calls > self.stop:
                raise KeyboardInterrupt
            return super().estimate(*arguments, **options)

    path = tmp_path / "calibration.json"
    options = {"steps": 8, "n": 4, "batch_size": 2, "progress": False, "labels": [0, 1]}
    whole = ps.calibrate(ps.LocalScore(bank, table), bank, [3, 5], **options)
    network = Interrupted(bank, table)
    network.stop = 10
    with pytest.raises(KeyboardInterrupt):
        ps.calibrate(network, bank, [3, 5], resume=path, **options)
    assert Calibration.load(path).agreement.shape == (7, 2, 2)
    network.stop = 10**6
    before = network.calls
    found = ps.calibrate(network, bank, [3, 5], resume=path, **options)
    assert network.calls - before == 1 + 7  # the probe, and the second batch only
    np.testing.assert_allclose(found.agreement, whole.agreement, atol=1e-6)
    again = Calibration.load(path)
    assert again.median == found.median
    assert again.settings == json.loads(json.dumps(found.settings))
    more = ps.calibrate(network, bank, [3, 5], resume=path, **{**options, "n": 5})
    np.testing.assert_allclose(more.agreement[:, :4], found.agreement, atol=1e-12)


def test_another_calibrations_file_is_refused_by_name(bank, table, tmp_path):
    path = tmp_path / "calibration.json"
    options = {"steps": 4, "n": 1, "progress": False, "resume": path}
    network = ps.LocalScore(bank, table)
    ps.calibrate(network, bank, [3, 5], **options)
    for change, message in (
        ({"seed": 1}, "seed"),
        ({"metric": "l2"}, "metric"),
        ({"labels": [0]}, "labels"),
        ({"steps": 5}, "steps or patch sizes"),
    ):
        with pytest.raises(ValueError, match=rf"calibration\.json.*{message}"):
            ps.calibrate(network, bank, [3, 5], **{**options, **change})
    with pytest.raises(ValueError, match="another network"):
        ps.calibrate(ps.IdealScore(bank), bank, [3, 5], **options)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"calibration\.json: not a usable calibration"):
        ps.calibrate(network, bank, [3, 5], **options)


def test_engines_that_sum_for_several_sizes_at_once_are_asked_once(bank, monkeypatch):
    from patchscore.engines import reference

    asked = []

    def posterior_sums(self, z, sigma, bank, competitions, memory_limit):
        asked.append([competition.patch_size for competition in competitions])
        return [reference.Reference().posterior_sum(z, sigma, bank, one, memory_limit) for one in competitions]

    machines = [ps.EquivariantLocalScore(bank, k, engine="reference") for k in (3, 5)]
    z = torch.randn(3, *bank.shape)
    alone = denoised_by_each(machines, z, 0.7, [0, 1, None])
    monkeypatch.setattr(reference.Reference, "posterior_sums", posterior_sums)
    together = denoised_by_each(machines, z, 0.7, [0, 1, None])
    assert asked == [[3, 5]] * 3
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patch_sizes": [4]}, ValueError, "patch_sizes"),
        ({"patch_sizes": []}, ValueError, "patch_sizes"),
        ({"n": 0}, ValueError, "n:"),
        ({"metric": "dot"}, ValueError, "metric"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode"),
        ({"machine": "local", "padding_mode": "circular"}, ValueError, "padding_mode"),
        ({"network": lambda x: x}, TypeError, "network"),
        ({"bank": ps.PatchBank(smooth_images(2, 1, 8, 8))}, ValueError, "network"),
        ({"labels": "blue whale"}, ValueError, "unknown label"),
    ],
)
def test_bad_input_is_named(bank, options, error, message):
    good = {"network": ps.LocalScore(bank, 3), "bank": bank, "patch_sizes": [3], "n": 1, "steps": 4, "progress": False}
    with pytest.raises(error, match=message):
        ps.calibrate(**{**good, **options})


def test_a_changed_calibration_is_refused_by_its_path(tmp_path):
    """One digit of one agreement would otherwise choose another patch size without a word."""
    found = Calibration([1.0], (3, 5), np.array([[[0.25, 0.5]]]), {})
    found.save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    assert Calibration.load(tmp_path / "c.json").median == [5]
    (tmp_path / "c.json").write_text(text.replace("0.25", "0.75"))
    with pytest.raises(ValueError, match=r"c\.json: not a usable calibration: was changed since it was written"):
        Calibration.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"c\.json: not a usable calibration: nested too deeply"):
        Calibration.load(tmp_path / "c.json")


def test_a_damaged_table_is_refused_by_its_path(tmp_path):
    ps.ScaleTable([1.0], [3]).save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    for content in ("[" * 100_000, text.replace("1.0", "1" * 400), text.replace("1.0", "1e999"), "{}"):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match=r"t\.json: not a usable scale table"):
            ps.ScaleTable.load(tmp_path / "t.json")
