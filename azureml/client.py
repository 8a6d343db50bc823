"""Rerank on the endpoint, from an application. Copy this file: it needs `requests`, and `azure-identity` for the token.

    from azure.identity import DefaultAzureCredential, get_bearer_token_provider

    token = get_bearer_token_provider(DefaultAzureCredential(), "https://ml.azure.com/.default")
    ranking = rerank_remote("what is a panda?", documents, top_n=3, url=scoring_uri, token=token)

A search must not fail because its reranker does, nor wait long for it. So a call has a time budget. Within it, failures
that may be temporary are retried; after it, the documents come back in the order in which they were given.
"""

import json
import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import requests
import urllib3  # requests brings it

MAX_DOCUMENTS, MAX_BYTES = 1000, 8 * 2**20  # of a request; a deployment that allows less answers 413 and gets halves
RETRIED = {408, 429, 500, 502, 503, 504}  # what may be temporary: a timeout, too many requests, a server that restarts
REST = 5.0  # seconds in which an endpoint that failed is not asked again, unless `fail_open` is False

logger = logging.getLogger(__name__)
_resting: dict[str, float] = {}  # endpoints that failed: until when they are not asked


class Result(NamedTuple):
    """A document, its raw logit (None if the documents were not reranked), and its position in the input."""

    document: str
    score: float | None
    index: int  # type: ignore[assignment]  # hides a method that all tuples have


class Ranking(NamedTuple):
    """The documents, best first; if not `reranked`, as given, and `reason` says why without quoting text or token."""

    results: list[Result]
    reranked: bool
    reason: str


class RerankFailed(Exception):
    """The documents could not be reranked. The message says why."""


def rerank_remote(
    query: str, documents: Iterable[str], top_n: int | None = None, *, url: str, token: str | Callable[[], str],
    budget: float = 5.0, fail_open: bool = True, max_length: int | None = None, stride: int | None = None,
    session: requests.Session | None = None,
) -> Ranking:  # fmt: skip
    """Sort documents by their relevance to a query, best first. Scores are raw logits.

    Too many for one request are sent in several and merged; if one fails, the call fails. Under asyncio, write
    `ranking = await asyncio.to_thread(rerank_remote, query, documents, url=scoring_uri, token=token)`.

    Args:
        query, documents, top_n, max_length, stride: as in `reranker_helpers.rerank`, but all documents are strings.
        url: the endpoint's scoring URI. Redirects are not followed: the token is for this address alone.
        token: the endpoint's key, or a function that returns a valid token.
        budget: seconds that the call may take, getting the token included. `math.inf` is no limit, 0 or less a failure.
        fail_open: if the documents cannot be reranked in time, whether to return them as given (True) or to raise.
        session: keeps connections open between calls. Default: a new connection for each request.

    Raises TypeError or ValueError for bad input, which the message names, and `RerankFailed` if not `fail_open`.
    """
    what = f"documents is {type(documents).__name__}"
    if hasattr(documents, "columns"):  # iterating over a DataFrame gives the names of its columns
        raise TypeError(f"{what}, a table, expected a list of strings: pass one column, such as table['text']")
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(f"{what}, expected a list of strings: put it into brackets?")
    documents = list(documents.to_pylist() if hasattr(documents, "to_pylist") else documents)  # Arrow's are not str
    for name, text in [("query", query), *((f"documents[{place}]", text) for place, text in enumerate(documents))]:
        if not isinstance(text, str):
            raise TypeError(f"{name} is {type(text).__name__}, expected str")
        if surrogate := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{name} is no valid Unicode: lone surrogate at character {surrogate.start()}")
    request: dict[str, Any] = {"query": query}
    for name, number, least in [("top_n", top_n, 1), ("max_length", max_length, 1), ("stride", stride, 0)]:
        if isinstance(number, bool) or not (number is None or hasattr(number, "__index__")):
            raise TypeError(f"{name} is {type(number).__name__}, expected a whole number")
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, expected at least {least}")
        request[name] = None if number is None else number.__index__()  # json takes no numbers of NumPy
    if isinstance(budget, bool) or not hasattr(budget, "__float__"):
        raise TypeError(f"budget is {type(budget).__name__}, expected a number of seconds")
    call = _Call(url, token, session, budget)
    try:
        logits = call.run(request, documents, fail_open)
    except Exception as error:
        if call.failing:
            _resting[call.url] = time.monotonic() + REST
        reason = str(error) if isinstance(error, RerankFailed) else f"{type(error).__name__} in the request"
        if not fail_open:
            raise RerankFailed(reason) from error
        logger.warning("not reranked: %s (x-ms-client-request-id %s)", reason, call.headers["x-ms-client-request-id"])
        return Ranking([Result(text, None, index) for index, text in enumerate(documents)][:top_n], False, reason)
    order = sorted(logits, key=lambda index: (-logits[index], index))[:top_n]
    return Ranking([Result(documents[index], logits[index], index) for index in order], True, "")


class _Call:
    """Sends the requests of a call, and again after failures that may be temporary, within its budget."""

    def __init__(self, url: str, token: str | Callable[[], str], session: requests.Session | None, budget: float):
        self.url, self.token, self.budget, self.started = str(url), token, budget, time.monotonic()
        self.deadline = self.started + float(min(budget, 1e6))  # for locks and sockets, which take no longer timeouts
        # Without auth, the user and password of a .netrc would replace the token.
        self.post = partial((session or requests).post, self.url, auth=lambda r: r, allow_redirects=False, stream=True)
        self.headers = {"Content-Type": "application/json", "x-ms-client-request-id": str(uuid.uuid4())}
        self.failing = False  # whether the endpoint was asked, and answered nothing or that it failed

    def run(self, request: dict[str, Any], documents: list[str], fail_open: bool) -> dict[int, float]:
        """Return logits by index, of all documents or at least of the best `top_n`. Raises RerankFailed."""
        if not self.budget > 0:  # nan is not
            raise RerankFailed(f"budget is {self.budget} s, expected more than 0")
        if fail_open and self.started < _resting.get(self.url, 0.0):
            raise RerankFailed(f"not asked, because the endpoint failed less than {REST:g} s ago")
        if self.url in _resting:
            _resting[self.url] = self.started + REST  # one call finds out for all
        future: Future[dict[int, float]] = Future()

        def work() -> None:
            try:
                future.set_result(self.logits(request, documents) if documents else {})
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # looking up a name and getting a token have no timeout
        if not wait([future], self.deadline - self.started).done:
            with suppress(Exception):  # there is no answer to wait for, or urllib3 is older than 2.3
                self.response.raw.shutdown()  # ends the thread if it waits for the rest of one
            raise RerankFailed(f"no answer within {self.budget} s")
        return future.result()

    def logits(self, request: dict[str, Any], documents: list[str]) -> dict[int, float]:
        count, half = len(documents), len(documents) // 2
        status, answer, name = self.send({**request, "documents": documents})
        if status == 413 and half:
            second = self.logits(request, documents[half:])
            return self.logits(request, documents[:half]) | {half + index: logit for index, logit in second.items()}
        if status != 200:
            message = ": a redirect, is url the endpoint's scoring URI?" if 300 <= status < 400 else ""
            with suppress(AttributeError, KeyError, TypeError):  # an error in another form than that of score.py
                error, said = answer["error"], answer["error"]["message"][:211]
                texts = [request["query"], *documents, self.headers["Authorization"].removeprefix("Bearer ")]
                parts = [said[begin : begin + 15] for begin in range(0, len(said) - 14, 15)]
                quoted = any((len(text) > 3 and text in said) or any(part in text for part in parts) for text in texts)
                if error.keys() == {"code", "message"} and said.isprintable() and len(said) < 211 and not quoted:
                    message = f": {said}"
            raise RerankFailed(f"the endpoint answered {status}{message}{name}")
        with suppress(KeyError, TypeError):
            found = [(result["index"], result["logit"]) for result in answer["results"]]
            right = all(type(index) is int and type(logit) in (int, float) for index, logit in found)  # True is not
            logits = {index: float(logit) for index, logit in found if 0 <= index < count and abs(logit) < 1e300}
            if right and len(logits) == len(found) == min(request["top_n"] or count, count):
                return logits
        raise RerankFailed(f"the endpoint's answer is no ranking of these documents{name}")

    def send(self, request: dict[str, Any]) -> tuple[int, Any, str]:
        """Return the answer's status, JSON (None if it is none) and, for support, its name. Raises RerankFailed."""
        body, limit = json.dumps(request, ensure_ascii=False).encode(), 2**16 + 512 * len(request["documents"])
        if len(request["documents"]) > MAX_DOCUMENTS or len(body) > MAX_BYTES:
            return 413, None, ""
        pause, spare = 0.1, True
        while True:
            self.headers["Authorization"] = f"Bearer {self.checked_token()}"
            left = max(0.001, self.deadline - time.monotonic())
            self.headers["x-reranker-budget-ms"] = str(int(1000 * left))
            timeout, self.failing = urllib3.Timeout(total=left), True
            text, answer, name, asked = b"", None, "", 0.0
            try:
                # requests' types leave out that it takes a Timeout of urllib3.
                with self.post(data=body, headers=self.headers, timeout=timeout) as self.response:  # type: ignore[arg-type]
                    status, headers = self.response.status_code, self.response.headers
                    of_script = headers.get("ms-azureml-model-error-statuscode", "")
                    if status == 424 and re.fullmatch("[45][0-9]{2}", of_script):
                        status = int(of_script)
                    if re.fullmatch("[A-Za-z0-9-]{1,40}", headers.get("x-request-id", "")):
                        name = f" (x-request-id {headers['x-request-id']})"
                    with suppress(KeyError, ValueError, urllib3.exceptions.InvalidHeader):
                        asked = urllib3.Retry().get_retry_after(self.response.raw) or 0.0  # from seconds or a date
                        asked = float(headers["x-ms-retry-after-ms"]) / 1000
                    with suppress(ValueError, requests.exceptions.ContentDecodingError):
                        for piece in self.response.iter_content(2**14):
                            text += piece
                            if len(text) > limit or time.monotonic() > self.deadline:
                                raise RerankFailed(f"the endpoint's answer has more than {limit:,} bytes{name}")
                        answer = json.loads(text)
            except (requests.RequestException, ValueError) as error:
                status, failure = 0, error
                if isinstance(error, ValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                    self.failing = False
                    raise RerankFailed(f"{type(error).__name__}: check url, https://..., and the proxy") from error
            self.failing = status in RETRIED or not 0 < status < 500
            if not self.failing:
                _resting.pop(self.url, None)
            once = (status == 401 and callable(self.token)) or (status == 200 and answer is None)
            asked = max(random.uniform(pause / 2, pause), asked)  # random, or all clients would come back together
            if time.monotonic() + asked > self.deadline or not (status in (0, *RETRIED) or (once and spare)):
                if status:
                    return status, answer, name
                raise RerankFailed(f"no answer in time: {type(failure).__name__}") from failure
            spare, pause = spare and not once, min(2 * pause, 5.0)
            time.sleep(asked)

    def checked_token(self) -> str:
        """Return the token. Raises RerankFailed, which never quotes it, if no header can hold it."""
        name, token = "token", self.token
        if callable(token):
            name, get = "token()", token
            try:
                token = get()
            except Exception:  # it asks a service, which may fail once
                token = get()
        if not isinstance(token, str):
            raise RerankFailed(f"{name} is {type(token).__name__}, expected str")
        if not token.strip():
            raise RerankFailed(f"{name} is empty: pass the endpoint's key, or a function that returns a token")
        if not (token.isascii() and token.isprintable()):
            raise RerankFailed(f"{name} has a line break or another character that no header may hold: strip() it?")
        return token
