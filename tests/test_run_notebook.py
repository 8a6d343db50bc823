"""README.md's first command: it shows how far it is, writes a page, and after an error says what failed."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
import run_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from benchmarks import workload

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, second: str) -> Path:
    """A notebook of two chapters with a cell each; the second cell has an output from an earlier run."""
    stale = [new_output("stream", text="printed by an earlier run")]
    cells = [
        new_markdown_cell("## 1. One"),
        new_code_cell("print('o' + 'ne')"),
        new_markdown_cell("## 2. Two\n\nMore."),
    ]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(second, outputs=stale)]), path)
    return path


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tests/run_notebook.py", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_chapter_has_a_line_and_the_page_has_the_outputs(tmp_path):
    done = run(write(tmp_path / "two.ipynb", "print('t' + 'wo')"))
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"\[1/2\] 1\. One \. \d+\.\d s \(\d+ s since the start\)", first)
    assert re.fullmatch(r"\[2/2\] 2\. Two \. \d+\.\d s \(\d+ s since the start\)", second)
    if sys.platform == "linux":
        said = r"peak memory: (\d+\.\d\d) GB; the model's file counts once for each copy loaded"
        assert float(re.fullmatch(said, rest[0])[1]) > 0.02
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert "<title>two</title>" in page
    assert "<pre>one\n" in page
    assert "<pre>two\n" in page
    assert "earlier run" not in page


@pytest.mark.parametrize(
    ("second", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import os; os._exit(1)", "The kernel died, perhaps for lack of memory")],
)
def test_after_an_error_the_page_shows_what_was_done(tmp_path, second, message):
    done = run(write(tmp_path / "two.ipynb", second))
    assert done.returncode == 1
    assert message in done.stdout
    assert second in done.stdout
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert "<pre>one\n" in page
    assert "earlier run" not in page


def test_full_size_runs_on_random_weights_of_the_models_shape(tmp_path, monkeypatch):
    """With one of 24 layers and few word pieces, which takes a tenth of a gigabyte instead of 2.3."""
    monkeypatch.setattr(workload, "VOCABULARY", 9000)
    monkeypatch.setattr(run_notebook, "LAYERS", 1)
    monkeypatch.setenv("RERANKER_MODEL", "another")
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from reranker_helpers import load_reranker, rerank\n"
        "reranker = load_reranker(os.environ['RERANKER_MODEL'])\n"
        "reranker.model.config.hidden_size, len(rerank('why?', ['a', 'b'], *reranker))"
    )
    assert run_notebook.main([str(write(tmp_path / "two.ipynb", code)), "--full-size"]) == 0
    assert "(1024, 2)" in (tmp_path / "two.html").read_text(encoding="utf-8")
    assert not Path(os.environ["RERANKER_MODEL"]).exists()


class Hub(SimpleHTTPRequestHandler):
    """Serves what the hub does for `hf_hub_download`, from a folder."""

    def translate_path(self, path):
        return super().translate_path("/" + path.rpartition("/")[2])

    def end_headers(self):
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "a" * 40)
        super().end_headers()

    def log_message(self, *args):
        pass


def test_the_real_model_is_downloaded_before_the_notebook_runs(tmp_path, tiny_folder):
    """In the notebook nobody would see how far 2.3 GB are."""
    code = (
        "import run_notebook as run; run.choose_model(run.LOCAL, None)\n"
        "from reranker_helpers import MODEL_NAME, hub; print(hub.in_cache(MODEL_NAME))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RERANKER_"))}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=tiny_folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT / "tests",
            env=kept | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        server.shutdown()
    assert done.stdout.splitlines() == ["model: BAAI/bge-reranker-v2-m3", "True"]
