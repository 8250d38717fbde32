"""patchscore explain: the mosaic, the page in a real browser, and the memorisation report."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image

import patchscore as ps
from patchscore.cli import main
from patchscore.draw.mosaic import mosaic_rows
from patchscore.draw.pages import explanation_page
from patchscore.explain import explain_samples
from patchscore.memorisation import count_sources
from patchscore.nearest import nearest_images, usual_nearness

ABOUT = {"title": "Which training patches made this image", "lines": ["A test."], "padding_mode": "zeros"}


@pytest.fixture(scope="module")
def bank():
    return ps.PatchBank(smooth_images(20, 3, 12, 10), torch.arange(20) % 3, ("red", "</script><b>green", "blue"))


@pytest.fixture(scope="module")
def samples(bank):
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable([0.1, 1.0, 4.0], [3, 5, 7]))
    return explain_samples(machine, [0, 4], steps=8, labels=[0, 1, None], seed=5, top=5)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, bank):
    folder = tmp_path_factory.mktemp("run")
    np.savez(folder / "bank.npz", images=bank.images.numpy(), labels=bank.labels.numpy())
    words = ["--steps", 6, "--table", 3, "-n", 3, "--labels", "all", "--out", folder / "out"]
    assert run("sample", folder / "bank.npz", *words).exit_code == 0
    return folder


def test_a_walk_is_the_sample_and_its_steps(bank):
    machine = ps.LocalScore(bank, 3)
    (sample,) = explain_samples(machine, [4], levels=[0, 6, 3], top=2, steps=8, labels=[0, 1, None], seed=5)
    images = ps.sample(machine, 5, steps=8, labels=[0, 1, None], seed=5, progress=False)
    torch.testing.assert_close(sample.image, images[4])
    assert (sample.levels, sample.of, sample.label, sample.number) == ((0, 3, 6), 7, 1, 4)
    ratios = ps.get_schedule("cosine", 8).ratios.tolist()
    assert [step.sigma for step in sample.steps] == pytest.approx([ratios[i] for i in sample.levels])
    torch.testing.assert_close(sample.steps[-1].mean[0], sample.image)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser(bank, samples, tmp_path):
    page = tmp_path / "explain.html"
    page.write_text(explanation_page(samples, bank, ABOUT), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"{page.as_uri()}#sample=1&step=3&pixel=2,7")
        assert browser.read("document.title") == ABOUT["title"]

        # What it says is what was found.
        def check(sample, step, row, col):
            of = samples[sample].steps[step]
            weights = of.weight[0, :, row, col]
            worth = [t for t in range(5) if t == 0 or weights[t] >= 0.002]
            links = browser.read("[...document.querySelectorAll('#windows a')].map((a) => a.textContent)")
            numbers = [int(re.match(r"#(\d+)", link)[1]) for link in links]
            assert numbers == [int(of.image[0, t, row, col]) for t in worth]
            assert browser.read("document.querySelector('#pixel').textContent") == (f"Pixel in row {row}, column {col}")
            text = browser.read("document.querySelector('#windows li').innerText")
            assert f"row {int(of.row[0, 0, row, col])}, column {int(of.col[0, 0, row, col])}" in text
            shown = re.search(r"([\d.]+)%", text)[1]
            assert float(shown) == pytest.approx(100 * float(weights[0]), abs=0.6)
            facts = browser.read("document.querySelector('#facts').innerText")
            effective = float(re.search(r"([\d.,]+) windows", facts)[1].replace(",", ""))
            assert effective == pytest.approx(float(of.effective[0, row, col]), rel=0.06)

        check(1, 3, 2, 7)
        # Keys: arrows move, [ and ] step, the slider is one of the browser's own.
        browser.read("document.getElementById('image').focus()")
        for key in ("ArrowDown", "ArrowDown", "ArrowLeft"):
            browser.press(key)
        check(1, 3, 4, 6)
        browser.press("]", "]")
        check(1, 4, 4, 6)
        browser.press("ArrowUp", modifiers=8)
        check(1, 4, 0, 6)
        browser.read("document.getElementById('step').focus()")
        browser.press("ArrowRight")
        assert browser.read("document.getElementById('step').value") in ("4", "5")
        # A pointer picks the pixel under it.
        x, y, width, height = browser.read(
            "(() => { const b = document.getElementById('image').getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]; })()"
        )
        step = int(browser.read("document.getElementById('step').value"))
        browser.click(x + (3.5 / 10) * width, y + (5.5 / 12) * height)
        check(1, step, 5, 3)
        # Another sample, every view, and a link down to a training image.
        browser.read("document.querySelector('#samples button').click()")
        check(0, step, 5, 3)
        for button in range(4):
            browser.read(f"document.querySelectorAll('#views button')[{button}].click()")
        browser.read("document.querySelector('#windows a').click()")
        linked = browser.read("document.activeElement.id")
        assert linked == browser.read("document.querySelector('#windows a').getAttribute('href').slice(1)")
        # Nothing beside the file was asked for, and nothing went wrong.
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert all(url.startswith(("file:", "data:", "about:")) for url in asked)
        assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]

        # A narrow screen: nothing sticks out.
        browser.open(f"{page.as_uri()}#sample=0&step=2&pixel=3,3", width=320, height=700)
        assert browser.read("document.documentElement.scrollWidth") <= 320
        check(0, 2, 3, 3)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_the_page_shows_what_a_pixel_listens_to(bank, tmp_path, padding_mode):
    machine = ps.EquivariantLocalScore(bank, ps.ScaleTable([0.1, 4.0], [3, 7]), padding_mode)
    samples = explain_samples(machine, [0], levels=[0, 2], steps=4, top=2, fields=True)
    page = tmp_path / "explain.html"
    page.write_text(explanation_page(samples, bank, {**ABOUT, "padding_mode": padding_mode}), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        for step in (0, 1):
            fields = samples[0].fields[step]
            browser.open(f"{page.as_uri()}#sample=0&step={step}&pixel=3,8&view=sensitivity")
            assert browser.read("document.querySelector('#views [aria-pressed=true]').textContent") == "depends on"
            a, b = (min(range(4), key=lambda i: abs(at[i] - to)) for at, to in ((fields.rows, 3), (fields.cols, 8)))
            text = browser.read("document.querySelector('#facts').innerText")
            width, row, col = re.search(
                r"about ([\d.]+) . [\d.]+ pixels \(nearest .*: row (\d+), column (\d+)\)", text
            ).groups()
            assert (int(row), int(col)) == (fields.rows[a], fields.cols[b])
            assert float(width) == pytest.approx(float(fields.widths[0, a, b]), rel=0.06)
            # The picture is the map, by the square root of each share: a pixel left of the listener, and above it.
            for y, x in ((0, -1), (-1, 0), (1, 1)):
                r = fields.maps.shape[-1] // 2
                share = float(fields.relative[0, a, b, r + y, r + x]) ** 0.5
                i, j = (fields.rows[a] + y) % 12, (fields.cols[b] + x) % 10
                blue = browser.read(
                    f"(() => {{ const c = document.getElementById('image'), z = c.width / 10;"
                    f" return c.getContext('2d').getImageData({j} * z + z / 2, {i} * z + z / 2, 1, 1).data[2]; }})()"
                )
                assert blue == pytest.approx(share * 31 + (1 - share) * 255, abs=2)
        assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]


def test_the_mosaic_draws_maps_where_they_belong(bank):
    (sample,) = explain_samples(ps.EquivariantLocalScore(bank, 3), [0], levels=[2], steps=4, top=2, fields=True)
    (row,), (fields,) = mosaic_rows(sample, bank), sample.fields
    painted = np.asarray(row.sensitivity).astype(int)
    rows, cols = fields.apart
    assert list(row.outputs) == [(fields.rows[a], fields.cols[b]) for a in rows for b in cols]
    for a in rows:
        for b in cols:
            i, j = fields.rows[a], fields.cols[b]
            share = fields.relative[0, a, b].sqrt().numpy()
            assert np.abs(painted[i - 1 : i + 2, j - 1 : j + 2, 2] - (share * 31 + (1 - share) * 255)).max() <= 1
    shown = 9 * len(rows) * len(cols)
    assert (painted == 226).all(-1).sum() == 12 * 10 - shown


def test_sixteen_images_of_32_x_32_stay_under_five_megabytes():
    """The worst there is: noise, where every window comes from an image of its own."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1500, 3, 32, 32), generator=generator, dtype=torch.uint8)
    bank = ps.PatchBank(noise)
    machine = ps.LocalScore(bank, 1)
    explained = ps.explain(machine, torch.randn(1, 3, 32, 32, generator=generator), 0.3, top=12)
    (sample,) = explain_samples(machine, [0], levels=[0], top=2, steps=3)
    shape = explained.image.shape
    samples = []
    for i in range(16):
        steps = []
        for j in range(8):
            scrambled = torch.randint(0, 1500, shape, generator=generator)
            steps.append(type(explained)(**{**vars(explained), "image": scrambled, "sigma": 1.0 + i + j}))
        samples.append(replace(sample, number=i, levels=tuple(range(8)), of=8, steps=tuple(steps)))
    page = explanation_page(samples, bank, ABOUT)
    assert len(page.encode()) < 5_000_000


def test_names_cannot_break_out_of_the_page(bank, samples):
    page = explanation_page(samples, bank, ABOUT)
    assert page.count("</script>") == 1
    assert "http" not in page
    with pytest.raises(ValueError, match="max_bytes"):
        explanation_page(samples, bank, ABOUT, max_bytes=30_000)
    with pytest.raises(ValueError, match="samples"):
        explanation_page([], bank, ABOUT)


@pytest.mark.parametrize("name", ["<!--<script>", "</script><script>alert(1)</script>", "<!--", "]]>", "<b>\x1b[2J"])
def test_no_class_name_changes_how_the_page_is_parsed(bank, samples, name):
    named = ps.PatchBank(bank.images, bank.labels, (name, "green", "blue"))
    page = explanation_page(samples, named, {**ABOUT, "title": name})
    (line,) = [line for line in page.splitlines() if line.startswith("const DATA = ")]
    assert "<" not in line  # so an HTML parser sees no tag and no comment in it, whatever follows
    assert json.loads(line.removeprefix("const DATA = ").rstrip(";"))["about"]["title"] == name
    assert name in json.loads(line.removeprefix("const DATA = ").rstrip(";"))["sources"]["labels"]


def test_a_bank_of_one_image_is_explained(tmp_path):
    Image.radial_gradient("L").resize((12, 12)).save(tmp_path / "a.png")
    (tmp_path / "one").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "one" / "a.png")
    words = ["--table", 3, "-n", 1, "--steps", 4, "--out", tmp_path / "out"]
    assert run("sample", tmp_path / "one", *words).exit_code == 0
    result = run("explain", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "memorisation.png").is_file()


def test_explain_writes_what_it_promises(sampled):
    out = sampled / "out"
    result = run("explain", out, "--image", 1)
    assert result.exit_code == 0, result.output
    assert "nearest training image" in result.output
    mosaic = Image.open(out / "mosaic.png")
    assert mosaic.width > 400
    assert len(mosaic.convert("RGB").getcolors(1 << 20)) > 50
    assert (out / "explain.html").stat().st_size < 5_000_000
    record = json.loads((out / "run.json").read_text())
    assert [entry["image"] for entry in record["memorisation"]["samples"]] == [1]

    assert run("explain", out, "--image", "all", "--levels", 2).exit_code == 0
    assert (out / "mosaic-000002.png").is_file()
    assert (out / "memorisation.png").is_file()
    record = json.loads((out / "run.json").read_text())
    assert [entry["image"] for entry in record["memorisation"]["samples"]] == [0, 1, 2]
    lines = [json.loads(line) for line in (out / "batches.jsonl").read_text().splitlines()]
    nearest = [entry["nearest"]["image"] for line in lines for entry in line["images"]]
    assert nearest == [entry["nearest"] for entry in record["memorisation"]["samples"]]
    # The run can still be continued.
    again = run("sample", sampled / "bank.npz", "--steps", 6, "--table", 3, "-n", 4, "--labels", "all", "--out", out)
    assert again.exit_code == 0
    assert "3 were there" in again.output
    assert json.loads((out / "run.json").read_text())["memorisation"] == record["memorisation"]


@pytest.mark.parametrize("machine", ["ls", "ideal"])
def test_other_machines_are_explained_too(sampled, tmp_path, machine):
    table = [] if machine == "ideal" else ["--table", 5]
    words = ["--steps", 4, *table, "-n", 1, "--machine", machine, "--out", tmp_path / "out"]
    assert run("sample", sampled / "bank.npz", *words).exit_code == 0
    assert run("explain", tmp_path / "out").exit_code == 0
    if machine == "ideal":
        (entry,) = json.loads((tmp_path / "out" / "run.json").read_text())["memorisation"]["samples"]
        assert entry["sources"] == 1


@pytest.fixture
def indexed(tmp_path):
    """A run through an index that evaluated few enough windows to come out visibly different."""
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    np.savez(tmp_path / "bank.npz", images=smooth_images(200, 3, 12, 10).numpy())
    assert run("index", tmp_path / "bank.npz", "--patch-sizes", 5, "--out", tmp_path / "i").exit_code == 0
    words = ["--steps", 6, "--table", 5, "-n", 2, "--seed", 3, "--index", tmp_path / "i", "--budget", 0.02]
    words += ["--engine", "pruned"]  # exact sums over so few images are faster
    assert run("sample", tmp_path / "bank.npz", *words, "--out", tmp_path / "out").exit_code == 0
    return tmp_path


def test_a_run_with_an_index_is_walked_with_it_and_explained_by_all_windows(sampled, indexed):
    bank = ps.PatchBank.open(indexed / "bank.npz")
    exact = ps.EquivariantLocalScore(bank, 5)
    index = ps.PatchIndex.open(indexed / "i", bank)
    own = ps.EquivariantLocalScore(bank, 5, engine="pruned", index=index, budget=0.02, seed=3)
    result = run("explain", indexed / "out", "--image", 1)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output

    (sample,) = explain_samples(own, [1], top=4, steps=6, seed=3)
    saved = np.load(indexed / "out" / "samples.npy")
    assert np.abs(saved[1] - sample.image.clamp(-1, 1).numpy()).max() < 1e-5
    (other,) = explain_samples(exact, [1], top=4, steps=6, seed=3)
    assert (sample.image - other.image).abs().max() > 0.02  # so the run is not the exact machine's
    assert max(other.apart) < 1e-5
    for step, apart in zip(sample.steps, sample.apart, strict=True):
        again = ps.explain(exact, step.z, step.sigma, top=4)
        assert torch.equal(again.weight, step.weight)
        torch.testing.assert_close(step.mean, exact.denoise(step.z, step.sigma))
        # Its draws go by the bits of z, which is divided by alpha once more here: another sample of the same kind.
        stated = own.estimate(step.z, step.sigma).stderr.square().mean().sqrt()
        assert apart < 3 * float(stated) + 1e-6

    said = "(budget 0.02). Its own noise is shown; weights and denoised images are those of all windows."
    off = f"off by up to {max(sample.apart):.2g} rms"
    page = (indexed / "out" / "explain.html").read_text()
    for text in (result.output, page):
        assert said in text
        assert off in text
    assert "those of all windows" not in run("explain", sampled / "out", "--levels", 1).output


@pytest.mark.parametrize("machine", ["els", "ls"])
def test_a_run_over_a_share_of_the_images_is_walked_over_the_same_ones(sampled, tmp_path, machine):
    out, options = tmp_path / "out", ["--table", 3, "-n", 1, "--steps", 4, "--seed", 2, "--machine", machine]
    assert run("sample", sampled / "bank.npz", *options, "--out", tmp_path / "exact").exit_code == 0
    result = run("sample", sampled / "bank.npz", *options, "--budget", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    drawn, exact = (np.load(folder / "samples.npy") for folder in (out, tmp_path / "exact"))
    assert np.abs(drawn - exact).max() > 0.01
    assert "over a random fraction of the images, budget 0.5" in run("info", out).output
    result = run("explain", out)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output  # so it came out as it had
    assert "evaluated a sample of the windows (budget 0.5)" in result.output


def test_an_index_that_moved_is_told_and_can_be_given(sampled, indexed):
    out = indexed / "out"
    (indexed / "i").rename(indexed / "elsewhere")
    result = run("explain", out)
    assert result.exit_code == 0, result.output
    assert "made with is not there (--index tells where it is now)" in result.output
    assert "came out otherwise" in result.output
    assert "but here without it" in (out / "explain.html").read_text()
    result = run("explain", out, "--index", indexed / "elsewhere")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    # Sizes that were added since are left alone: the run did without them.
    words = ["--table", 3, "-n", 1, "--steps", 4, "--index", indexed / "elsewhere", "--budget", 0.1]
    words += ["--out", indexed / "out3"]
    assert run("sample", indexed / "bank.npz", *words).exit_code == 0
    more = run("index", indexed / "bank.npz", "--patch-sizes", "3", "--out", indexed / "elsewhere")
    assert more.exit_code == 0, more.output
    result = run("explain", indexed / "out3")
    assert "warning" not in result.output

    assert run("index", indexed / "bank.npz", "--patch-sizes", 5, "--seed", 1, "--out", indexed / "j").exit_code == 0
    for words, message in (
        ([out, "--index", indexed / "j"], "j: not the index that the run"),
        ([out, "--index", indexed / "nowhere"], "nowhere: no index here"),
        ([sampled / "out", "--index", indexed / "j"], "was made without one"),
    ):
        result = run("explain", *words)
        assert result.exit_code == 2
        assert message in result.output


def test_what_cannot_be_explained_is_said_in_one_line(sampled, tmp_path):
    np.savez(tmp_path / "other.npz", images=smooth_images(3, 3, 12, 10, seed=9).numpy())
    for words, message in (
        ([tmp_path], "run.json: no such file"),
        ([sampled / "out", "--image", 99], "--image: got 99"),
        ([sampled / "out", "--image", "x"], "--image: got 'x'"),
        ([sampled / "out", "--levels", 0], "--levels"),
        ([sampled / "out", "--top", 0], "top"),
        ([sampled / "out", "--source", tmp_path / "other.npz"], "not the training images of the run"),
    ):
        result = run("explain", *words)
        assert result.exit_code == 2
        assert message in result.output
        assert len([line for line in result.output.splitlines() if "error" in line]) == 1


def test_a_copy_is_at_distance_zero_and_has_one_source(bank):
    images = bank.chunk(3, 5)
    found = nearest_images(images, bank)
    assert found.image.tolist() == [3, 4]
    assert found.rms.tolist() == pytest.approx([0, 0], abs=1e-7)
    others = nearest_images(images, bank, [3, 4])
    apart = (bank.chunk(0, 20) - images[0]).square().mean((1, 2, 3)).sqrt()
    apart[3] = torch.inf
    assert others.image[0] == apart.argmin()
    assert float(others.rms[0]) == pytest.approx(float(apart.min()), abs=1e-6)
    assert (usual_nearness(bank).rms > 0).all()
    distinct, effective = count_sources(ps.explain(ps.IdealScore(bank), images, 0.05, top=2))
    assert distinct.tolist() == [1, 1]
    assert effective.tolist() == pytest.approx([1, 1])


def test_sources_are_counted_by_the_pixels_they_own(bank):
    found = ps.explain(ps.LocalScore(bank, 3), bank.chunk(0, 1) + 0.1 * torch.randn(1, 3, 12, 10), 0.3, top=4)
    owners, share = found.owners()
    i, j = 4, 5
    mass = {}
    for t in range(4):
        number = int(found.image[0, t, i, j])
        mass[number] = mass.get(number, 0) + float(found.weight[0, t, i, j])
    assert int(owners[0, i, j]) == max(mass, key=mass.get)
    assert float(share[0, i, j]) == pytest.approx(max(mass.values()))
    distinct, effective = count_sources(found)
    assert int(distinct) == len(owners.unique())
    assert 1 <= float(effective) <= int(distinct)


def test_the_mosaic_and_a_chart_show_what_pixels_listen_to(sampled):
    out = sampled / "out"
    assert run("explain", out, "--image", 2, "--levels", 3).exit_code == 0
    plain = Image.open(out / "mosaic.png").size
    assert not (out / "sensitivity.png").exists()
    result = run("explain", out, "--image", 2, "--levels", 3, "--sensitivity")
    assert result.exit_code == 0, result.output
    assert Image.open(out / "mosaic.png").width - plain[0] == 10 * 17 + 14  # a column more
    chart = np.asarray(Image.open(out / "sensitivity.png").convert("RGB"))
    assert (chart == (180, 69, 31)).all(-1).sum() > 100  # the line
    assert "depends on" in (out / "explain.html").read_text()
