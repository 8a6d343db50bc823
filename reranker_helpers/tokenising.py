"""From (query, document) pairs to what the model reads: token ids within the limit, and which characters they cover."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import stopping

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CHUNK = 256
"""Pairs tokenised at a time, while the model is busy with the chunk before."""

CHUNK_CHARACTERS = 400_000
"""Characters at which a chunk ends early: each takes about 100 bytes, and Ctrl-C waits for the chunk to end."""

Pair = tuple[str, str]
"""Query and document."""

Text = TypeVar("Text", str, Pair)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# A fast tokenizer stores truncation settings, so threads that use different ones would break each other's calls.
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A process forked while another thread tokenises would inherit the lock closed, and wait for ever.
    os.register_at_fork(after_in_child=_renew_lock)


class Window(NamedTuple):
    """One input of the model: the query, and as much of the document as fits."""

    pair: Pair
    start: int
    end: int
    """It holds the characters `document[start:end]`."""
    truncated: bool
    """Whether the rest of the document is in no window."""
    token_ids: list[int]
    type_ids: list[int]
    """As long as `token_ids`."""


def count_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the number of tokens of each text, without special tokens."""
    counts: list[int] = []
    for chunk in _chunks(texts):
        stopping.check()
        with _lock:
            # verbose=False: the tokenizer's own warning about long texts names no remedy.
            encodings = tokenizer(chunk, add_special_tokens=False, verbose=False).encodings
        counts += map(len, encodings)
    return counts


def tokenise_ahead(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
    keep_special_tokens: bool = False,
) -> Generator[list[Window]]:
    """Yield the windows of the pairs, chunk by chunk. A thread tokenises the next chunk, so that no GPU has to wait.
    The arguments are those of `tokenise`."""
    options = (tokenizer, max_length, stride, keep_special_tokens)
    first, *others = _chunks(pairs)
    windows = tokenise(first, *options)
    for chunk in others:
        ahead = in_a_thread(functools.partial(tokenise, chunk, *options))
        try:
            yield windows
        finally:
            ahead.exception()  # wait: after an error or Ctrl-C too, no thread is left behind
        windows = ahead.result()
    yield windows


def in_a_thread(work: Callable[[], Result]) -> Future[Result]:
    """Call `work()` in a thread of its own. A pool would be closed as soon as the main thread ends, when others may
    still be reranking."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run).start()
    except RuntimeError:  # at the interpreter's end no thread starts any more
        run()
    return future


def _chunks(texts: list[Text]) -> Iterator[list[Text]]:
    """Cut a list into chunks that tokenise in well under a second."""
    chunk: list[Text] = []
    characters = 0
    for text in texts:
        size = len(text) if isinstance(text, str) else sum(map(len, text))
        if chunk and (len(chunk) == CHUNK or characters + size > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(text)
        characters += size
    if chunk:
        yield chunk


def tokenise(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
    keep_special_tokens: bool = False,
) -> list[Window]:
    """Return the windows of all pairs, in order: one per pair, or with `stride` as many as hold the whole document.

    Args:
        pairs: at least one (query, document).
        tokenizer: a fast one.
        max_length: limit of a window in tokens; more than the query's tokens, the special ones and `stride` together.
        stride: tokens of the document that neighbouring windows share. None cuts the document off.
        keep_special_tokens: whether special tokens that a text spells out keep their meaning. By default each becomes
            the unknown token, and the log says so once for each that a query spells out.

    Raises:
        RuntimeError: the tokenizer lost a part of a document.
        ValueError: a text spells out a special token, and the tokenizer has no unknown and no pad token to replace it.

    Example, with the `reranker` that `load_reranker` returned:

    >>> text = " ".join(["bread"] * 300)
    >>> first, *_, last = tokenise([("panda", text)], reranker.tokenizer, max_length=64, stride=16)
    >>> assert (len(first.token_ids), first.start, last.end) == (64, 0, len(text))
    """
    # Windows are cut here, from whole texts. The tokenizer's own truncation makes all windows, wanted or not, each with
    # its own copy of the query, and takes gigabytes for a long document. In tokenizers 0.23.1 and 0.23.2 it also loses
    # most of them (huggingface/tokenizers#2091).
    with _lock:
        queries, documents = map(list, zip(*pairs, strict=True))
        encodings = tokenizer(queries, documents, verbose=False).encodings
    controls = set() if keep_special_tokens else set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    windows = []
    for pair, encoding in zip(pairs, encodings, strict=True):
        windows += _windows(pair, encoding, max_length, stride, controls, tokenizer)
    return windows


def _windows(
    pair: Pair,
    encoding: Encoding,
    max_length: int,
    stride: int | None,
    controls: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Window]:
    token_ids, type_ids, sequences = encoding.ids, encoding.type_ids, encoding.sequence_ids
    offsets = encoding.offsets
    if any(token in controls for token, sequence in zip(token_ids, sequences, strict=True) if sequence is not None):
        token_ids = _without_controls(token_ids, sequences, controls, tokenizer)
    begin = sequences.index(1) if 1 in sequences else len(sequences)
    end = begin + sequences.count(1)  # the document's tokens are token_ids[begin:end]
    room = max_length - len(token_ids) + end - begin
    # Each window but the last is full, and shares `stride` tokens with the one before.
    starts = [begin] if stride is None else range(begin, max(begin + 1, end - stride), room - stride)
    windows, covered = [], begin
    for start in starts:
        stop = min(start + room, end)
        if start <= covered:
            covered = stop
        span = (offsets[start][0], offsets[stop - 1][1]) if start < stop else (0, 0)
        kept = [row[:begin] + row[start:stop] + row[end:] for row in (token_ids, type_ids)]
        windows.append(Window(pair, *span, stop < end and stride is None, *kept))
    # A tokenizer that truncates unasked, or a missing window, would silently cause a wrong ranking.
    if encoding.overflowing or 1 in sequences[end:] or (stride is not None and covered != end):
        raise RuntimeError("the tokenizer lost a part of a document: try another version of the package tokenizers")
    return windows


def _without_controls(
    token_ids: list[int], sequences: list[int | None], controls: set[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Replace special tokens that a text spells out, such as `</s>`, with the unknown token, lest they steer the model.

    `split_special_tokens=True` does not do this for XLM-RoBERTa, whose vocabulary has the special tokens as pieces too.
    """
    unknown = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    if unknown is None:
        raise ValueError(
            "a text spells out a special token of the tokenizer, which has no unknown and no pad token to put in its "
            "place: set tokenizer.pad_token"
        )
    replaced = []
    for token, sequence in zip(token_ids, sequences, strict=True):
        spelled_out = sequence is not None and token in controls
        if spelled_out and sequence == 0:
            _warn_once(*tokenizer.convert_ids_to_tokens([token, unknown]))
        replaced.append(unknown if spelled_out else token)
    return replaced


@functools.cache
def _warn_once(token: str, unknown: str) -> None:
    # A document may hold anything, but in a query it is probably part of a prompt that the model was trained with.
    logger.warning(
        "A query spells out the special token %s, which counts as %s, so that no text can steer the model. If it is "
        "part of the model's own prompt, pass keep_special_tokens=True",
        token,
        unknown,
    )
