"""Reaching the hub: without a way to it the answer comes within seconds, in plain words."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a process of its own, because the hub's client reads its settings on import."""
    private = ("HF_", "RERANKER_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(private)}
    begin = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
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
        if not self.server.status:
            self.send_response(200 if self.path == "/BAAI/bge-reranker-v2-m3/resolve/main/config.json" else 404)
            return self.end_headers()
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


class Proxy(Hub):
    """A proxy for `http://hub.invalid`, a hub that serves the files of a folder as any model."""

    def do_HEAD(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        file = self.server.folder / name
        found = self.path.startswith("http://hub.invalid/") and "/resolve/" in self.path and file.is_file()
        data = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        headers = {"X-Repo-Commit": "0" * 40, "ETag": hashlib.sha1(data).hexdigest(), "Content-Length": len(data)}
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD


@contextmanager
def serving(handler, **settings):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update({"status": None} | settings)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def answering():
    with serving(Hub) as url:
        yield url


@pytest.fixture
def cached(tiny_folder, tmp_path):
    """A cache that holds all of the model someone/reranker."""
    snapshot = tmp_path / "hub/models--someone--reranker/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    for file in tiny_folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    return tmp_path


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


PRINT = "print(type(load_reranker('someone/reranker').model).__name__, time.monotonic() - begin)"


def test_a_cached_model_loads_without_a_way_to_the_hub(cached, silent):
    """On a train, say: the cache has it all, and only looking for a newer version takes a network."""
    run, _ = python(f"{LOAD}\n{PRINT}", cached, HF_ENDPOINT=silent)
    name, seconds = run.stdout.split()
    assert name == "XLMRobertaForSequenceClassification"
    assert float(seconds) < 15


def test_a_cached_model_does_not_wait_for_a_busy_hub(cached):
    """Transformers tries again for one or two minutes before it takes what it has."""
    with serving(Hub, status=503) as url:
        run, _ = python(f"{LOAD}\n{PRINT}", cached, HF_ENDPOINT=url)
    name, seconds = run.stdout.split()
    assert name == "XLMRobertaForSequenceClassification"
    assert float(seconds) < 15
    assert "The hub answered 503: taking someone/reranker as it is in the cache" in run.stderr


FAIL = "try: load_reranker({!r})\nexcept (OSError, ValueError) as error: print(time.monotonic() - begin, error)"


def test_a_token_that_the_hub_rejects_is_named(cached, tmp_path_factory):
    """It was "not complete in the local cache", although it was: the line with 401 had been cut off."""
    for status, folder in [
        (401, cached),
        (401, tmp_path_factory.mktemp("empty")),
        (403, tmp_path_factory.mktemp("no")),
    ]:
        with serving(Hub, status=status) as url:
            code = f"{LOAD}\n{FAIL.format('someone/reranker')}"
            run, _ = python(code, folder, HF_ENDPOINT=url, HF_TOKEN="hf_secret")
        assert f"the hub answered {status} for someone/reranker" in run.stdout
        assert "HF_TOKEN" in run.stdout
        assert "hf_secret" not in run.stdout + run.stderr


def test_the_hub_is_asked_with_its_own_client(tiny_folder, tmp_path):
    """Behind ALL_PROXY, or with a certificate authority of the company's, Transformers loaded the model, and
    `load_reranker` said that it "could not be downloaded" without having tried."""
    with serving(Proxy, folder=tiny_folder) as url:
        environment = {"HF_ENDPOINT": "http://hub.invalid", "ALL_PROXY": url}
        run, _ = python(f"{LOAD}\n{PRINT}", tmp_path, **environment)
        assert run.stdout.startswith("XLMRobertaForSequenceClassification"), run.stderr
        assert chosen(tmp_path, **environment)[0] == "BAAI/bge-reranker-v2-m3"


def test_the_reason_why_the_hub_did_not_answer_is_told(tmp_path, answering):
    """Here a server that does not speak TLS; a proxy's or a certificate's fault is told in the same way."""
    code = f"{LOAD}\n{FAIL.format('someone/reranker')}"
    run, _ = python(code, tmp_path, HF_ENDPOINT=answering.replace("http:", "https:"))
    assert "SSL" in run.stdout
    assert "Check the name and the network" in run.stdout


def test_the_time_limit_can_be_set(tmp_path, silent):
    name, seconds = chosen(tmp_path, HF_ENDPOINT=silent, HF_HUB_ETAG_TIMEOUT="1")
    assert name == "stand-in"
    assert seconds < 4


def test_names_that_no_model_can_have(tmp_path, answering):
    """The thread that asks the hub printed a traceback before the error."""
    names = ["my models/bge reranker", "a/b/c", "models\\bge", "-", ""]
    run, _ = python("\n".join([LOAD, *map(FAIL.format, names)]), tmp_path, HF_ENDPOINT=answering)
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 5
        assert message.startswith(f"{name or 'model_name'} is ")
    assert run.stderr == ""


def test_code_of_a_models_own_is_not_run_and_nobody_is_asked(tmp_path):
    """Transformers asked on stdin, and after 15 seconds the folder "held no complete model"."""
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    run, _ = python(f"{LOAD}\n{FAIL.format(str(tmp_path))}", tmp_path)
    seconds, _, message = run.stdout.partition(" ")
    assert float(seconds) < 5
    assert "has code of its own, which load_reranker does not run" in message
    assert "with trust_remote_code=True, and pass them to rerank" in message


def test_a_variable_that_is_set_but_empty_counts_as_not_set(tmp_path, answering):
    assert chosen(tmp_path, HF_ENDPOINT=answering, RERANKER_MODEL=" ")[0] == "BAAI/bge-reranker-v2-m3"
