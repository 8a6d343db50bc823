"""Reaching the hub: without a way to it the answer comes within seconds, in plain words."""

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a process of its own, because the hub's client reads its settings on import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RERANKER_"))}
    begin = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return run, time.monotonic() - begin


def chosen(tmp_path: Path, **environment: str) -> tuple[str, float]:
    """Return what the notebook would load, and the seconds that it took to find out."""
    run, _ = python(
        "import time; from reranker_helpers import MODEL_NAME; from reranker_helpers.hub import choose_model\n"
        "begin = time.monotonic(); print(choose_model(MODEL_NAME, otherwise='stand-in'), time.monotonic() - begin)",
        tmp_path,
        **environment,
    )
    name, seconds = run.stdout.split()
    return name, float(seconds)


@pytest.fixture
def silent():
    """A hub behind a firewall that swallows packets: the connection is neither accepted nor refused."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/BAAI/bge-reranker-v2-m3/resolve/main/config.json" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def answering():
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_hangs_costs_less_than_ten_seconds(tmp_path, silent):
    name, seconds = chosen(tmp_path, HF_ENDPOINT=silent)
    assert name == "stand-in"
    assert seconds < 10


def test_a_hub_that_refuses_costs_nothing(tmp_path, refusing):
    name, seconds = chosen(tmp_path, HF_ENDPOINT=refusing)
    assert name == "stand-in"
    assert seconds < 5


def test_a_hub_within_reach_means_the_real_model(tmp_path, answering):
    assert chosen(tmp_path, HF_ENDPOINT=answering)[0] == "BAAI/bge-reranker-v2-m3"


def test_the_variable_decides(tmp_path, answering):
    assert chosen(tmp_path, HF_ENDPOINT=answering, RERANKER_MODEL="some/model")[0] == "some/model"


def test_offline_mode_asks_nobody(tmp_path, silent):
    name, seconds = chosen(tmp_path, HF_ENDPOINT=silent, HF_HUB_OFFLINE="1")
    assert name == "stand-in"
    assert seconds < 5


LOAD = "import transformers, torch, time; from reranker_helpers import load_reranker; begin = time.monotonic()"


@pytest.mark.parametrize("hub", ["silent", "refusing", "offline"])
def test_loading_without_a_way_to_the_hub(tmp_path, request, hub):
    """It took half a minute and printed a dozen lines about retries, before it said what to do."""
    environment = {"HF_HUB_OFFLINE": "1"} if hub == "offline" else {"HF_ENDPOINT": request.getfixturevalue(hub)}
    code = f"{LOAD}\ntry: load_reranker()\nexcept OSError as error: print(time.monotonic() - begin, error)"
    run, _ = python(code, tmp_path, **environment)
    seconds, _, message = run.stdout.strip().partition(" ")
    assert message.startswith("BAAI/bge-reranker-v2-m3 is no folder here, not complete in the local cache")
    for remedy in ("Check the name", "HTTPS_PROXY", "HF_HUB_OFFLINE", "tests/stand_in_model"):
        assert remedy in message
    assert float(seconds) < 10
    assert run.stderr == ""


def test_a_cached_model_loads_without_a_way_to_the_hub(tiny_folder, tmp_path, silent):
    """On a train, say: the cache has it all, and only looking for a newer version takes a network."""
    snapshot = tmp_path / "hub/models--someone--reranker/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    for file in tiny_folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    code = f"{LOAD}\nprint(type(load_reranker('someone/reranker').model).__name__, time.monotonic() - begin)"
    run, _ = python(code, tmp_path, HF_ENDPOINT=silent)
    name, seconds = run.stdout.split()
    assert name == "XLMRobertaForSequenceClassification"
    assert float(seconds) < 15
