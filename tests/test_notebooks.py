"""What a reader of the stored notebooks must be able to rely on. That the outputs are true, nbval checks."""

import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
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
        assert len(cell.source.splitlines()) <= 30, cell.id


def test_nothing_is_wider_than_github_shows(notebook):
    """GitHub cuts a line at about a hundred characters, and hides the rest behind a scroll bar."""
    for cell in code_cells(notebook):
        assert max(map(len, cell.source.splitlines())) <= 100, cell.id
        for output in cell.outputs:
            assert max(map(len, output.get("text", "").split("\n"))) <= 112, cell.id


# How the Local notebook chooses its model


def choose_model(tmp_path: Path, **environment: str) -> tuple[str, float]:
    """Return what the cell prints, and the seconds that it took."""
    cells = {cell.id: cell.source for cell in nbformat.read(ROOT / "BGE_Reranker_Local.ipynb", as_version=4).cells}
    code = [cells["setup"], "import time; start = time.monotonic()", cells["hub-answers"], cells["choose-model"]]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, "print(time.monotonic() - start)"])],
        cwd=ROOT,
        env={"HF_HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "agg"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *said, seconds = run.stdout.strip().splitlines()
    return "\n".join(said), float(seconds)


def test_a_hub_that_hangs_costs_less_than_ten_seconds(tmp_path):
    """Firewalls swallow packets: the connection is neither accepted nor refused, and libraries retry for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said, seconds = choose_model(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.startswith("*** STAND-IN MODEL ***")
    assert seconds < 10


def test_a_hub_that_refuses_costs_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said, seconds = choose_model(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert said.startswith("*** STAND-IN MODEL ***")
    assert seconds < 5


def test_a_hub_within_reach_means_the_real_model(tmp_path):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/BAAI/bge-reranker-v2-m3/resolve/main/config.json" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, _ = choose_model(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert said == "BAAI/bge-reranker-v2-m3 - the first use downloads 2.3 GB now"


def test_the_variable_decides(tmp_path):
    assert choose_model(tmp_path, RERANKER_MODEL="some/model")[0].startswith("some/model")
    assert choose_model(tmp_path, RERANKER_MODEL=str(ROOT / "tests/stand_in_model"))[0].startswith("*** STAND-IN")


def test_offline_mode_asks_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said, seconds = choose_model(tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert said.startswith("*** STAND-IN MODEL ***")
    assert seconds < 5
