"""Reaching the hub: without a way to it the answer comes within seconds, in plain words."""

import contextlib
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a process of its own, because the hub's client reads its settings on import."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "RERANKER_")) and "proxy" not in name.lower()
    }
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
    """Serves the files of a folder under any model's name, to those who have the token."""

    folder: Path
    status = 200
    token: str | None = None

    def do_HEAD(self):
        file = self.folder / self.path.partition("?")[0].rpartition("/")[2]
        status = self.status
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            status = 401
        elif status == 200 and not file.is_file():
            status = 404
        data = file.read_bytes() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", hashlib.sha1(data).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        if status == 401:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tiny_folder):
    """Start a hub with such attributes, and return its address; with a certificate, its address for https."""
    with contextlib.ExitStack() as stack:

        def start(certificate: Path | None = None, **attributes) -> str:
            handler = type("Hub", (Hub,), {"folder": tiny_folder} | attributes)
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate)
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"

        yield start


@pytest.fixture
def answering(serve):
    return serve()


@pytest.fixture
def cached(tiny_folder, tmp_path):
    """A folder for HF_HOME whose cache holds all of someone/reranker."""
    snapshot = tmp_path / "hub/models--someone--reranker/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_folder, snapshot)
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


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_variable_counts_as_none(tmp_path, answering, blank):
    """As `docker run -e RERANKER_MODEL=` sets it."""
    assert chosen(tmp_path, HF_ENDPOINT=answering, RERANKER_MODEL=blank)[0] == "BAAI/bge-reranker-v2-m3"


def test_the_hubs_own_variable_sets_the_time(tmp_path, silent):
    assert 1 <= chosen(tmp_path, HF_ENDPOINT=silent, HF_HUB_ETAG_TIMEOUT="1")[1] < 4


def test_offline_mode_asks_nobody(tmp_path, silent):
    name, seconds = chosen(tmp_path, HF_ENDPOINT=silent, HF_HUB_OFFLINE="1")
    assert name == "stand-in"
    assert seconds < 5


def test_behind_a_proxy_for_everything(tmp_path, serve):
    """ALL_PROXY is the hub's client's to know, and urllib does not: the model counted as out of reach."""
    environment = {"HF_ENDPOINT": "http://hub.invalid", "ALL_PROXY": serve()}
    assert chosen(tmp_path, **environment)[0] == "BAAI/bge-reranker-v2-m3"
    run, _ = python("from reranker_helpers import load_reranker; load_reranker('org/model')", tmp_path, **environment)
    assert run.returncode == 0, run.stderr


TRUST = """
import ssl
import huggingface_hub.utils

Session = type(huggingface_hub.utils.get_session())

def session():
    session = Session()
    session.verify, session.trust_env = {0!r}, False
    return session

if hasattr(huggingface_hub, "set_client_factory"):
    huggingface_hub.set_client_factory(lambda: Session(verify=ssl.create_default_context(cafile={0!r})))
else:
    huggingface_hub.configure_http_backend(session)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_private_certificate_authority(tmp_path, serve):
    """A company's, which only the session that the user has given to huggingface_hub trusts."""
    certificate = tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=hub -addext subjectAltName=IP:127.0.0.1 -days 2"
    pem = subprocess.run([*command.split(), "-keyout", "-"], capture_output=True, check=True)
    certificate.write_bytes(pem.stdout)
    hub = serve(certificate)
    load = "from reranker_helpers import load_reranker; load_reranker('org/model')"
    run, _ = python(load, tmp_path, HF_ENDPOINT=hub)
    assert "could not be downloaded ([SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed" in run.stderr
    run, _ = python(TRUST.format(str(certificate)) + load, tmp_path, HF_ENDPOINT=hub)
    assert run.returncode == 0, run.stderr


def test_the_users_token_is_sent(tmp_path, serve):
    hub = serve(token="hf_right")
    assert chosen(tmp_path, HF_ENDPOINT=hub, HF_TOKEN="hf_right")[0] == "BAAI/bge-reranker-v2-m3"
    assert chosen(tmp_path, HF_ENDPOINT=hub, HF_TOKEN="hf_wrong")[0] == "stand-in"


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


def test_a_cached_model_loads_without_a_way_to_the_hub(cached, silent):
    """On a train, say: the cache has it all, and only looking for a newer version takes a network."""
    code = f"{LOAD}\nprint(type(load_reranker('someone/reranker').model).__name__, time.monotonic() - begin)"
    run, _ = python(code, cached, HF_ENDPOINT=silent)
    name, seconds = run.stdout.split()
    assert name == "XLMRobertaForSequenceClassification"
    assert float(seconds) < 15


@pytest.mark.parametrize("status", [429, 503])
def test_a_cached_model_loads_while_the_hub_is_busy(cached, serve, status):
    """Transformers tried again for one or two minutes."""
    code = f"{LOAD}\nload_reranker('someone/reranker'); print(time.monotonic() - begin)"
    run, _ = python(code, cached, HF_ENDPOINT=serve(status=status))
    assert float(run.stdout) < 15
    warning = f"the hub answered {status}: loading the cached copy of someone/reranker, without looking for a newer one"
    assert run.stderr.count(warning) == 1


@pytest.mark.parametrize("name", ["someone/reranker", "someone/another"])
def test_an_expired_token(cached, serve, name):
    """With and without the model in the cache. "401" stood in the second line of an error whose first was kept."""
    run, _ = python(
        f"{LOAD}\nload_reranker({name!r})", cached, HF_ENDPOINT=serve(token="hf_new"), HF_TOKEN="hf_expired"
    )
    message = run.stderr.splitlines()[-1]
    assert f"{name} could not be downloaded (the hub answered 401: Invalid credentials" in message
    assert "HF_TOKEN" in message
    assert "hf auth login" in message
    assert "hf_expired" not in run.stdout + run.stderr


def test_a_malformed_token_is_not_shown(tmp_path, serve):
    """httpx quotes the header that it does not send."""
    run, _ = python(
        f"{LOAD}\nload_reranker('org/model')", tmp_path, HF_ENDPOINT=serve(token="hf_new"), HF_TOKEN="hf_\x0bmalformed"
    )
    assert "HF_TOKEN" in run.stderr.splitlines()[-1]
    assert "malformed" not in run.stdout + run.stderr


def test_a_token_without_a_right_to_the_weights(tmp_path, serve, tiny_folder):
    """The hub shows the config to anybody."""

    def do_GET(self):
        self.status = 403 if "safetensors" in self.path else 200
        self.do_HEAD()

    run, _ = python(f"{LOAD}\nload_reranker('org/model')", tmp_path, HF_ENDPOINT=serve(do_GET=do_GET))
    assert "trying to load org/model: 403 Forbidden" in run.stderr.splitlines()[-1]


def test_names_that_are_none_of_the_hubs(tmp_path, silent):
    """A thread's traceback stood before the error."""
    names = ["my models/bge reranker", "models/bge/reranker", r"C:\models\bge", "~/bge", "", " "]
    code = (
        f"{LOAD}\nfor name in {names!r}:\n"
        "    try: load_reranker(name)\n    except OSError as error: print(error)\nprint(time.monotonic() - begin)"
    )
    run, _ = python(code, tmp_path, HF_ENDPOINT=silent)
    *messages, seconds = run.stdout.splitlines()
    remedy = "is no folder here, and cannot be a model's name on the hub: check the path"
    assert messages == [f"{name!r} {remedy}" for name in names]
    assert float(seconds) < 3
    assert run.stderr == ""
