"""Every figure of README.md and docs/ has a page and a command."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

import make_figures
from draw_forward_process import corrupted
from make_figures import FIGURES, NEEDS, Figure, Options, commands, make, run
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.samplers.recording import shown_state
from support import PROJECT, tiny_stage

SUFFIXES = (".webp", ".png", ".jpg", ".jpeg", ".gif", ".svg")
PAGES = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]


def listed_figures():
    """Rows of the table in CONTRIBUTING.md: (links of the pages, needed files) by figure."""
    section = (PROJECT / "CONTRIBUTING.md").read_text().split("\n## Figures\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {
        name.strip("` "): (re.findall(r"\]\((\S+?)\)", pages), set(re.findall(r"`(\S+)`", needs)))
        for name, pages, needs, _ in rows
    }


def shown_figures(page):
    """Files of the images that a page shows."""
    return {(page.parent / link).resolve() for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())}


def test_every_figure_has_a_command_and_a_row():
    figures = {path.name for path in (PROJECT / "docs").rglob("*") if path.suffix.lower() in SUFFIXES}
    assert figures == FIGURES.keys() == listed_figures().keys()


def test_every_figure_is_shown_by_the_pages_of_its_row():
    shown = {page: shown_figures(page) for page in PAGES}
    for name, (links, _) in listed_figures().items():
        pages = {page for page, figures in shown.items() if (PROJECT / "docs" / name).resolve() in figures}
        assert pages, f"no page shows {name}"
        assert pages == {PROJECT / link for link in links}, name


@pytest.mark.parametrize("name", FIGURES)
def test_the_commands_of_a_figure_exist(name):
    for first, *others in commands(FIGURES[name], Path("docs") / name, Path("outputs")):
        if first == "-m":
            assert find_spec(others[0]) is not None
        elif first == "-c":
            compile(others[0], name, "exec")
        else:
            assert (PROJECT / first).is_file()


def test_needed_files_are_listed_with_the_page_that_makes_them():
    for name, (_, needs) in listed_figures().items():
        assert set(FIGURES[name].needs) == needs, name
    assert {need for figure in FIGURES.values() for need in figure.needs} == NEEDS.keys()
    for need, page in NEEDS.items():
        assert need in (PROJECT / page).read_text()


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Replace the figures; returns the options of a command that writes into a temporary folder."""
    draw = "from PIL import Image; Image.new('RGB', (40, 20), 'red').save('{folder}/red.png')"
    found = {
        "small.webp": Figure((f'-c "{draw}"',), "red.png", width=10),
        "same.png": Figure((f'-c "{draw}"',), "red.png"),
        "wrong.png": Figure(('-c "import sys; sys.exit(3)"',)),
        "needy.png": Figure((), needs=("data/photos.zip",)),
    }
    monkeypatch.setattr(make_figures, "FIGURES", found)
    monkeypatch.setattr(make_figures, "ROOT", tmp_path)
    monkeypatch.setattr(make_figures, "drawings", lambda _: "")
    for stem in ("small", "same"):
        (tmp_path / "work" / stem).mkdir(parents=True)
    return {"docs": str(tmp_path / "docs"), "output": str(tmp_path / "work")}


def test_a_picture_becomes_the_figure(figures, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    run(Options("small.webp,same.png", **figures))
    assert 'python -c "from PIL import' in capsys.readouterr().out.replace("'", '"')
    with Image.open(tmp_path / "docs/small.webp") as image:
        assert (image.format, image.size) == ("WEBP", (10, 5))
    assert (tmp_path / "docs/same.png").read_bytes() == (tmp_path / "work/same/red.png").read_bytes()


def test_errors_name_the_figure(figures):
    with pytest.raises(UserError, match=r"^figures=smal\.webp: unknown; did you mean small\.webp\?$"):
        run(Options("smal.webp", **figures))
    with pytest.raises(
        UserError, match=r"^figures=needy\.png: needs data/photos\.zip; docs/photos\.md has the commands"
    ):
        make("needy.png", Options("needy.png", **figures))
    with pytest.raises(UserError, match=r"^figures=wrong\.png: the command above failed"):
        make("wrong.png", Options("wrong.png", **figures))


def test_the_forward_process_without_noise_keeps_block_means():
    stage, clean = tiny_stage(16, block=4), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, *others = (to_float(image)[None] for image in corrupted(stage, clean, [0.1, 1.7], torch.zeros_like(clean)))
    gray_level = 2 / 255
    assert (first - clean).abs().max() < gray_level
    contrasts = [first.std()]
    for sigma, state in zip([0.1, 1.7], others, strict=True):
        expected = shown_state(clean, sigma)
        assert (block_mean(state, 4) - block_mean(expected, 4)).abs().max() < gray_level
        contrasts.append(state.std() * first.std() / expected.std())
    assert contrasts[0] > contrasts[1] > 2 * contrasts[2]
