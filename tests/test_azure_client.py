"""azureml/client.py against Azure's inference server, with faults between them and in it.

Whatever happens, all documents come back, in the reranker's order or in the given one, and in time.
"""

import asyncio
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pandas
import pytest
import requests
from azure_scripts import load_script
from fake_azure import InferenceServer
from tiny import Column

from reranker_helpers import load_reranker, rerank

ROOT = Path(__file__).parent.parent
client = load_script("azureml/client.py")

QUERY = "what is a panda"
WORDS = ["panda", "bear", "bread", "oven", "law", "contract", "tree", "river", "king", "music"]
DOCUMENTS = [" ".join(random.Random(seed).choices(WORDS, k=1 + seed % 9)) for seed in range(37)]
TOKEN = "the right token"
SLACK = 1.0  # seconds beyond the budget
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() then sends no proper end


class Front(BaseHTTPRequestHandler):
    """What stands before the server, as Azure's front does: it checks the token, and makes 424 of all errors.

    For each request it takes the next of `server.faults`, and if there are none it passes the request on.
    """

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.server.received.append(self.headers)
        self.server.sizes.append(len(json.loads(body)["documents"]))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, b"")
        if fault == "reset":
            self.connection.setsockopt(*RESET)
            return self.connection.close()
        if fault == "drip":
            self.answer(200, b"{", length=1000)
            while not self.server.over.wait(0.2):
                self.wfile.write(b" ")
            return None
        if fault == "slow":
            self.server.over.wait(20)
        if fault == "endless":
            self.answer(200, b"", length=2**40)
            while not self.server.over.is_set():
                self.server.written += self.connection.send(b" " * 2**16)
            return None
        if fault == "cut":
            self.answer(200, b"{", length=1000)
            return self.connection.close()
        if isinstance(fault, dict):
            return self.answer(**fault)
        if isinstance(fault, int):
            return self.answer(fault, b"busy", **self.server.headers)
        passed_on = {
            name: value for name, value in self.headers.items() if name.lower().startswith(("content-t", "x-"))
        }
        try:
            reply = requests.post(self.server.behind, data=body, headers=passed_on, timeout=60)
        except requests.RequestException:
            return self.answer(502, b"")
        if reply.ok:
            return self.answer(200, reply.content, Content_Type="application/json")
        hidden = {"ms_azureml_model_error_statuscode": str(reply.status_code)}
        hidden["x_request_id"] = reply.headers["x-request-id"]
        return self.answer(424, reply.content, Content_Type=reply.headers["Content-Type"], **hidden)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Azure(ThreadingHTTPServer):
    """The front, and the server behind it."""

    daemon_threads = True

    def __init__(self, server: InferenceServer) -> None:
        super().__init__(("127.0.0.1", 0), Front)
        self.server, self.behind = server, server.url
        self.faults: list[str | int | dict] = []
        self.headers: dict[str, str] = {}
        self.forget()
        self.over = threading.Event()

    def handle_error(self, *arguments):
        pass  # a client that has left

    def forget(self) -> None:
        self.sizes: list[int] = []
        self.bodies: list[bytes] = []
        self.received: list[Message] = []
        self.written = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def worker(self) -> int:
        pid = self.server.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextmanager
def running(model: Path, log: Path, **environment: str) -> Iterator[Azure]:
    with (
        InferenceServer(ROOT, ROOT / "azureml" / "score.py", model, environment, log) as server,
        Azure(server) as azure,
    ):
        threading.Thread(target=azure.serve_forever, daemon=True).start()
        yield azure
        azure.over.set()
        azure.shutdown()


@pytest.fixture(scope="module")
def shared(tiny_folder, tmp_path_factory):
    limits = {"RERANKER_MAX_DOCUMENTS": "20", "RERANKER_MAX_TOKENS": "250"}
    with running(tiny_folder, tmp_path_factory.mktemp("client") / "log.txt", **limits) as azure:
        yield azure


@pytest.fixture
def azure(shared):
    shared.faults, shared.headers = [], {}
    shared.forget()
    return shared


@pytest.fixture(scope="module")
def local(tiny_folder):
    """The ranking on this machine: index and logit."""
    return [(result.index, result.score) for result in rerank(QUERY, DOCUMENTS, *load_reranker(tiny_folder))]


@pytest.fixture
def ask(azure):
    """Call the client with the test's documents, and look at the clock."""

    def ask(budget: float = 20.0, documents: list[str] = DOCUMENTS, **options):
        started = time.monotonic()
        try:
            # An address for each call, because one that has failed is left alone for a while.
            service = {"url": f"{azure.url}?{uuid.uuid4()}", "token": TOKEN}
            return client.rerank_remote(QUERY, documents, budget=budget, **service | options)
        finally:
            assert time.monotonic() - started < budget + SLACK

    return ask


def is_the_local_one(ranking, local) -> bool:
    assert (ranking.reranked, ranking.reason) == (True, "")
    assert [result.document for result in ranking.results] == [DOCUMENTS[result.index] for result in ranking.results]
    scores = dict(local)
    assert [result.score for result in ranking.results] == pytest.approx(
        [scores[result.index] for result in ranking.results], abs=1e-5
    )
    logits = [result.score for result in ranking.results]
    return logits == sorted(logits, reverse=True) and len({result.index for result in ranking.results}) == len(logits)


def is_the_given_one(ranking, reason: str) -> bool:
    assert reason in ranking.reason
    return (
        ranking.results == [(document, None, index) for index, document in enumerate(DOCUMENTS)]
        and not ranking.reranked
    )


def test_documents_beyond_the_limits_are_split_and_merged(ask, azure, local):
    """37 documents where 20 are allowed, and 250 tokens: it halves until the parts fit, and nothing is lost."""
    ranking = ask()
    assert is_the_local_one(ranking, local)
    assert len(ranking.results) == 37
    assert azure.sizes[0] == 37
    assert max(azure.sizes[-3:]) < 20
    best = ask(top_n=3)
    assert [result.index for result in best.results] == [index for index, _ in local[:3]]


def test_a_document_that_is_too_long_alone(ask):
    ranking = ask(documents=["panda", "law " * 2000], max_length=500)
    assert not ranking.reranked
    assert "answered 413" in ranking.reason
    assert "tokens" in ranking.reason


def test_no_documents_are_not_sent(ask, azure):
    assert ask(documents=[]) == ([], True, "")
    assert azure.sizes == []


@pytest.mark.parametrize("faults", [[429, 503, 500], [502, 504, 408], ["reset"] * 3])
def test_what_passes_is_tried_again(ask, azure, local, faults):
    azure.faults = [*faults]
    assert is_the_local_one(ask(), local)


def test_after_the_budget_the_documents_come_back_as_given(ask, azure):
    for fault, reason in [(429, "answered 429"), (503, "answered 503"), ("reset", "no answer in time: Connection")]:
        azure.faults = [fault] * 1000
        assert is_the_given_one(ask(budget=1.0), reason)
    azure.faults = []
    assert ask(top_n=2, url="http://127.0.0.1:9/", budget=0.5).results == [
        (document, None, index) for index, document in enumerate(DOCUMENTS[:2])
    ]


@pytest.mark.parametrize("budget", [0, -0.01, -math.inf, math.nan, numpy.float32(-1)])
def test_a_budget_that_is_used_up_fails_at_once(azure, budget):
    """A search passes on what is left of its own time. If that was less than 0, it got ValueError, fail_open or not."""
    options = {"url": azure.url, "token": TOKEN, "budget": budget}
    assert is_the_given_one(client.rerank_remote(QUERY, DOCUMENTS, **options), f"budget is {budget} s, expected more")
    with pytest.raises(client.RerankFailed, match="budget is"):
        client.rerank_remote(QUERY, DOCUMENTS, fail_open=False, **options)
    assert azure.sizes == []


@pytest.mark.parametrize("budget", [math.inf, 1e10, 10**30, numpy.float32(1e30), numpy.float64(20)])
def test_a_budget_may_be_huge(ask, local, budget):
    """No limit: queues and sockets raise OverflowError for such timeouts."""
    assert is_the_local_one(ask(budget=budget), local)


def test_retry_after_is_kept_and_beyond_the_budget_nothing_is_waited_for(ask, azure, local):
    azure.faults, azure.headers = [429], {"Retry_After": "1"}
    started = time.monotonic()
    assert is_the_local_one(ask(), local)
    assert time.monotonic() - started > 1
    azure.faults, azure.headers = [429], {"Retry_After": "60"}
    started = time.monotonic()
    assert is_the_given_one(ask(), "answered 429")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_slow_answer(ask, azure, fault):
    """One that does not come, and one that comes byte by byte, which the timeout of requests does not end."""
    azure.faults = [fault]
    assert is_the_given_one(ask(budget=1.0), "")


def test_a_token_that_is_wrong_late_or_not_to_be_had(ask, azure):
    assert is_the_given_one(ask(token="wrong"), "the endpoint answered 401")
    assert len(azure.sizes) == 1, "it is not tried again"
    assert is_the_given_one(ask(token=lambda: time.sleep(20), budget=0.5), "no answer within 0.5 s")

    def not_signed_in() -> str:
        raise PermissionError("secret")

    assert ask(token=not_signed_in).reason == "PermissionError in the request"


def test_a_new_token_is_tried_once(ask, azure, local):
    """A provider asks a service that may fail, and a cached token may have expired."""
    calls = []

    def fails_once() -> str:
        calls.append(1)
        return TOKEN if len(calls) > 1 else 1 / 0

    assert is_the_local_one(ask(token=fails_once), local)
    calls.clear()

    def expired_at_first() -> str:
        calls.append(1)
        return TOKEN if len(calls) > 1 else "expired"

    assert is_the_local_one(ask(token=expired_at_first), local)
    azure.forget()
    assert is_the_given_one(ask(token=lambda: "wrong"), "the endpoint answered 401")
    assert len(azure.sizes) == 2


@pytest.mark.parametrize("session", [None, requests.Session()], ids=["no session", "the caller's session"])
def test_a_netrc_does_not_replace_the_token(ask, local, monkeypatch, tmp_path, session):
    """The endpoint got the user and password that the file has for any machine, and answered 401."""
    (tmp_path / "netrc").write_text("default login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert is_the_local_one(ask(session=session), local)


def test_the_environments_proxy_is_used(ask, azure, local, monkeypatch):
    """What ignores a .netrc must not ignore the rest of the environment: only the proxy knows this name."""
    monkeypatch.setenv("http_proxy", azure.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert is_the_local_one(ask(url="http://endpoint.invalid/score"), local)


@pytest.mark.parametrize("status", [302, 308])
def test_a_redirect_is_not_followed(ask, azure, status):
    """The token is not for the other host, and a 302 would make a GET of the request."""
    azure.faults, azure.headers = [status], {"Location": azure.url.replace("127.0.0.1", "localhost")}
    assert is_the_given_one(ask(), f"the endpoint answered {status}: a redirect, is url the endpoint's scoring URI?")
    assert len(azure.sizes) == 1


SECRET = "ab12cd34"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"token": f"{SECRET}\n"}, "token has a line break or another character that no header may hold: strip() it?"),
        ({"token": f"{SECRET}\0"}, "token has a line break or another"),
        ({"token": f"\ufeff{SECRET}"}, "token has a line break or another"),
        ({"token": lambda: f"{SECRET}\r\n"}, "token() has a line break or another"),
        ({"token": ""}, "token is empty"),
        ({"token": lambda: " "}, "token() is empty"),
        ({"token": None}, "token is NoneType, expected str"),
        ({"token": lambda: (SECRET, 1790000000)}, "token() is tuple, expected str"),
        ({"url": ""}, "MissingSchema: check url"),
        ({"url": None}, "MissingSchema: check url"),
        ({"url": "my-endpoint/score"}, "MissingSchema: check url, https://..., and the proxy"),
        ({"url": "htps://my-endpoint/score"}, "InvalidSchema: check url"),
        ({"url": "https:///score"}, "InvalidURL: check url"),
        ({"url": "https://my-endpoint:443443/score"}, "InvalidURL: check url"),
        ({"url": f"https://{'a' * 64}.invalid/score"}, "LocationParseError: check url"),
    ],
)
def test_what_can_never_be_sent_is_not_tried_again(ask, azure, caplog, arguments, reason):
    """It used up the whole budget of each search. The token is a secret, and a reason goes to the log."""
    started = time.monotonic()
    ranking = ask(**arguments)
    assert is_the_given_one(ranking, reason)
    assert time.monotonic() - started < 1
    assert azure.sizes == []
    assert reason in caplog.text
    assert SECRET not in caplog.text + ranking.reason
    with pytest.raises(client.RerankFailed, match=re.escape(reason)):
        ask(fail_open=False, **arguments)


def test_a_proxy_that_is_no_address(ask, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://")
    monkeypatch.setenv("no_proxy", "")
    assert is_the_given_one(ask(), "InvalidProxyURL: check url, https://..., and the proxy")


def test_a_request_that_is_wrong_is_told_from_a_service_that_is_broken(ask, azure):
    """Azure answers 424 for both. The header has the script's status, and only a broken service is tried again."""
    documents = DOCUMENTS[:5]
    ranking = ask(documents=documents, max_length=5)
    assert [result.document for result in ranking.results] == documents
    assert ranking.reason.startswith("the endpoint answered 422: query has 4 tokens")
    assert len(azure.sizes) == 1


def test_failures_can_be_raised_instead(ask, azure):
    azure.faults = [503] * 1000
    with pytest.raises(client.RerankFailed, match="answered 503"):
        ask(budget=0.5, fail_open=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": ["a", None]}, r"documents\[1\] is NoneType, expected str"),
        ({"documents": "panda"}, "documents is str, expected a list"),
        ({"documents": b"panda"}, "documents is bytes, expected a list of strings: put it into brackets?"),
        ({"documents": {"a": "panda"}}, "documents is dict, expected a list of strings"),
        ({"documents": pandas.DataFrame({"id": [1], "text": ["panda"]})}, "documents is DataFrame, a table, expected"),
        ({"documents": None}, "documents is NoneType, expected a list"),
        ({"documents": ["a", "half an emoji: \ud83d"]}, r"documents\[1\] is no valid Unicode: .* at character 15"),
        ({"top_n": 0}, "top_n is 0, expected at least 1"),
        ({"top_n": numpy.int64(0)}, "top_n is 0, expected at least 1"),
        ({"top_n": True}, "top_n is bool, expected a whole number"),
        ({"top_n": 2.0}, "top_n is float, expected a whole number"),
        ({"max_length": 0}, "max_length is 0, expected at least 1"),
        ({"max_length": "512"}, "max_length is str, expected a whole number"),
        ({"stride": -1}, "stride is -1, expected at least 0"),
        ({"stride": numpy.float64(8)}, "stride is float64, expected a whole number"),
    ],
)
def test_mistakes_of_the_caller_are_raised(ask, azure, arguments, message):
    """Failing open would hide them: the search would look fine, and never be reranked. Tables were ranked by the names
    of their columns, and dicts by their keys."""
    with pytest.raises((TypeError, ValueError), match=message):
        ask(**arguments)
    assert azure.sizes == []


@pytest.mark.parametrize(
    ("query", "budget", "error", "message"),
    [
        ("half an emoji: \ud83d", 5, ValueError, "query is no valid Unicode: lone surrogate at character 15"),
        (None, 5, TypeError, "query is NoneType, expected str"),
        (QUERY, "5", TypeError, "budget is str, expected a number of seconds"),
        (QUERY, None, TypeError, "budget is NoneType"),
        (QUERY, True, TypeError, "budget is bool"),
    ],
)
def test_mistakes_in_the_query_and_the_budget_are_raised(azure, query, budget, error, message):
    with pytest.raises(error, match=message):
        client.rerank_remote(query, DOCUMENTS, url=azure.url, token=TOKEN, budget=budget)
    assert azure.sizes == []


@pytest.mark.parametrize("wrap", [tuple, iter, Column, pandas.Series, numpy.array])
def test_columns_arrays_and_generators(ask, local, wrap):
    assert is_the_local_one(ask(documents=wrap(DOCUMENTS)), local)


def test_numbers_of_numpy(ask, tiny_folder):
    """They come from tables and settings. json knew none of them: "TypeError in the request"."""
    numbers = {"top_n": 3, "max_length": 12, "stride": 2}
    ranking = ask(**{name: numpy.int64(number) for name, number in numbers.items()})
    expected = rerank(QUERY, DOCUMENTS, *load_reranker(tiny_folder), **numbers)
    assert [result.index for result in ranking.results] == [result.index for result in expected]
    assert [result.score for result in ranking.results] == pytest.approx([r.score for r in expected], abs=1e-5)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the worker is found in Linux's /proc")


@needs_proc
def test_a_worker_that_is_killed_is_waited_for(ask, azure, local):
    """The server starts another one, which takes seconds; meanwhile connections are reset or left unanswered."""
    worker = azure.worker()
    os.kill(worker, signal.SIGSTOP)  # so that it cannot answer before it is killed
    killer = threading.Timer(0.3, os.kill, (worker, signal.SIGKILL))
    killer.start()
    assert is_the_local_one(ask(budget=60.0), local)
    killer.join()
    assert azure.server.log.read_text().count("Booting worker") == 2


@needs_proc
def test_a_worker_that_hangs(ask, azure, local):
    worker = azure.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        assert is_the_given_one(ask(budget=1.0), "")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert is_the_local_one(ask(), local), "and works again"


def as_json(content: object, **headers: str) -> dict:
    """An answer with status 200."""
    return {"status": 200, "body": json.dumps(content).encode(), "Content_Type": "application/json", **headers}


def results(*pairs: tuple) -> dict:
    return {"results": [{"index": index, "logit": logit} for index, logit in pairs]}


@pytest.mark.parametrize(
    ("content", "top_n"),
    [
        (results((0, 1.0), (-1, 2.0)), None),
        (results((0, 1.0), (2, 2.0)), None),
        (results((0, 1.0), (True, 2.0)), None),
        (results((0, 1.0), (1.0, 2.0)), None),
        (results((0, 1.0), ("1", 2.0)), None),
        (results((0, 1.0), ([], 2.0)), None),
        (results((0, 1.0), (0, 2.0)), None),
        (results((0, 1.0)), None),
        (results((0, 1.0), (1, 2.0)), 1),
        (results((0, 1.0), (1, 2.0), (1, 2.0)), None),
        (results((0, 1.0), (1, math.nan)), None),
        (results((0, 1.0), (1, math.inf)), None),
        (results((0, 1.0), (1, 10**400)), None),
        (results((0, 1.0), (1, None)), None),
        (results((0, 1.0), (1, True)), None),
        ({"results": None}, None),
        ({"results": [{"index": 0, "logit": 1.0}, {"index": 1}]}, None),
        ([], None),
    ],
)
def test_an_answer_that_is_no_ranking(ask, azure, content, top_n):
    """-1 was the last document, True the second, and of two scores for one document the last counted."""
    azure.faults = [as_json(content, x_request_id="12ab-34")]
    ranking = ask(documents=["panda", "bear"], top_n=top_n)
    assert not ranking.reranked
    assert ranking.reason == "the endpoint's answer is no ranking of these documents (x-request-id 12ab-34)"
    assert len(azure.sizes) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 200, "body": b'{"results": [', "Content_Type": "application/json"},
        {"status": 200, "body": b"<html>sign in", "Content_Type": "text/html"},
        as_json(results((0, 1.0)), Content_Encoding="gzip"),
    ],
    ids=["cut off", "HTML", "no gzip"],
)
def test_an_answer_that_cannot_be_read_is_asked_for_once_more(ask, azure, local, fault):
    """Each time, all documents had been scored."""
    azure.faults = [fault] * 9
    assert is_the_given_one(ask(), "no ranking")
    assert len(azure.sizes) == 2
    azure.faults = [fault]
    assert is_the_local_one(ask(), local)


def test_an_answer_without_end(ask, azure):
    """The client kept up to 1.4 GB of it."""
    azure.faults = ["endless"]
    assert is_the_given_one(ask(budget=5.0), "more than 84,480 bytes")
    assert azure.written < 20 * 2**20, "what buffers of the system hold is more than what the client reads"


@pytest.mark.parametrize("hidden", ["", "busy", "200", "4" * 5000])
def test_a_hidden_status_that_is_none(ask, azure, hidden):
    azure.faults = [{"status": 424, "body": b"", "ms_azureml_model_error_statuscode": hidden}]
    assert is_the_given_one(ask(), "the endpoint answered 424")
    assert len(azure.sizes) == 1


def test_a_pause_that_the_server_asks_for(ask, azure, local):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    for headers in [{"Retry_After": soon}, {"x_ms_retry_after_ms": "1500"}]:
        azure.faults, azure.headers = [429], headers
        started = time.monotonic()
        assert is_the_local_one(ask(), local)
        assert time.monotonic() - started > 1
    azure.faults, azure.headers = [429], {"Retry_After": "soon", "x_ms_retry_after_ms": "later"}
    assert is_the_local_one(ask(), local), "what cannot be read is no reason to give up"


def test_an_endpoint_that_has_failed_is_left_alone(ask, azure, local, monkeypatch):
    """Each search waited for its whole budget, for as long as the endpoint was down."""
    url = f"{azure.url}?down"
    azure.faults = [503] * 1000
    assert is_the_given_one(ask(url=url, budget=0.5), "answered 503")
    azure.faults = []
    azure.forget()
    assert is_the_given_one(ask(url=url), "not asked, because the endpoint failed less than 5 s ago")
    assert azure.sizes == []
    assert is_the_local_one(ask(), local), "another endpoint is not affected"
    assert is_the_local_one(ask(url=url, fail_open=False), local)
    assert is_the_local_one(ask(url=url), local), "and its success is good news for all"
    monkeypatch.setattr(client, "REST", 0.2)
    azure.faults = ["slow"]
    assert is_the_given_one(ask(url=url, budget=0.5), "no answer")
    time.sleep(0.3)
    assert is_the_local_one(ask(url=url), local), "after a while it is asked again"


@pytest.mark.parametrize("fault", [400, 403, 404, 413, 302, {"status": 200, "body": b"{}"}])
def test_what_is_the_callers_fault_does_not_stop_other_calls(ask, azure, local, fault):
    url = f"{azure.url}?fault={uuid.uuid4()}"
    azure.faults = [fault] * (2 * len(DOCUMENTS))  # 413 is asked again with half of the documents
    assert not ask(url=url).reranked
    azure.faults = []
    assert is_the_local_one(ask(url=url), local)


def error_of(message: str, **more: str) -> bytes:
    return json.dumps({"error": {"code": "Wrong", "message": message, **more}}).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (error_of("top_n is a string"), "the endpoint answered 400: top_n is a string"),
        (error_of("cannot read: the patient has a rare illness"), "the endpoint answered 400"),
        (error_of("cannot read '...atient has a rare illness of the hea...'"), "the endpoint answered 400"),
        (error_of(f"no answer to {QUERY!r}"), "the endpoint answered 400"),
        (error_of(f"is {TOKEN!r} a key?"), "the endpoint answered 400"),
        (error_of("a", type="b"), "the endpoint answered 400"),
        (error_of("long " * 600_000), "the endpoint's answer has more than 66,560 bytes"),
        (error_of("two\nlines"), "the endpoint answered 400"),
        (b'{"error": "the patient"}', "the endpoint answered 400"),
        (b'{"error": {"code": 1, "message": ["the patient"]}}', "the endpoint answered 400"),
    ],
)
def test_a_reason_is_short_and_quotes_nothing(ask, azure, body, reason):
    """It goes to the log, and its message is another server's: one of 3 MB quoted a document."""
    azure.faults = [{"status": 400, "body": body, "Content_Type": "application/json", "x_request_id": "1a2b-" * 8}]
    documents = ["the patient has a rare illness of the heart", ""]
    found = ask(documents=documents).reason
    assert found.startswith(reason)
    assert len(found) <= 300
    assert ("answered 400:" in found) == ("answered 400:" in reason)
    assert found.endswith(f"(x-request-id {'1a2b-' * 8})")


def test_what_is_sent(ask, azure, local):
    """UTF-8, not six bytes for each letter: an endpoint takes 5 MB a second. And one name for all tries of a call."""
    azure.faults = [503, as_json(results((0, 1.0)))]
    assert ask(documents=["大熊猫 🐼"], budget=9.5).reranked
    assert "大熊猫 🐼".encode() in azure.bodies[0]
    first, second = azure.received
    assert uuid.UUID(first["x-ms-client-request-id"])
    assert first["x-ms-client-request-id"] == second["x-ms-client-request-id"]
    assert 0 < int(second["x-reranker-budget-ms"]) < int(first["x-reranker-budget-ms"]) <= 9500


def test_under_asyncio(azure, local):
    """As the docstring says. Meanwhile, the loop serves others."""

    async def search() -> tuple:
        ticks = 0
        work = asyncio.create_task(
            asyncio.to_thread(client.rerank_remote, QUERY, DOCUMENTS, url=azure.url, token=TOKEN, budget=20)
        )
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return work.result(), ticks

    azure.faults, azure.headers = [503], {"x_ms_retry_after_ms": "500"}
    ranking, ticks = asyncio.run(search())
    assert is_the_local_one(ranking, local)
    assert ticks > 5


def test_no_thread_can_be_started(ask, azure, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert is_the_given_one(ask(), "RuntimeError in the request")


def test_a_certificate_that_cannot_be_verified(ask, tmp_path):
    """Only a new certificate, or another list of authorities, can mend that."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                connections.append(listener.accept()[0])
                with suppress(OSError):
                    context.wrap_socket(connections[-1], server_side=True)

        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        ranking = ask(url=f"https://127.0.0.1:{listener.getsockname()[1]}/score", budget=10)
        assert is_the_given_one(ranking, "SSLError: check url, https://..., and the proxy")
        assert time.monotonic() - started < 5
    assert len(connections) == 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_fails_all_documents_come_back_in_time(ask, azure, local, seed):
    generator = random.Random(seed)
    azure.faults = generator.choices([None, 429, 503, "reset", "slow", "drip", 401, 400], k=6)
    azure.faults = [None if fault == 401 else fault for fault in azure.faults]
    ranking = ask(budget=generator.choice([0.3, 1.0, 3.0]))
    assert is_the_local_one(ranking, local) if ranking.reranked else is_the_given_one(ranking, "")


FAULTS = [
    *[None] * 8,
    *["reset", "slow", "drip", "cut", "endless", 200, 302, 400, 401, 403, 408, 413, 424, 429, 500, 502, 503, 504],
    as_json(results((0, math.nan))),
    as_json({}),
    {"status": 200, "body": b"{", "Content_Type": "application/json"},
    {"status": 429, "body": b"", "Retry_After": "1"},
    {"status": 424, "body": b"", "ms_azureml_model_error_statuscode": "busy"},
]


def test_two_hundred_calls_with_faults_of_all_kinds_side_by_side(azure, local):
    """Nothing is lost, nothing is scrambled, no call is late, and no thread is left.

    `pytest -n 0 -s -k two_hundred tests/test_azure_client.py` shows by how much the worst one was late.
    """
    azure.faults = random.Random(0).choices(FAULTS, k=400)
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        """The client's threads: all new ones but those in which the front answers."""
        new = set(threading.enumerate()) - before
        return [thread for thread in new if "process_request_thread" not in thread.name]

    def call(number: int) -> tuple:
        documents = random.Random(number).sample(DOCUMENTS, 12)
        budget = random.Random(number).choice([0.3, 1.0, 3.0])
        url = f"{azure.url}?{uuid.uuid4()}"
        started = time.monotonic()
        ranking = client.rerank_remote(QUERY, documents, url=url, token=lambda: TOKEN, budget=budget)
        return documents, ranking, time.monotonic() - started - budget

    scores = {DOCUMENTS[index]: score for index, score in local}
    with ThreadPoolExecutor(16) as pool:
        calls = list(pool.map(call, range(200)))
    last = time.monotonic()
    while left() and time.monotonic() < last + 2:
        time.sleep(0.05)
    late = max(late for _, _, late in calls)
    reranked = [ranking for _, ranking, _ in calls if ranking.reranked]
    print(f"\n{len(reranked)} of 200 reranked, the worst was {late:.3f} s late, {len(left())} threads left")
    assert not left()
    assert late < SLACK
    assert 0 < len(reranked) < 200
    for documents, ranking, _ in calls:
        assert [documents[result.index] for result in ranking.results] == [
            result.document for result in ranking.results
        ]
        assert sorted(result.index for result in ranking.results) == list(range(12))
        assert ranking.reranked or ([result.index for result in ranking.results] == list(range(12)) and ranking.reason)
        if ranking.reranked:
            found = [result.score for result in ranking.results]
            assert found == sorted(found, reverse=True)
            assert found == pytest.approx([scores[result.document] for result in ranking.results], abs=1e-5)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server that takes long for long documents: the stand-in is a real model, if a small one."""
    model = ROOT / "tests" / "stand_in_model"
    cpu = {"RERANKER_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    with running(model, tmp_path_factory.mktemp("slow") / "log.txt", **cpu) as azure:
        yield azure


LONG = [f"{number} {' '.join(WORDS * 40)}" for number in range(600)]  # a minute and more for one core


@pytest.mark.parametrize(("keeps_connections", "clients"), [(True, 1), (False, 1), (False, 12)])
def test_the_server_stops_working_on_what_nobody_waits_for(slow, keeps_connections, clients):
    """The next client waited until all that was done. Through the front the server knows it from the header alone, else
    also from the closed connection, and drops what has waited in its queue."""
    url = slow.url if keeps_connections else slow.behind
    stopped = len(re.findall(r"POST /score\S* 408", slow.server.log.read_text()))

    def leave_early(_) -> str:
        return client.rerank_remote(QUERY, LONG, url=f"{url}?{uuid.uuid4()}", token=TOKEN, budget=1.0).reason

    with ThreadPoolExecutor(clients) as pool:
        reasons = list(pool.map(leave_early, range(clients)))
    assert all(reason.startswith(("no answer", "the endpoint answered 408")) for reason in reasons)
    started = time.monotonic()
    ranking = client.rerank_remote(QUERY, ["panda"], url=url, token=TOKEN, budget=60)
    waited = time.monotonic() - started
    print(f"\nafter {clients} that had left, one document took {waited:.2f} s")
    assert ranking.reranked
    assert waited < 5
    assert len(re.findall(r"POST /score\S* 408", slow.server.log.read_text())) == stopped + clients


def test_a_header_that_is_no_budget(azure):
    reply = requests.post(
        azure.behind, json={"query": QUERY, "documents": ["a"]}, headers={"x-reranker-budget-ms": "1.5"}, timeout=20
    )
    assert reply.status_code == 400
    message = "the header x-reranker-budget-ms is '1.5', expected a whole number: send milliseconds"
    assert reply.json()["error"] == {"code": "WrongType", "message": message}


def test_the_file_can_be_copied():
    """It imports what it says, and nothing of this repository."""
    source = (ROOT / "azureml" / "client.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"requests", "urllib3"}  # the second comes with the first
