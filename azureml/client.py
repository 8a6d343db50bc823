"""Rerank on the endpoint, from an application. Copy this file: it needs `requests`, and `azure-identity` for the token.

    from azure.identity import DefaultAzureCredential, get_bearer_token_provider

    token = get_bearer_token_provider(DefaultAzureCredential(), "https://ml.azure.com/.default")
    ranking = rerank_remote("what is a panda?", documents, top_n=3, url=scoring_uri, token=token)

A search must not fail because its reranker does, nor wait long for it. So a call has a time budget. Within it, failures
that may be temporary are retried; after it, the documents come back in the order in which they were given.
"""

import json
import logging
import math
import numbers
import operator
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import requests

MAX_DOCUMENTS, MAX_BYTES = 1000, 8 * 2**20
"""The most that one request holds. If the deployment's limits are lower it answers 413, and the request is halved."""

RETRIED = {408, 429, 500, 502, 503, 504}
"""HTTP statuses that may be temporary: a timeout, too many requests, a server that fails or restarts."""

logger = logging.getLogger(__name__)


class Result(NamedTuple):
    """A document and its score."""

    document: str
    score: float | None
    """The raw logit; None if the documents were not reranked."""
    index: int
    """Position in the input."""


class Ranking(NamedTuple):
    """The documents, best first; in the order in which they were given if `reranked` is False."""

    results: list[Result]
    reranked: bool
    reason: str
    """Why they were not reranked, else "". It never quotes the query, a document or the token."""


class RerankFailed(Exception):
    """The documents could not be reranked. The message says why."""


def rerank_remote(
    query: str,
    documents: Iterable[str],
    top_n: int | None = None,
    *,
    url: str,
    token: str | Callable[[], str],
    budget: float = 5.0,
    fail_open: bool = True,
    max_length: int | None = None,
    stride: int | None = None,
    session: requests.Session | None = None,
) -> Ranking:
    """Sort documents by their relevance to a query, best first.

    Too many documents for one request are sent in several, one after the other, and merged: scores of different
    requests can be compared. If one of them fails, the whole call fails.

    Args:
        query: the question or search text.
        documents: strings in a list, a column of a table or a generator, in the order of the first-stage search.
        top_n: how many to return, at least 1. Default: all.
        url: the endpoint's scoring URI. Redirects are not followed: the token is for this address alone.
        token: the endpoint's key, or a function that returns a valid token.
        budget: seconds that the call may take, getting the token included. `math.inf` is no limit, 0 or less a failure.
        fail_open: if the documents cannot be reranked in time, whether to return them as given (True) or to raise.
        max_length, stride: in tokens, as in `reranker_helpers.rerank`. Default: the endpoint's, 512 and no windows.
        session: keeps connections open between calls. Default: a new connection for each request.

    Returns:
        A `Ranking`; its scores are raw logits.

    Raises:
        TypeError, ValueError: bad input; the message names it, as in `documents[3] is NoneType, expected str`.
        RerankFailed: the documents could not be reranked, because of `url` or `token` too, and `fail_open` is False.
    """
    documents = _as_list(documents)
    for name, text in [("query", query), *((f"documents[{place}]", text) for place, text in enumerate(documents))]:
        if not isinstance(text, str):
            raise TypeError(f"{name} is {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is no valid Unicode: lone surrogate at character {error.start}") from None
    request: dict[str, Any] = {"query": query, "top_n": top_n, "max_length": max_length, "stride": stride}
    for name, number, least in [("top_n", top_n, 1), ("max_length", max_length, 1), ("stride", stride, 0)]:
        if isinstance(number, bool) or not (number is None or hasattr(number, "__index__")):
            raise TypeError(f"{name} is {type(number).__name__}, expected a whole number")
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, expected at least {least}")
        request[name] = None if number is None else operator.index(number)  # json takes no numbers of NumPy
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget is {type(budget).__name__}, expected a number of seconds")
    logits: dict[int, float] | Exception = RerankFailed(f"budget is {budget} s, expected more than 0")
    if budget > 0:  # nan is not
        budget = float(min(budget, 1e6))  # eleven days: locks and sockets refuse timeouts that are much longer
        send = _Sender(url, token, (session or requests).post, time.monotonic() + budget)
        logits = _within(budget, lambda: _logits(request, documents, send))
    if isinstance(logits, dict):
        order = sorted(logits, key=lambda index: (-logits[index], index))[:top_n]
        return Ranking([Result(documents[index], logits[index], index) for index in order], True, "")
    reason = str(logits) if isinstance(logits, RerankFailed) else f"{type(logits).__name__} in the request"
    if not fail_open:
        raise RerankFailed(reason) from logits
    logger.warning("not reranked: %s", reason)
    return Ranking([Result(document, None, index) for index, document in enumerate(documents)][:top_n], False, reason)


def _as_list(documents: Iterable[str]) -> list[str]:
    """Return the documents as a list. Raises TypeError for a string, dict or table, as `rerank` does."""
    what = f"documents is {type(documents).__name__}"
    if hasattr(documents, "columns"):  # iterating over a DataFrame gives the names of its columns
        raise TypeError(f"{what}, a table, expected a list of strings: pass one column, such as table['text']")
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(f"{what}, expected a list of strings: put it into brackets?")
    return documents.to_pylist() if hasattr(documents, "to_pylist") else list(documents)  # Arrow's strings are not str


def _within(budget: float, work: Callable[[], dict[int, float]]) -> dict[int, float] | Exception:
    """Return what `work` returns or raises, or RerankFailed after `budget` seconds."""
    outcome: queue.SimpleQueue[dict[int, float] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(work())
        except Exception as error:
            outcome.put(error)

    # In a thread, because looking up a name and getting a token have no timeout, and that of `requests` is per read.
    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.get(timeout=budget)
    except queue.Empty:
        return RerankFailed(f"no answer within {budget} s")


def _logits(request: dict[str, Any], documents: list[str], send: Callable[..., Any]) -> dict[int, float]:
    """Return logits by index, of all documents or at least of the best `top_n`. Raises RerankFailed."""
    logits: dict[int, float] = {}
    parts = [range(len(documents))[begin : begin + MAX_DOCUMENTS] for begin in range(0, len(documents), MAX_DOCUMENTS)]
    while parts:
        part = parts.pop()
        body = json.dumps({**request, "documents": [documents[index] for index in part]}).encode()
        status, answer = send(body) if len(body) <= MAX_BYTES else (413, {})
        if status == 413 and len(part) > 1:
            parts += [part[: len(part) // 2], part[len(part) // 2 :]]
            continue
        if status != 200:
            error = answer.get("error")
            message = error.get("message") if isinstance(error, dict) else None
            if 300 <= status < 400:
                message = "a redirect, is url the endpoint's scoring URI?"
            raise RerankFailed(f"the endpoint answered {status}" + (f": {message}" if message else ""))
        scores = {part[result["index"]]: float(result["logit"]) for result in answer["results"]}
        if len(scores) != min(request["top_n"] or len(part), len(part)) or not all(map(math.isfinite, scores.values())):
            raise RerankFailed("the endpoint's answer is no ranking of these documents")
        logits |= scores
    return logits


class _Sender(NamedTuple):
    """Sends a request, and again after temporary failures, until the deadline."""

    url: str
    token: str | Callable[[], str]
    post: Callable[..., requests.Response]
    deadline: float

    def __call__(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the answer's status and JSON; where Azure hides the scoring script's status behind 424, that one."""
        pause = 0.1
        while True:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.checked_token()}"}
            failure, after = None, ""
            try:
                response = self.post(
                    self.url,
                    data=body,
                    headers=headers,
                    auth=lambda request: request,  # else the user and password of a .netrc would replace the token
                    timeout=max(0.001, self.deadline - time.monotonic()),
                    allow_redirects=False,
                )
                status = int(response.headers.get("ms-azureml-model-error-statuscode", response.status_code))
                after = response.headers.get("Retry-After", "")
                answer = response.json() if "json" in response.headers.get("Content-Type", "") else {}
                if status not in RETRIED:
                    return status, answer
            except (requests.RequestException, ValueError) as error:
                # Such as InvalidURL, which no retry mends. JSONDecodeError, of an answer, is a ValueError too.
                if isinstance(error, ValueError) and not isinstance(error, requests.JSONDecodeError):
                    raise RerankFailed(f"{type(error).__name__}: check url, https://..., and the proxy") from error
                failure = error
            # Random, or all clients would come back at the same moment.
            wait = max(random.uniform(pause / 2, pause), float(after) if after.isdecimal() else 0.0)
            if time.monotonic() + wait > self.deadline:
                if failure is None:
                    return status, answer
                raise RerankFailed(f"no answer in time: {type(failure).__name__}") from failure
            time.sleep(wait)
            pause = min(2 * pause, 5.0)

    def checked_token(self) -> str:
        """Return the token. Raises RerankFailed, which never quotes it, if no header can hold it."""
        name, token = ("token()", self.token()) if callable(self.token) else ("token", self.token)
        if not isinstance(token, str):
            raise RerankFailed(f"{name} is {type(token).__name__}, expected str")
        if not token.strip():
            raise RerankFailed(f"{name} is empty: pass the endpoint's key, or a function that returns a token")
        if not (token.isascii() and token.isprintable()):
            raise RerankFailed(f"{name} has a line break or another character that no header may hold: strip() it?")
        return token
