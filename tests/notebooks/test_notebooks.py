"""Execute the notebooks with small settings, and check the outputs in the repository."""

import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from relay_diffusion.errors import UserError
from run_notebooks import NOTEBOOKS, Options, execute, run
from support import PROJECT, pythonpath

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
SMALL = {  # values of the parameters with which a notebook takes seconds
    "method": {"chosen": [49], "spectrum_images": 10},
    "quick_tour": {
        "seeds": [0],
        "condition": {"prompt": "red apple, 3D style"},
        "evaluations": 3,
        "changes": {"base": {"sampler": {"steps": 2}}},
    },
    "your_own_images": {
        "train_images": 6,
        "heldout_images": 3,
        "base_images": 16,
        "relay_images": 4,
        "samples": 3,
        "overrides": ["callbacks.grid.every_n_images=0", "stage.sampler.steps=4", "network.channels=16"],
        "metrics": ["metrics.evaluator.inception._target_=pixel_inception.pixels_in_a_process_of_their_own"],
    },
}
LARGEST, LARGEST_TOGETHER = 300_000, 700_000  # bytes
ABSOLUTE = re.compile(r"(?<![\w.:/~])/(?:home|root|tmp|work|opt|usr|var|mnt|Users)/|[A-Z]:\\")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(notebook):
    """Errors and warnings in the outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def pictures(notebook):
    """Number of pictures of each cell."""
    return [sum("image/jpeg" in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)]


def texts(cell):
    """Text of the outputs of a cell, without pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if not kind.startswith("image/"))


@pytest.fixture(params=NAMES)
def stored(request):
    """A notebook of the repository."""
    return nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", pythonpath(PROJECT / "tests"))
    path, parameters = NOTEBOOKS / f"{name}.ipynb", dict(SMALL[name])
    if name == "your_own_images":
        parameters["output"] = str(tmp_path / "output")
    executed = execute(path, parameters)
    assert problems(executed) == []
    assert pictures(executed) == pictures(nbformat.read(path, as_version=4))


def test_the_outputs_are_those_of_one_execution(stored):
    nbformat.validate(stored)
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert problems(stored) == []
    assert sum(pictures(stored)) >= 3


def test_no_output_names_a_folder_of_a_machine(stored):
    shown = "\n".join(text for cell in code_cells(stored) for text in texts(cell))
    assert not ABSOLUTE.search(shown)


def test_absolute_paths_are_found():
    assert ABSOLUTE.search("written to /home/someone/outputs")
    assert ABSOLUTE.search("'/tmp/x'")
    assert not ABSOLUTE.search("outputs/home/x, https://host.org/home/x, ../tmp/x, 3 images/opt/s")


def test_the_files_are_small():
    sizes = {name: (NOTEBOOKS / f"{name}.ipynb").stat().st_size for name in NAMES}
    assert max(sizes.values()) <= LARGEST, sizes
    assert sum(sizes.values()) <= LARGEST_TOGETHER, sizes


def test_links_of_the_text_are_valid(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (NOTEBOOKS / link).exists()]
    missing += [name for name in re.findall(r"(?<![\w/])docs/[\w-]+\.md", text) if not (PROJECT / name).exists()]
    assert not missing


def test_the_method_has_at_most_100_lines():
    notebook = nbformat.read(NOTEBOOKS / "method.ipynb", as_version=4)
    method = [cell.source for cell in notebook.cells if "method" in cell.metadata.get("tags", [])]
    lines = [line for source in method for line in source.splitlines() if line.strip()]
    assert 50 < len(lines) <= 100


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook of two cells, the first one with a parameter; return its path."""

    def write(source):
        first = nbformat.v4.new_code_cell("a = 1", metadata={"tags": ["parameters"]})
        cells = [first, nbformat.v4.new_code_cell(source)]
        path = tmp_path / "small.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def test_outputs_are_written_into_the_notebook(notebook, tmp_path, capsys):
    path = notebook("from pathlib import Path\nprint(a, Path('small.ipynb').exists())")
    run(Options(str(path)))
    written = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in written.cells] == [1, 2]
    assert written.cells[1].outputs[0].text == "1 True\n"
    assert "execution" not in written.cells[1].metadata  # the times
    assert capsys.readouterr().out.startswith("small.ipynb: ")
    assert [file.name for file in tmp_path.iterdir()] == ["small.ipynb"]


def test_parameters_replace_those_of_the_notebook(notebook):
    path = notebook("print(a)")
    assert execute(path, {"a": [2]}).cells[1].outputs[0].text == "[2]\n"
    with pytest.raises(KeyError, match=r"small.ipynb.*b"):
        execute(path, {"b": 1})


def test_a_notebook_with_an_error_is_not_written(notebook):
    path = notebook("1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(Options(str(path)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", ["none.ipynb", str(PROJECT / "LICENSE")])
def test_a_file_that_is_no_notebook_is_named(path):
    with pytest.raises(UserError, match=rf"^notebook={path}: is not a notebook \("):
        run(Options(path))
