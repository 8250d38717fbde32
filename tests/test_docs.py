"""README and docs/ are true: code and commands run, on few images; generated pages are fresh; links lead somewhere."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import smooth_images
from PIL import Image
from safetensors.torch import save_file

import patchscore as ps
from patchscore.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
}
FEW = 12
"""Training images that a documented command or program gets, whatever it asks for."""


def blocks(page, *languages):
    return re.findall(rf"^ *```(?:{'|'.join(languages)})\n(.*?)^ *```", PAGES[page], re.DOTALL | re.MULTILINE)


def test_every_block_says_what_it_is():
    for page, text in PAGES.items():
        fences = re.findall(r"^ *```(\S*)", text, re.MULTILINE)
        assert set(fences[::2]) <= {"python", "py", "sh", "text"}, page
        assert set(fences[1::2]) <= {""}, page


# Programs.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "py")])
def test_the_code_runs_from_top_to_bottom(page, few_images, monkeypatch, capsys):
    code = blocks(page, "python", "py")
    if any("diffusers" in block for block in code):
        pytest.importorskip("diffusers.pipelines.ddim.pipeline_ddim", reason="diffusers cannot be imported")
    if any("PatchIndex" in block for block in code):
        pytest.importorskip("faiss", reason="FAISS cannot be imported")
    names = {}
    for block in code:
        exec(block, names)
    # Not only without an error: what they make has the shape of images, and is finite.
    made = [value for value in names.values() if isinstance(value, ps.Estimate)]
    tensors = [of.mean for of in made] + [names[name] for name in ("images", "x0", "predicted") if name in names]
    for tensor in tensors:
        if not isinstance(tensor, list):
            assert tensor.ndim == 4
            assert tensor.isfinite().all()


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    """An empty folder with the examples beside it, where PatchBank.open gives a few images only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    opened = ps.PatchBank.open.__func__

    def open_few(cls, source, *args, limit=None, **options):
        return opened(cls, source, *args, limit=min(limit or FEW, FEW), **options)

    monkeypatch.setattr(ps.PatchBank, "open", classmethod(open_few))
    return tmp_path


# Commands.


def commands():
    """Every line of every sh block, once, with the page it is on."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if words := shlex.split(part, comments=True):
                        found.setdefault(tuple(words), page)
    return found


ORDER = ("bank", "index", "sample", "synthesize", "calibrate", "compare", "likelihood", "explain", "evaluate", "info")
"""What one needs of another comes first."""

SHARED = ("fashion-mnist", "--labels", "all")


def order(words):
    return any(word.startswith("calibrated/") for word in words), ORDER.index(words[0]), "all" in words


CHEAPER = {
    "sample": ["--steps", "3", "--overwrite", "-n", "1"],
    "calibrate": ["--steps", "3", "-n", "1", "--patch-sizes", "3,5"],
    "compare": ["--steps", "3", "-n", "1"],
    "explain": ["--levels", "1"],
    "likelihood": ["-n", "1", "--steps", "2"],
    "synthesize": ["--steps", "1", "--overwrite"],
}


@pytest.mark.filterwarnings("ignore")
def test_patchscore_commands_run(few_images):
    pytest.importorskip("faiss", reason="FAISS cannot be imported")
    wanted = [words[1:] for words in commands() if words[0] == "patchscore" and words[1] != "bench"]
    assert {words[0] for words in wanted} == set(main.commands) - {"bench"}
    for i, image in enumerate(smooth_images(6, 3, 40, 44).numpy()):
        folder = few_images / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.jpg")
    Image.fromarray(smooth_images(1, 3, 20, 24)[0].numpy().transpose(1, 2, 0)).save(few_images / "photo.jpg")
    np.savez("cifar.npz", images=smooth_images(12, 3, 28, 28).numpy(), labels=np.arange(12) % 2)
    np.savez("test.npz", images=smooth_images(2, 3, 28, 28, seed=1).numpy(), labels=np.arange(2))
    (few_images / "more").symlink_to(few_images / "photos")
    (few_images / "held-out").mkdir()
    Image.fromarray(smooth_images(1, 1, 28, 28, seed=1)[0, 0].numpy()).save(few_images / "held-out" / "0.png")
    latents = smooth_images(6, 4, 12, 12, dtype=torch.float32)
    save_file({"latents": 5 * latents.contiguous()}, few_images / "latents.safetensors")
    (few_images / "autoencoder.py").write_text("def decode(latents):\n    return latents[:, :3] / 5\n")
    (few_images / "mymodels.py").write_text(
        "import patchscore as ps\n\n\ndef denoiser(bank):\n    return ps.GaussianScore(bank)\n\n\n"
        "def features(images):\n    return images.flatten(1)[:, ::50]\n"
    )
    # What takes files that were moved, a network's weights or its features is only held against the options, below.
    elsewhere = ("moved/", "inception", "--sample-features")
    wanted = [words for words in wanted if not any(word.startswith(elsewhere) for word in words)]
    for number, words in enumerate(sorted(wanted, key=order)):
        cheaper = list(CHEAPER.get(words[0], []))
        # Each in a folder of its own, but for the run that others go on from, which has the images that they name.
        cheaper += ["-n", "8"] if words[1:] == SHARED else []
        if words[0] in CHEAPER and words[0] != "explain" and "--out" not in words and words[1:] != SHARED:
            cheaper += ["--out", f"other-{number}"]
        if words[0] == "index" and "--table" in words:
            words = [*words[: words.index("--table")], "--patch-sizes", "3,5", *words[words.index("--table") + 2 :]]
        done = CliRunner().invoke(main, [*words, *cheaper])
        assert done.exit_code == 0, f"patchscore {shlex.join(words)}: {done.output}"
    assert (few_images / "out" / "explain.html").exists()
    assert (few_images / "calibrated" / "table.json").exists()


def makefile_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_what_the_makefile_lists_it_can_make():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    explained = re.findall(r"^# make ([a-z-]+) ", text, re.MULTILINE)
    assert set(phony.split()) | set(explained) <= makefile_targets()


def test_workflows_run_makefile_targets_only():
    commands = [
        command
        for path in ROOT.glob(".github/workflows/*.yml")
        for command in re.findall(r"^ *-? *run: *(.+)$", path.read_text(), re.MULTILINE)
    ]
    assert commands
    for command in commands:
        found = re.fullmatch(r"make ([a-z-]+)( PYTHON=python)?", command)
        assert found, command
        assert found[1] in makefile_targets(), command


def test_other_commands_are_known():
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for (program, *words), page in commands().items():
        if program == "make":
            assert words[0] in makefile_targets(), (page, words)
        elif program == "pip" or (program == "python" and words[:2] == ["-m", "pip"]):
            for asked in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(asked.split(",")) <= set(extras), (page, words)
            assert "constraints.txt" in words or "install" not in words, (page, words)
        elif program == "python" and words[0].endswith(".py"):
            script = (ROOT / words[0]).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in script, (page, words)
        elif program.endswith(".sh"):
            script = (ROOT / program).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert re.search(rf"{option}\b", script), (page, words)
        elif program == ".":
            assert words == ["env/bin/activate"]
        elif program == "torchrun":
            words = words[words.index("patchscore") + 1 :]
            known = {name for option in main.commands[words[0]].params for name in option.opts + option.secondary_opts}
            assert {word for word in words if re.match("--?[a-z]", word)} <= known, (page, words)
        elif program == "patchscore":
            assert words[0] in main.commands
            known = {name for option in main.commands[words[0]].params for name in option.opts + option.secondary_opts}
            assert {word for word in words if re.match("--?[a-z]", word)} <= known, (page, words)
        else:
            assert [program, *words[:2]] == ["python", "-m", "venv"], page


# What is generated, and what is linked.


@pytest.mark.parametrize("script", ["tools/reference.py", "benchmarks/report.py"])
def test_generated_pages_are_fresh(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()  # exits with a message where a page is not what it would write


def test_the_library_page_has_every_public_name_once():
    named = re.findall(r"^::: (\S+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert len(named) == len(set(named))
    # A function that shares its name with a module is listed by its full path.
    assert set(ps.__all__) - {"__version__"} == {name.rpartition(".")[2] for name in named} & set(ps.__all__)
    for name in named:
        module, _, attribute = name.rpartition(".")
        if not module.endswith("diffusers"):  # an extra
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_page_of_docs_is_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


def test_links_and_pictures_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, (
                    target
                )


def test_changelog_and_citation_have_this_version():
    first = re.search(r"^## (?!Unreleased)(\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == ps.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == ps.__version__
    done = CliRunner().invoke(main, ["--version"])
    assert done.output.split()[-1] == ps.__version__
