"""The wire format of both scoring scripts: requests, their limits, and errors."""

import json
import math
import os
from collections import Counter
from typing import Any, NamedTuple

from reranker_helpers import MAX_LENGTH, Reranker
from reranker_helpers.checks import check_limits, check_text, longest_pair, query_names
from reranker_helpers.tokenising import count_tokens

TOKENIZER_TOKENS = 2_000_000
"""The most tokens that the tokenizer may produce for a request: those of whole documents, before any is cut off or into
windows, and of the query again with each. It limits time, and memory: a long document takes about 500 bytes a token,
measured with the stand-in's tokenizer, while short ones are tokenised a few hundred at a time."""

OPTIONS = ("top_n", "return_documents", "max_length", "stride", "model")
FIELDS = ("query", "documents", *OPTIONS, "max_tokens_per_doc")

# Fields that other services' clients send, and what to send here instead.
ELSEWHERE = {
    "rank_fields": "send one text for each document",
    "max_chunks_per_doc": "stride reads long documents whole",
    "texts": "send documents",
    "passages": "send documents",
    "queries": "send one query",
    "top_k": "send top_n",
    "raw_scores": "the answer has both, logit and relevance_score",
    "truncation": "max_length says where a text is cut, and truncated in the answer which ones were",
}


class Limits(NamedTuple):
    """The largest request that is accepted. One of this size must finish within the deployment's timeout.

    The deployment's environment variables RERANKER_MAX_DOCUMENTS, RERANKER_MAX_TOKENS, RERANKER_MAX_LENGTH and
    RERANKER_MAX_BODY_BYTES override the defaults. An empty one counts as not set.
    """

    documents: int = 1000
    tokens: int = 512_000
    """Tokens of all inputs of the model, the query's counted each time: 1,000 inputs of 512."""
    length: int = 8192
    """The largest `max_length`, in tokens. The model's own limit holds too."""
    body_bytes: int = 8 * 2**20

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the variables. Raises ValueError for a value that is not a positive whole number."""
        limits = {}
        for field in cls._fields:
            variable = f"RERANKER_MAX_{field.upper()}"
            value = os.environ.get(variable, "").strip() or str(cls._field_defaults[field])
            if not value.isdecimal() or int(value) == 0:
                raise ValueError(f"the environment variable {variable} is {value!r}, expected a positive whole number")
            limits[field] = int(value)
        return cls(**limits)


class Options(NamedTuple):
    """How to rank: the checked values of a request, lengths in tokens."""

    top_n: int | None
    return_documents: bool
    max_length: int
    stride: int | None
    max_tokens_per_doc: int | None
    """Cohere's limit, which is for the document alone. `length_of` turns it into a `max_length`."""


class Request(NamedTuple):
    """A well-formed request within the limits, except for those that need tokens to be counted."""

    query: str
    documents: list[str]
    options: Options


class Refused(Exception):
    """A request that the client has to change. It has the HTTP status, a code and a message for the client."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code


def error_json(code: str, message: str) -> dict[str, Any]:
    """Return an error as clients get it: in the form that the Azure SDK expects. It crashes on {"error": "text"}."""
    return {"error": {"code": code, "message": message}}


def parse(body: bytes, limits: Limits) -> Request:
    """Parse and check a request's JSON. Raises `Refused`, whose message names the field and never quotes a text."""
    check_size(body, limits)
    return check_request(known_fields(load_object(body), FIELDS), limits)


def check_size(body: bytes, limits: Limits, what: str = "the body") -> None:
    """Raise `Refused` if `body` is larger than `limits.body_bytes`. The message calls it `what`."""
    if len(body) > limits.body_bytes:
        raise Refused(
            413, "BodyTooLarge", f"{what} has more than {limits.body_bytes:,} bytes: send fewer or shorter documents"
        )


def load_object(body: bytes, what: str = "the body") -> dict[str, Any]:
    """Parse a JSON object. Raises `Refused`, whose message calls it `what`."""
    try:
        # utf-8-sig, because Windows tools begin UTF-8 with a byte order mark
        text = body.decode("utf-8-sig")
        fields = json.loads(text, parse_constant=_no_constant, object_pairs_hook=lambda pairs: _once(pairs, what))
    except UnicodeDecodeError as error:
        raise Refused(400, "InvalidJson", f"{what} is no UTF-8: see byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise Refused(400, "InvalidJson", f"{what} is no JSON: {error.msg}, {place}") from None
    except (ValueError, RecursionError):
        message = f"{what} is no JSON that can be read: NaN, Infinity, a number of thousands of digits or deep nesting"
        raise Refused(400, "InvalidJson", message) from None
    if not isinstance(fields, dict):
        raise Refused(400, "WrongType", f"{what} is {_kind(fields)}, expected an object with query and documents")
    return fields


def known_fields(fields: dict[str, Any], names: tuple[str, ...], or_null: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields that are not null. Raises `Refused` for a field not in `names`, unless it is null and named in
    `or_null` or `ELSEWHERE`."""
    for name, value in fields.items():
        if name not in names and (value is not None or name not in (*or_null, *ELSEWHERE)):
            remedy = ELSEWHERE.get(name, f"the fields are {', '.join(names)}")
            raise Refused(400, "UnknownField", f"unknown field {name[:40]!a}: {remedy}")
    return {name: value for name, value in fields.items() if value is not None}


def check_request(fields: dict[str, Any], limits: Limits) -> Request:
    """Check the values of a request's fields. Raises `Refused`, as `parse` does."""
    for name in ("query", "documents"):
        if name not in fields:
            raise Refused(400, "MissingField", f"{name} is missing: a request needs query and documents")
    query = check_query("query", fields["query"])
    check_count("documents", fields["documents"], limits)
    documents = [check_document(f"documents[{i}]", value) for i, value in enumerate(fields["documents"])]
    return Request(query, documents, check_options(fields, limits))


def check_options(fields: dict[str, Any], limits: Limits) -> Options:
    """Check the fields that say how to rank, and fill in defaults. Raises `Refused`, as `parse` does."""
    _text("model", fields.get("model", ""))  # many clients send it; the answer names the model that was used
    if "max_tokens_per_doc" in fields and ("max_length" in fields or "stride" in fields):
        raise Refused(422, "OutOfRange", "max_tokens_per_doc excludes max_length and stride: send one or the other")
    return Options(
        _whole_number(fields, "top_n", at_least=1),
        _boolean(fields, "return_documents"),
        _whole_number(fields, "max_length", at_least=1, at_most=limits.length) or min(MAX_LENGTH, limits.length),
        _whole_number(fields, "stride", at_least=0),
        _whole_number(fields, "max_tokens_per_doc", at_least=1),
    )


def length_of(query: str, options: Options, reranker: Reranker, limits: Limits) -> int:
    """Return the `max_length` in tokens for pairs with this query.

    A `max_tokens_per_doc` beyond the deployment's limit or the model's is lowered, not refused: some Cohere clients
    always send 4,096.
    """
    if options.max_tokens_per_doc is None:
        return options.max_length
    model, tokenizer, _ = reranker
    frame = count_tokens([query], tokenizer)[0] + tokenizer.num_special_tokens_to_add(pair=True)
    return min(frame + options.max_tokens_per_doc, limits.length, longest_pair(model, tokenizer))


def check_query(name: str, value: object) -> str:
    """Return `value` if it is a query. Raises `Refused`, whose message calls it `name`."""
    text = _text(name, value)
    if not text.strip():
        raise Refused(422, "OutOfRange", f"{name} is empty: ask something")
    return text


def check_document(name: str, value: object) -> str:
    """Return the text of a document, a string or {"text": a string}. Raises `Refused`, as `check_query` does."""
    if isinstance(value, dict) and "text" in value:
        return _text(f"{name}.text", value["text"])
    if not isinstance(value, str):
        raise Refused(400, "WrongType", f'{name} is {_kind(value)}, expected a string or {{"text": a string}}')
    return _text(name, value)


def check_count(name: str, values: object, limits: Limits) -> None:
    """Raise `Refused` if `values`, documents or pairs, are not a list, or are more than `limits.documents`."""
    if not isinstance(values, list):
        raise Refused(400, "WrongType", f"{name} is {_kind(values)}, expected a list")
    if len(values) > limits.documents:
        raise Refused(
            413,
            "TooManyDocuments",
            f"{name} has {len(values):,} entries, at most {limits.documents:,} are allowed: split them over several "
            "requests, scores of different requests can be compared",
        )


def check_tokens(
    pairs: list[tuple[str, str]],
    name: str,
    max_length: int,
    stride: int | None,
    reranker: Reranker,
    limits: Limits,
) -> None:
    """Raise `Refused`, before the model runs, for (query, document) pairs that leave no room for a document, or would
    take too long or too much memory. `name` is what the request calls its list: "documents" or "pairs"."""
    model, tokenizer, _ = reranker
    names = query_names(pairs, name)
    try:
        check_limits(names, model, tokenizer, max_length, stride)
    except ValueError as error:
        raise Refused(422, "OutOfRange", str(error)) from None
    pairs = list(dict.fromkeys(pairs))
    characters = sum(len(query) + len(document) for query, document in pairs)
    if not pairs:
        return
    if stride is None and len(pairs) * max_length <= limits.tokens and characters <= TOKENIZER_TOKENS:
        return  # a character is rarely more than a token, so counting would only cost time
    special = tokenizer.num_special_tokens_to_add(pair=True)
    frames = {query: special + count for query, count in zip(names, count_tokens(list(names), tokenizer), strict=True)}
    overlap = stride or 0
    produced = read = 0
    for (query, _), length in zip(pairs, count_tokens([document for _, document in pairs], tokenizer), strict=True):
        frame = frames[query]  # the query and the special tokens are in every window
        room = max_length - frame
        produced += frame + length
        if stride is None:
            read += frame + min(length, room)
        else:
            windows = max(1, math.ceil((length - overlap) / (room - overlap)))
            read += windows * (frame + overlap) + length - overlap
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
            f"query and documents have {produced:,} tokens, the query counted with every document; at most "
            f"{TOKENIZER_TOKENS:,} are allowed: send fewer or shorter documents",
        )


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _once(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """Make an object of its fields. Raises `Refused` if two have the same name: `json` would silently keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Refused(400, "RepeatedField", f"{what} has an object with two fields {name[:40]!a}: send each field once")
    return fields


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected a string")
    try:
        return check_text(name, value)
    except ValueError as error:
        raise Refused(400, "InvalidUnicode", str(error)) from None


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected true or false")
    return value


def _whole_number(fields: dict[str, Any], name: str, *, at_least: int, at_most: int | None = None) -> int | None:
    value = whole(fields.get(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(400, "WrongType", f"{name} is {_kind(value)}, expected a whole number")
    if value < at_least:
        raise Refused(422, "OutOfRange", f"{name} must be at least {at_least}")
    if at_most is not None and value > at_most:
        raise Refused(422, "OutOfRange", f"{name} must be at most {at_most:,} in this deployment")
    return value


def whole(value: object) -> object:
    """Return 3 for 3.0, which is how pandas writes whole numbers in a column with gaps; other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kind(value: object) -> str:
    """Return the type of a value in JSON's terms."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number with a fraction"}
    return names.get(type(value)) or {str: "a string", list: "a list", dict: "an object"}[type(value)]
