"""Results as they show themselves: one line in a terminal, a picture in a notebook; and the notebook of the tour."""

import base64
import html
import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import noisy
from PIL import Image

import patchscore as ps

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def shown(bank):
    machine = ps.EquivariantLocalScore(bank, 3)
    z = noisy(bank, 0.5, batch=2)
    estimate = machine.estimate(z, 0.5)
    spread = torch.rand(estimate.stderr.shape, generator=torch.Generator().manual_seed(0))
    sampled = type(estimate)(estimate.mean, 0.1 * spread / spread.max(), estimate.ess, estimate.pairs, "pruned")
    comparison = ps.compare(ps.IdealScore(bank), {"a <b>": machine}, n=2, steps=3, progress=False)
    return [
        (estimate, r"Estimate\(2 x 3 x 12 x 10, stderr to 0, ess [\d.]+ to [\d.]+, [\d,]+ pairs by \w+\)", 1),
        (sampled, r"Estimate\(2 x 3 x 12 x 10, stderr to 0\.1, .* by pruned\)", 2),
        (
            ps.explain(machine, z, 0.5, top=4),
            r"Explanation\(4 windows for each of 12 x 10 pixels of 2, sigma 0\.5, patch size 3, [\d.]+% .*\)",
            3,
        ),
        (
            ps.explain(ps.IdealScore(bank), z, 0.5, top=4, pixel=(2, 3)),
            r"Explanation\(4 windows for each of 1 x 1 pixels of 2, sigma 0\.5, whole images, .*\)",
            0,
        ),
        (comparison, r"Comparison\(2 images, median r\^2: a <b> [\d.]+\)", 1),
    ]


def test_results_are_one_line_in_a_terminal_and_pictures_in_a_notebook(bank):
    for result, line, pictures in shown(bank):
        assert re.fullmatch(line, repr(result)), repr(result)
        page = result._repr_html_()
        assert html.escape(repr(result)) in page
        assert "<b>" not in page
        found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        assert len(found) == pictures
        for data in found:
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert len(image.convert("RGB").getcolors(1 << 20)) > 3
    one = ps.EquivariantLocalScore(bank, 3).estimate(noisy(bank, 0.5), 0.5)
    page = one._repr_html_()
    data = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert Image.open(io.BytesIO(data)).size == ((10 + 4) * 10, (12 + 4) * 10)  # magnified to about a hundred pixels


def test_the_tour_runs_cell_by_cell(tmp_path, monkeypatch):
    """Its code, in one namespace and on fewer training images; what it displays is made too."""
    monkeypatch.chdir(tmp_path)
    opened = ps.PatchBank.open.__func__
    monkeypatch.setattr(ps.PatchBank, "open", classmethod(lambda cls, *a, **k: opened(cls, *a, **{**k, "limit": 60})))
    notebook = json.loads(TOUR.read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    names = {}
    torch.manual_seed(0)
    for cell in cells:
        *body, last = cell.strip().splitlines()
        try:
            code = compile(last, "tour", "eval")
        except SyntaxError:
            exec(compile(cell, "tour", "exec"), names)
            continue
        exec(compile("\n".join(body), "tour", "exec"), names)
        result = eval(code, names)
        if hasattr(result, "_repr_html_"):
            assert "<img" in result._repr_html_()
    assert all(not cell.get("outputs") for cell in notebook["cells"])  # kept without what they printed


@pytest.mark.parametrize("cell", ["markdown", "code"])
def test_the_tour_has_words_and_code(cell):
    assert sum(c["cell_type"] == cell for c in json.loads(TOUR.read_text())["cells"]) >= 5
