"""From (query, document) pairs to what the model reads: token ids within the limit, and the characters behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CHUNK = 256
"""Pairs that are tokenised at a time, while the model is busy with the ones before."""

Pair = tuple[str, str]

# A fast tokenizer keeps its truncation settings inside: two threads with different ones break each other's call.
_lock = threading.Lock()


class Window(NamedTuple):
    """One input of the model: the query's tokens and as many of the document's as fit, `document[start:end]`."""

    pair: Pair
    start: int
    end: int
    truncated: bool
    token_ids: list[int]
    type_ids: list[int]


def count_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the number of tokens of each text, special tokens left out. Raises TypeError for a slow tokenizer."""
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}, expected a fast one: it knows each token's place")
    with _lock:
        # verbose=False: the tokenizer's own warning of a long text comes without a remedy.
        return [len(text) for text in tokenizer(texts, add_special_tokens=False, verbose=False).encodings]


def tokenise_ahead(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None
) -> Iterator[list[Window]]:
    """Yield the windows of `CHUNK` pairs, while a thread tokenises the next ones: a GPU must not wait for that."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(tokenise, pairs[:CHUNK], tokenizer, max_length, stride)
        for begin in range(CHUNK, len(pairs), CHUNK):
            windows = ahead.result()
            ahead = thread.submit(tokenise, pairs[begin : begin + CHUNK], tokenizer, max_length, stride)
            yield windows
        yield ahead.result()


def tokenise(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None
) -> list[Window]:
    """Return the windows of all pairs: of each one without `stride`, else as many as hold the whole document.

    There must be room for the document: `max_length` above the query's tokens, the special ones and `stride`.
    """
    # Without `stride` the text is cut here: the tokenizer would first make all the windows that nobody wants, each with
    # the query again, and take gigabytes for a long document.
    limits = {} if stride is None else {"truncation": "only_second", "max_length": max_length, "stride": stride}
    with _lock:
        queries, documents = map(list, zip(*pairs, strict=True))
        encodings = tokenizer(queries, documents, verbose=False, **limits).encodings
    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    windows = []
    for pair, encoding in zip(pairs, encodings, strict=True):
        if stride is None:
            windows.append(_window(pair, encoding, max(0, len(encoding) - max_length), controls, tokenizer))
        else:
            windows += [_window(pair, part, 0, controls, tokenizer) for part in [encoding, *encoding.overflowing]]
    return windows


def _window(
    pair: Pair, encoding: Encoding, excess: int, controls: set[int], tokenizer: PreTrainedTokenizerBase
) -> Window:
    """Leave out the last `excess` tokens of the document."""
    token_ids, type_ids, sequences = encoding.ids, encoding.type_ids, encoding.sequence_ids
    if any(token in controls for token, sequence in zip(token_ids, sequences, strict=True) if sequence is not None):
        token_ids = _without_controls(token_ids, sequences, controls, tokenizer)
    begin = sequences.index(1) if 1 in sequences else len(sequences)
    end = begin + sequences.count(1) - excess
    del token_ids[end : end + excess], type_ids[end : end + excess]
    span = (encoding.token_to_chars(begin)[0], encoding.token_to_chars(end - 1)[1]) if begin < end else (0, 0)
    return Window(pair, *span, excess > 0, token_ids, type_ids)


def _without_controls(
    token_ids: list[int], sequences: list[int | None], controls: set[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Make `</s>` or `<mask>` that someone wrote in a text unknown words: they must not steer the model.

    `split_special_tokens=True` does not do it for XLM-RoBERTa, whose vocabulary holds the special tokens as pieces too.
    """
    unknown = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    return [
        unknown if sequence is not None and token in controls else token
        for token, sequence in zip(token_ids, sequences, strict=True)
    ]
