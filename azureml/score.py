"""Scoring script of the online endpoint: a request in, the ranking as JSON out.

Azure's inference server calls `init()` once per worker and `run()` once per request. `answer()` turns the request's
bytes into the answer; it is a plain function that needs no server.

Request: {"query": str, "documents": [str or {"text": str}], "top_n"?: int, "return_documents"?: bool,
          "max_length"?: int, "stride"?: int, "max_tokens_per_doc"?: int, "model"?: str}, lengths in tokens
Answer:  {"model": str, "results": [{"index": int, "relevance_score": float, "logit": float, "truncated": bool,
          "document"?: {"text": str}}], "usage": {"total_tokens": int}}, best document first
Error:   {"error": {"code": str, "message": str}}

Header:  x-reranker-budget-ms, the milliseconds for which the client waits; client.py sends it. When they are over, or
         the client has closed its connection, the ranking ends with status 408 before its next batch. They count from
         when the worker begins with the request: how long that lay in a queue, the worker cannot know. But a client
         that left meanwhile has closed its connection, and its request is dropped at once; where a proxy keeps the
         connection open, the request takes the milliseconds at most.
"""

import logging
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
from azureml_inference_server_http.api.aml_request import rawhttp
from azureml_inference_server_http.api.aml_response import AMLResponse

# The server puts neither this folder nor its parent on the path; reranker_helpers is uploaded beside azureml/.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weights import load_model
from wire import Limits, Refused, Request, check_tokens, error_json, length_of, parse

from reranker_helpers import Reranker, before_each_batch, rerank

# The server has handlers for "azmlinfsrv" and its children only: INFO lines of other loggers are lost.
logger = logging.getLogger("azmlinfsrv.score")


def init() -> None:
    """Load the model and read the limits from the environment.

    Raises what `weights.load_model` raises, and ValueError if a limit is not a positive whole number.
    """
    global _reranker, _model_name, _limits
    started = time.perf_counter()
    _limits = Limits.from_environment()
    _reranker, _model_name = load_model()
    model, _, device = _reranker
    seconds = time.perf_counter() - started
    logger.info("%s ready on %s in %s after %.1f s, %s", _model_name, device, model.dtype, seconds, _limits)


def answer(
    body: bytes,
    reranker: Reranker,
    model_name: str,
    limits: Limits,
    request_id: str,
    check: Callable[[], object] = lambda: None,
) -> tuple[int, dict[str, Any]]:
    """Serve one request.

    Args:
        body: the request's JSON in UTF-8.
        reranker: from `load_reranker`.
        model_name: for the answer's "model".
        limits: of the request.
        request_id: names the request in the answer and the log after an internal error.
        check: called at first and before each batch. It raises `Refused` if nobody waits for the answer any more.

    Returns:
        HTTP status, and the answer or the error as JSON. It never raises.
    """
    try:
        check()
        with before_each_batch(check):
            return 200, _rank(parse(body, limits), reranker, model_name, limits)
    except Refused as refused:
        return refused.status, error_json(refused.code, str(refused))
    except Exception as error:
        # Type and frames only, because an exception's message may quote a text. Those of torch hold only numbers, and
        # are needed.
        frames = "".join(traceback.format_tb(error.__traceback__))
        message = str(error) if isinstance(error, RuntimeError | ArithmeticError) else "message withheld"
        logger.error("request %s failed: %s (%s)\n%s", request_id, type(error).__name__, message, frames)
        return 500, error_json(
            "InternalError", f"The ranking failed. The deployment's log says why under request id {request_id}"
        )


def _rank(request: Request, reranker: Reranker, model_name: str, limits: Limits) -> dict[str, Any]:
    query, documents, options = request
    max_length = length_of(query, options, reranker, limits)
    check_tokens([(query, text) for text in documents], "documents", max_length, options.stride, reranker, limits)
    results = rerank(query, documents, *reranker, max_length=max_length, stride=options.stride)
    ranking = [
        {
            "index": result.index,
            "relevance_score": result.probability,
            "logit": result.score,
            "truncated": result.truncated,
        }
        | ({"document": {"text": result.document}} if options.return_documents else {})
        for result in results[: options.top_n]
    ]
    read = {result.document: result.tokens for result in results}  # equal documents are read, and counted, once
    return {"model": model_name, "results": ranking, "usage": {"total_tokens": sum(read.values())}}


def _check_of(request: flask.Request) -> Callable[[], None]:
    """Return a function that raises `Refused` once the client waits no longer, by its header and its connection."""
    budget = request.headers.get("x-reranker-budget-ms")
    begun = time.monotonic()
    connection = request.environ.get("gunicorn.socket")  # None under other servers, such as the one for Windows

    def check() -> None:
        if budget is None:
            return
        if not budget.isdecimal() or len(budget) > 12:
            message = f"the header x-reranker-budget-ms is {budget[:40]!a}, expected a whole number: send milliseconds"
            raise Refused(400, "WrongType", message)
        if time.monotonic() > begun + int(budget) / 1000 or (connection is not None and _is_closed(connection)):
            message = f"the {int(budget):,} ms of the client are over, or it has left: send less, or allow more time"
            raise Refused(408, "BudgetExceeded", message)

    return check


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection from which the request was read."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:  # there is nothing to read yet
        return False
    except OSError:
        return True


@rawhttp
def run(request: flask.Request) -> AMLResponse:
    """Serve one HTTP request.

    It takes the raw request for its content type, for bytes that are not UTF-8, and to limit the size while reading.
    """
    check = _check_of(request)
    # The rest is read and discarded: if the connection were closed before the client has sent all, it would miss the
    # answer.
    body = request.stream.read(_limits.body_bytes + 1)
    while request.stream.read(2**16):
        pass
    if request.method != "POST":
        status, message = 405, error_json("MethodNotAllowed", f"the method is {request.method}, expected POST")
    elif request.content_encoding not in (None, "", "identity"):
        name = f"the header Content-Encoding is {request.content_encoding[:40]!a}"
        status, message = 415, error_json("Compressed", f"{name}: send the JSON as it is, uncompressed")
    elif not request.is_json:
        status, message = 415, error_json("NoJson", "the header Content-Type is missing or not application/json")
    else:
        status, message = answer(body, _reranker, _model_name, _limits, flask.g.request_id, check)
    return AMLResponse(message, status, json_str=True)
