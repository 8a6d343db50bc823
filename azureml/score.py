"""Scoring script of the online endpoint: a request for a reranking in, the ranking as JSON out.

Azure's inference server calls `init()` once per worker and `run()` per request. Everything between the request's bytes
and the answer is `answer()`, a plain function that needs no server.

Request: {"query": str, "documents": [str or {"text": str}], "top_n"?: int, "return_documents"?: bool,
          "max_length"?: int, "stride"?: int, "model"?: str}
Answer:  {"model": str, "results": [{"index": int, "relevance_score": float, "logit": float, "truncated": bool,
          "document"?: {"text": str}}], "usage": {"total_tokens": int}}, best document first
Error:   {"error": {"code": str, "message": str}}
"""

import json
import logging
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import flask
from azureml_inference_server_http.api.aml_request import rawhttp
from azureml_inference_server_http.api.aml_response import AMLResponse
from transformers import PreTrainedTokenizerBase

# The server puts neither this folder nor the one above it on the path; reranker_helpers is uploaded beside azureml/.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reranker_helpers import MAX_LENGTH, Reranker, load_reranker, rerank
from reranker_helpers.scoring import check_text

# The server configures handlers for "azmlinfsrv" and what is below it. INFO lines of other loggers are lost.
logger = logging.getLogger("azmlinfsrv.score")

TOKENIZER_TOKENS = 2_000_000
"""What the tokenizer may produce for one request: it keeps about 300 bytes a token, also of text that is cut off."""

FIELDS = ("query", "documents", "top_n", "return_documents", "max_length", "stride", "model")


class Limits(NamedTuple):
    """What one request may ask for. A request at the limits must end within the deployment's timeout.

    Each can be set by an environment variable of the deployment: RERANKER_MAX_DOCUMENTS, RERANKER_MAX_TOKENS,
    RERANKER_MAX_LENGTH, RERANKER_MAX_BODY_BYTES.
    """

    documents: int = 1000
    tokens: int = 512_000
    """Sum over all inputs of the model, the query's tokens counted each time: 1,000 documents of 512."""
    length: int = 8192
    """The largest `max_length`; the model's own limit holds too."""
    body_bytes: int = 8 * 2**20

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the variables. Raises ValueError for a value that is no positive whole number."""
        limits = {}
        for field in cls._fields:
            variable = f"RERANKER_MAX_{field.upper()}"
            value = os.environ.get(variable, str(cls._field_defaults[field]))
            if not value.isdecimal() or int(value) == 0:
                raise ValueError(f"the environment variable {variable} is {value!r}, expected a positive whole number")
            limits[field] = int(value)
        return cls(**limits)


class Request(NamedTuple):
    """A request that is well-formed and within the limits, as far as that shows without counting tokens."""

    query: str
    documents: list[str]
    top_n: int | None
    return_documents: bool
    max_length: int
    stride: int | None


class Refused(Exception):
    """The request can't be served, and the client can mend it: the HTTP status, a code and a message for the client."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code


def init() -> None:
    """Load the model from the folder in AZUREML_MODEL_DIR, and score once, so that the first request isn't slow.

    Raises:
        RuntimeError: the weights are missing or incomplete, then the message lists the folder; or the environment
            variable RERANKER_DEVICE names a device that is not there.
        ValueError: a limit in the environment is no positive whole number.
    """
    global _reranker, _model_name, _limits
    started = time.perf_counter()
    _limits = Limits.from_environment()
    folder = find_model(os.environ.get("AZUREML_MODEL_DIR", ""))
    try:
        # A folder's path, so nothing is looked up on the hub. A deployment that pays for a GPU says "cuda", so that a
        # missing driver fails here and now, not as a slow endpoint.
        _reranker = load_reranker(folder, device=os.environ.get("RERANKER_DEVICE"))
    except OSError as error:
        raise RuntimeError(f"{error}. {_listing(folder)}") from error
    _model_name = os.environ.get("RERANKER_MODEL_NAME", folder.name)
    rerank("warm-up", ["warm-up"], *_reranker)
    model, _, device = _reranker
    seconds = time.perf_counter() - started
    logger.info("%s ready on %s in %s after %.1f s, %s", _model_name, device, model.dtype, seconds, _limits)


def find_model(model_dir: str) -> Path:
    """Return the one folder with a config.json at or below `model_dir`: how deep Azure puts it depends on the upload.

    Raises RuntimeError, with a listing of what is there, when there is none or more than one.
    """
    root = Path(model_dir).absolute()
    if not model_dir or not root.is_dir():
        raise RuntimeError(f"AZUREML_MODEL_DIR is {model_dir!r}, which is no folder: does the deployment have a model?")
    folders = [file.parent for file in sorted(root.rglob("config.json"))]
    if len(folders) != 1:
        raise RuntimeError(f"{len(folders)} folders with a config.json, expected one model. {_listing(root)}")
    return folders[0]


def _listing(root: Path) -> str:
    # Sizes, because a file may be there and yet be the text of a pointer to it.
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    lines = [f"  {file.relative_to(root)}  {file.stat().st_size:,} bytes" for file in files[:100]]
    return "\n".join([f"The model folder {root} holds {len(files)} files:", *lines])


def answer(
    body: bytes, reranker: Reranker, model_name: str, limits: Limits, request_id: str = "none"
) -> tuple[int, dict[str, Any]]:
    """Serve one request.

    Args:
        body: the request's JSON in UTF-8.
        reranker: from `load_reranker`. One call at a time.
        model_name: what the answer's "model" says.
        limits: what the request may ask for.
        request_id: what the message and the log call the request if it fails for an internal reason.

    Returns:
        HTTP status and the JSON of the answer or the error. It never raises.
    """
    try:
        return 200, _rank(parse(body, limits), reranker, model_name, limits)
    except Refused as refused:
        return refused.status, error_json(refused.code, str(refused))
    except Exception as error:
        # Frames and type only: an exception's message may quote the text that it is about. Torch's cannot, it has only
        # numbers, and is needed to understand it.
        frames = "".join(traceback.format_tb(error.__traceback__))
        message = str(error) if isinstance(error, RuntimeError | ArithmeticError) else "message withheld"
        logger.error("request %s failed: %s (%s)\n%s", request_id, type(error).__name__, message, frames)
        return 500, error_json(
            "InternalError", f"The ranking failed. The deployment's log says why under request id {request_id}"
        )


def error_json(code: str, message: str) -> dict[str, Any]:
    """Return an error as clients get it. The Azure SDK understands this form, and crashes on {"error": "text"}."""
    return {"error": {"code": code, "message": message}}


def parse(body: bytes, limits: Limits) -> Request:
    """Check a request's JSON. Raises `Refused`, whose message names the field and never quotes a text."""
    if len(body) > limits.body_bytes:
        raise Refused(
            413, "BodyTooLarge", f"the body has more than {limits.body_bytes:,} bytes: send fewer or shorter documents"
        )
    try:
        fields = json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refused(400, "InvalidJson", f"the body is no UTF-8: see byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refused(400, "InvalidJson", f"the body is no JSON: {error.msg}, {place}") from None
    except (ValueError, RecursionError):
        message = "the body is no JSON that can be read: NaN, Infinity, a number of thousands of digits or deep nesting"
        raise Refused(400, "InvalidJson", message) from None

    if not isinstance(fields, dict):
        raise Refused(400, "WrongType", f"the body is {_kind(fields)}, expected an object with query and documents")
    for name in fields:
        if name not in FIELDS:
            raise Refused(400, "UnknownField", f"unknown field {name[:40]!a}: the fields are {', '.join(FIELDS)}")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in ("query", "documents"):
        if name not in fields:
            raise Refused(400, "MissingField", f"{name} is missing: a request needs query and documents")

    query = _text("query", fields["query"])
    if not query.strip():
        raise Refused(422, "OutOfRange", "query is empty: ask something")
    _text("model", fields.get("model", ""))  # many clients send it; the answer says which model it was
    if not isinstance(fields["documents"], list):
        raise Refused(400, "WrongType", f"documents is {_kind(fields['documents'])}, expected a list")
    if len(fields["documents"]) > limits.documents:
        raise Refused(
            413,
            "TooManyDocuments",
            f"documents has {len(fields['documents']):,} entries, at most {limits.documents:,} are allowed: split them "
            "over several requests, scores of different requests can be compared",
        )
    return Request(
        query,
        [_document(f"documents[{i}]", document) for i, document in enumerate(fields["documents"])],
        _whole_number(fields, "top_n", at_least=1),
        _boolean(fields, "return_documents"),
        _whole_number(fields, "max_length", at_least=1, at_most=limits.length) or min(MAX_LENGTH, limits.length),
        _whole_number(fields, "stride", at_least=0),
    )


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected a string")
    try:
        return check_text(name, value)
    except ValueError as error:
        raise Refused(400, "InvalidUnicode", str(error)) from None


def _document(name: str, value: object) -> str:
    if isinstance(value, dict) and "text" in value:
        return _text(f"{name}.text", value["text"])
    if not isinstance(value, str):
        raise Refused(400, "WrongType", f'{name} is {_kind(value)}, expected a string or {{"text": a string}}')
    return _text(name, value)


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected true or false")
    return value


def _whole_number(fields: dict[str, Any], name: str, *, at_least: int, at_most: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected a whole number")
    if value < at_least:
        raise Refused(422, "OutOfRange", f"{name} must be at least {at_least}")
    if at_most is not None and value > at_most:
        raise Refused(422, "OutOfRange", f"{name} must be at most {at_most:,} in this deployment")
    return value


def _kind(value: object) -> str:
    """Return what JSON calls the type of a value."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number with a fraction"}
    return names.get(type(value)) or {str: "a string", list: "a list", dict: "an object"}[type(value)]


def _rank(request: Request, reranker: Reranker, model_name: str, limits: Limits) -> dict[str, Any]:
    batches = []

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        batches.append(inputs["attention_mask"].sum())

    # A hook counts what the model really reads: no padding, and equal documents once.
    hook = reranker.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        _check_tokens(request, reranker.tokenizer, limits)
        results = rerank(
            request.query,
            request.documents,
            *reranker,
            top_n=request.top_n,
            max_length=request.max_length,
            stride=request.stride,
        )
    except ValueError as error:
        if batches:  # the model has run, so the request is not to blame
            raise
        raise Refused(422, "OutOfRange", str(error)) from None
    finally:
        hook.remove()
    ranking = [
        {
            "index": result.index,
            "relevance_score": result.probability,
            "logit": result.score,
            "truncated": result.truncated,
        }
        | ({"document": {"text": result.document}} if request.return_documents else {})
        for result in results
    ]
    return {"model": model_name, "results": ranking, "usage": {"total_tokens": int(sum(batches))}}


def _check_tokens(request: Request, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Refuse, before the model runs, a request that would keep it busy for too long or fill the memory."""

    def count(texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in tokenizer(texts, add_special_tokens=False, verbose=False).encodings]

    frame = count([request.query])[0] + tokenizer.num_special_tokens_to_add(pair=True)  # in every window
    room = request.max_length - frame
    overlap = request.stride or 0
    if room <= overlap:
        return  # `rerank` says what is wrong
    documents = list(dict.fromkeys(request.documents))
    characters = sum(map(len, documents))
    if (
        request.stride is None
        and len(documents) * request.max_length <= limits.tokens
        and characters * request.max_length <= TOKENIZER_TOKENS * room
    ):
        return  # it cannot be too much, so counting would only take time
    lengths = count(documents)
    windows = [max(1, math.ceil((length - overlap) / (room - overlap))) for length in lengths]
    produced = sum(n * (frame + overlap) + length - overlap for n, length in zip(windows, lengths, strict=True))
    read = produced if request.stride is not None else sum(frame + min(length, room) for length in lengths)
    if read > limits.tokens:
        raise Refused(
            413,
            "TooManyTokens",
            f"query and documents make {read:,} tokens for the model, the query counted with every document or window; "
            f"at most {limits.tokens:,} are allowed: send fewer documents, or lower max_length or stride",
        )
    if produced > TOKENIZER_TOKENS:
        raise Refused(
            413,
            "TooManyTokens",
            f"the documents make {produced:,} tokens in pieces of {room}, at most {TOKENIZER_TOKENS:,} are allowed: "
            "send shorter documents or a shorter query, or raise max_length",
        )


@rawhttp
def run(request: flask.Request) -> AMLResponse:
    """Serve one HTTP request.

    It takes the raw request, because only there are the content type, and bytes that are no UTF-8, and the size before
    the body is read.
    """
    # The rest is read too and thrown away: a connection that is closed with bytes on the way loses the answer.
    body = request.stream.read(_limits.body_bytes + 1)
    while request.stream.read(2**16):
        pass
    if request.method != "POST":
        status, message = 405, error_json("MethodNotAllowed", f"the method is {request.method}, expected POST")
    elif not request.is_json:
        status, message = 415, error_json("NoJson", "the header Content-Type is missing or not application/json")
    else:
        status, message = answer(body, _reranker, _model_name, _limits, flask.g.request_id)
    return AMLResponse(message, status, json_str=True)
