"""What a reader of the stored notebooks must be able to rely on. That the outputs are true, nbval checks."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))

PRIVATE = re.compile(r"/(home|root|Users|work|tmp|private|opt|mnt)/|[A-Z]:\\|0x[0-9a-f]{6}|ipykernel_\d")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def test_it_opens_everywhere(path, notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata  # GitHub refuses to show them
    assert path.stat().st_size < 1_000_000
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert not [cell.id for cell in notebook.cells if not cell.source.strip()]


def test_it_was_run_top_to_bottom(notebook):
    """Hidden state is what breaks other people's notebooks: what is stored must come from one clean run."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_are_clean(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr" or "progress-bar" in tags(cell), cell.id
            for text in [output.get("text", ""), *map(str, output.get("data", {}).values())]:
                if not text.startswith("iVBOR"):
                    assert not PRIVATE.search(text), f"{cell.id}: {PRIVATE.search(text)}"


def test_most_cells_show_something_and_most_of_that_is_compared(notebook):
    cells = code_cells(notebook)
    shown = [cell for cell in cells if cell.outputs]
    compared = [cell for cell in shown if not tags(cell) & {"nbval-ignore-output", "nbval-skip"}]
    assert len(shown) >= 0.75 * len(cells)
    assert len(compared) >= 0.6 * len(shown)


def test_plots_have_alternative_text(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 40, cell.id


def test_cells_are_short_and_explained(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == kinds[-1] == "markdown"
    for cell, around in zip(notebook.cells, zip(kinds, kinds[1:], kinds[2:], strict=False), strict=False):
        assert "markdown" in around, f"{cell.id} begins three code cells in a row"
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, cell.id


def test_nothing_is_wider_than_github_shows(notebook):
    """GitHub cuts a line at about a hundred characters, and hides the rest behind a scroll bar."""
    for cell in code_cells(notebook):
        assert max(map(len, cell.source.splitlines())) <= 100, cell.id
        for output in cell.outputs:
            assert max(map(len, output.get("text", "").split("\n"))) <= 112, cell.id
