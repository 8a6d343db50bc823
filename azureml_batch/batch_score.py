"""Scoring script of the batch endpoint: files of requests in, a row a document out.

Azure's batch engine calls `init()` once per process and `run()` with the paths of some files. If `run()` raises or the
process dies, the engine tries these files again. What `run()` returns is appended to one file, in any order.

The engine imports this script as the module `azureml_batch.batch_score`, after Microsoft's package `azureml`. In the
folder azureml/ the script would not be found, because that package has the same name.

Line:  {"id": str or int, "query": str, "documents": [str or {"text": str}], ...}, with the options of the online
       endpoint, or {"id": str or int, "pairs": [[query, document], ...], ...} with the same options; null means absent
Row:   {"id", "index", "logit", "relevance_score", "rank", "truncated", "document"?}, JSON on one line
Error: {"id", "file", "line", "error": {"code": str, "message": str}}, in place of the line's rows

`index` is the position in documents or pairs. `rank` 1 is the best of the line's documents for the same query. A line
without documents has one row, in which everything but the id is null. Empty lines are skipped; every other has a row.

Ids must be unique in the whole input. One that repeats within a file is an error. Files may be scored on different
machines, so only the reader of the rows can see an id that repeats across files: it has the same `index` twice.
"""

import gzip
import json
import logging
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Both are uploaded beside this folder. azureml/ cannot be a package, because that name is Microsoft's.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "azureml"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weights import load_model
from wire import (
    FIELDS,
    OPTIONS,
    Limits,
    Options,
    Refused,
    check_count,
    check_document,
    check_options,
    check_query,
    check_request,
    check_size,
    check_tokens,
    error_json,
    known_fields,
    length_of,
    load_object,
    whole,
)

from reranker_helpers import Reranker
from reranker_helpers.scoring import ScoredPair, score_pairs

logger = logging.getLogger("reranker.batch")

GZIP, BYTE_ORDER_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"

Row = dict[str, Any]


class Line(NamedTuple):
    """A well-formed line of a file, within the limits."""

    id: str | int
    file: str
    number: int
    name: str
    """"documents" or "pairs": what the line calls its list."""
    pairs: list[tuple[str, str]]
    options: Options


def init() -> None:
    """Load the model and read the limits of a line from the environment. Raises what `score.init` raises."""
    global _reranker, _limits
    logging.basicConfig()
    logger.setLevel(logging.INFO)  # not on the root logger: the engine's own libraries would fill the log
    _limits = Limits.from_environment()
    _reranker, model_name = load_model()
    logger.info("%s ready on %s in %s, %s", model_name, _reranker.device, _reranker.model.dtype, _limits)


def run(mini_batch: list[str]) -> list[str]:
    """Score some files.

    Args:
        mini_batch: the files' paths.

    Returns:
        Rows as JSON, at least one for each file. Not a DataFrame: the engine would separate its columns by spaces, and
        ids and documents may hold spaces, quotes and line breaks.

    Raises:
        OSError: a file cannot be read. The engine tries the mini-batch again.
        Exception: the model no longer works, whatever is in the lines. The engine tries again, too.
    """
    started = time.perf_counter()
    rows = score_files(mini_batch, _reranker, _limits)
    errors = sum("error" in row for row in rows)
    seconds = time.perf_counter() - started
    logger.info("%d files, %d rows, %d errors in %.1f s", len(mini_batch), len(rows), errors, seconds)
    # In ASCII, so without characters that some readers take for the end of a line.
    return [json.dumps(row, allow_nan=False) for row in rows]


def score_files(paths: list[str], reranker: Reranker, limits: Limits) -> list[Row]:
    """Return the rows of some files, as `run` does. All lines are checked first. Then those with the same max_length
    and stride are scored in one pass, which sorts their pairs by length."""
    rows: list[Row] = []
    passes: dict[tuple[int, int | None], list[Line]] = {}
    for path in paths:
        for line in read_lines(path, reranker, limits):
            if isinstance(line, Line):
                passes.setdefault((line.options.max_length, line.options.stride), []).append(line)
            else:
                rows.append(line)
    internal = False
    for lines in passes.values():
        for line, scored in zip(lines, _score(lines, reranker), strict=True):
            if isinstance(scored, Exception):
                # A fault of a text or its logit raises ValueError or ArithmeticError.
                internal = internal or not isinstance(scored, ValueError | ArithmeticError)
                message = str(scored) or type(scored).__name__
                rows.append(_error_row(line.id, line.file, line.number, "ScoringFailed", message))
            else:
                rows.extend(_rank(line, scored))
    if internal:
        # Was it the line, or the machine? A lost GPU fails here as well, so that another process tries again.
        score_pairs([("warm-up", "warm-up")], *reranker)
    return rows


def read_lines(path: str, reranker: Reranker, limits: Limits) -> Iterator[Line | Row]:
    """Yield each line of a file, checked, or the row that says what is wrong with it. Raises OSError."""
    content = Path(path).read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield _error_row(None, path, 1, "DamagedFile", f"the file begins like gzip, but can't be unpacked: {error}")
            return
    # Git's test for binary files. Without it, a picture would make thousands of bad lines.
    if b"\0" in content[:8000]:
        message = (
            "the file is no text in UTF-8 but binary, or UTF-16: write JSON Lines in UTF-8, or pack them with gzip"
        )
        yield _error_row(None, path, 1, "BinaryFile", message)
        return
    content = content.removeprefix(BYTE_ORDER_MARK)
    first: dict[tuple[type, str | int], int] = {}
    # Only \n ends a line: a JSON string may hold other characters at which str.splitlines splits.
    for number, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        id_ = None
        try:
            fields = load_object(text.strip(), "the line")
            id_ = whole(fields.pop("id", None))
            if isinstance(id_, bool) or not isinstance(id_, str | int):
                id_ = None
                raise Refused(400, "MissingId", "id is missing, or no string and no whole number: each line needs one")
            earlier = first.setdefault((type(id_), id_), number)
            if earlier != number:
                raise Refused(400, "RepeatedId", f"the id is that of line {earlier}: rows could not be told apart")
            check_size(text, limits, "the line")
            yield _parse(fields, id_, path, number, reranker, limits)
        except Refused as refused:
            yield _error_row(id_, path, number, refused.code, str(refused))
    if not content.strip():
        # Fewer rows than files are a failure to the engine.
        yield _error_row(None, path, 1, "EmptyFile", "the file has no lines")


def _parse(fields: Row, id_: str | int, path: str, number: int, reranker: Reranker, limits: Limits) -> Line:
    if fields.get("pairs") is not None:
        fields = known_fields(fields, ("pairs", *OPTIONS), or_null=FIELDS)
        pairs = _pairs(fields["pairs"], limits)
        line = Line(id_, path, number, "pairs", pairs, check_options(fields, limits))
    else:
        query, documents, options = check_request(known_fields(fields, FIELDS, or_null=("pairs",)), limits)
        options = options._replace(max_length=length_of(query, options, reranker, limits))
        line = Line(id_, path, number, "documents", [(query, document) for document in documents], options)
    check_tokens(line.pairs, line.name, line.options.max_length, line.options.stride, reranker, limits)
    return line


def _pairs(values: Any, limits: Limits) -> list[tuple[str, str]]:
    check_count("pairs", values, limits)
    pairs = []
    for place, pair in enumerate(values):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(400, "WrongType", f"pairs[{place}] is no list of two, expected [query, document]")
        pairs.append((check_query(f"pairs[{place}][0]", pair[0]), check_document(f"pairs[{place}][1]", pair[1])))
    return pairs


def _error_row(id_: str | int | None, path: str, number: int, code: str, message: str) -> Row:
    return {"id": id_, "file": path, "line": number, **error_json(code, message)}


def _score(lines: list[Line], reranker: Reranker) -> list[list[ScoredPair] | Exception]:
    """Return the scored pairs of each line, or the exception that prevented it.

    A pass that fails is tried again in two halves, until the lines at fault are isolated.
    """
    max_length, stride = lines[0].options.max_length, lines[0].options.stride
    try:
        scored = iter(
            score_pairs(
                [pair for line in lines for pair in line.pairs],
                *reranker,
                max_length=max_length,
                stride=stride,
                name=lines[0].name,
            )
        )
        return [[next(scored) for _ in line.pairs] for line in lines]
    except Exception as error:
        if len(lines) == 1:
            return [error]
    half = len(lines) // 2
    return _score(lines[:half], reranker) + _score(lines[half:], reranker)


def _rank(line: Line, scored: list[ScoredPair]) -> Iterator[Row]:
    """Yield the rows of a line, best document first."""
    if not scored:
        yield {"id": line.id, "index": None, "logit": None, "relevance_score": None, "rank": None, "truncated": None}
        return
    logits = [max(passage.logit for passage in pair.passages) for pair in scored]
    probabilities = torch.tensor(logits, dtype=torch.float32, device="cpu").sigmoid().tolist()
    ranks: Counter[str] = Counter()
    for index in sorted(range(len(logits)), key=lambda index: (-logits[index], index)):
        query, document = line.pairs[index]
        ranks[query] += 1
        if line.options.top_n is not None and ranks[query] > line.options.top_n:
            continue
        yield {
            "id": line.id,
            "index": index,
            "logit": logits[index],
            "relevance_score": probabilities[index],
            "rank": ranks[query],
            "truncated": scored[index].truncated,
        } | ({"document": {"text": document}} if line.options.return_documents else {})
