"""From (query, document) pairs to logits: tokenise, sort by length, batch by a budget of tokens, run, restore order."""

import logging
import math
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
"""Default limit of a pair, in tokens: query, document and special tokens together."""

BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Default budget of a batch by device type, in tokens with padding. Small batches pad little and stay in the cache."""

logger = logging.getLogger(__name__)

# A fast tokenizer keeps its truncation settings inside: two threads with different ones break each other's call.
_tokenizer_lock = threading.Lock()


class Passage(NamedTuple):
    """A stretch of a document, `document[start:end]` in characters, and the logit that the model gives it."""

    logit: float
    start: int
    end: int


class ScoredPair(NamedTuple):
    """The passages of one pair in the order of the text, at least one, and whether they leave text out."""

    passages: list[Passage]
    truncated: bool


class _Window(NamedTuple):
    """One input of the model: the query's tokens and as many of the document's as fit."""

    pair: int
    start: int
    end: int
    token_ids: list[int]
    type_ids: list[int]


def score(
    pairs: Iterable[tuple[str, str]],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    *,
    max_length: int = MAX_LENGTH,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> list[float]:
    """Score (query, document) pairs, of one query or of many.

    Args:
        pairs: (query, document) tuples of strings.
        model: a sequence classifier with one label: from `load_reranker`, or anything that is called like one of
            Transformers' and returns `.logits` of shape (pairs, 1), such as an ONNX Runtime export.
        tokenizer: the model's own, a fast one.
        device: where the model is.
        max_length: limit of a pair in tokens, special tokens included. Longer documents are cut at their end, without
            a word: `rerank` reports it, and its `stride=` reads the whole document.
        batch_tokens: budget of a batch in tokens with padding; a longer pair goes alone. Default: `BATCH_TOKENS`.
            It changes speed and memory, and scores by rounding errors only (about 1e-6 in float32).
        show_progress: show a progress bar in documents.

    Returns:
        One raw logit a pair, in input order: unbounded, higher is more relevant. Equal pairs get equal logits.

    Raises:
        TypeError, ValueError: bad input; the message names the place. Nothing has been scored then.
        ArithmeticError: the model returned NaN or an infinity for a pair.
    """
    scored = score_pairs(
        _check_pairs(pairs),
        model,
        tokenizer,
        device,
        max_length=max_length,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
    )
    return [pair.passages[0].logit for pair in scored]


def score_pairs(
    pairs: list[tuple[str, str]],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    *,
    max_length: int = MAX_LENGTH,
    stride: int | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = False,
    name: str = "pairs",
) -> list[ScoredPair]:
    """Like `score`, but with the passages: the first `max_length` tokens, or with `stride` all overlapping windows.

    The texts must have passed `check_text`. `name` is what error messages call the list that the user passed in:
    "pairs", or "documents" where there is one query.
    """
    device = torch.device(device)
    max_length = _check_max_length(max_length, model, tokenizer)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batch_tokens = check_whole_number("batch_tokens", batch_tokens, at_least=1)
    _check_model(model, device)
    if not pairs:
        return []

    copies = Counter(pairs)  # equal pairs are scored once, so that they tie exactly
    unique = list(copies)
    first_place = {pair: place for place, pair in reversed(list(enumerate(pairs)))}
    windows, truncated = _tokenise(unique, tokenizer, max_length, stride, name, first_place)
    with tqdm(total=len(pairs), unit="document", disable=not show_progress) as bar:
        logits = _run(windows, model, tokenizer, device, batch_tokens, lambda pair: bar.update(copies[unique[pair]]))

    scored = {pair: ScoredPair([], cut) for pair, cut in zip(unique, truncated, strict=True)}
    for window, logit in zip(windows, logits, strict=True):
        pair = unique[window.pair]
        if not math.isfinite(logit):
            raise ArithmeticError(
                f"the model returned {logit} for {name}[{first_place[pair]}]: the ranking would be meaningless. Check "
                "the weights; if the model runs in float16, load it with dtype='float32' or 'bfloat16'"
            )
        scored[pair].passages.append(Passage(logit, window.start, window.end))
    return [scored[pair] for pair in pairs]


def check_text(name: str, text: object) -> str:
    """Return `text` if it is a string that can be encoded, else say what `name` is instead."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode: lone surrogate at character {error.start}") from None
    return text


def check_whole_number(name: str, value: object, *, at_least: int) -> int:
    """Return `value` as an int of at least `at_least`, else say what `name` is instead."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}, expected a whole number") from None
    if number < at_least:
        raise ValueError(f"{name} is {number}, expected at least {at_least}")
    return number


def _check_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is {type(pairs).__name__}, expected a list of (query, document) tuples")
    checked = []
    for place, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs[{place}] is {type(pair).__name__}, expected a (query, document) tuple")
        query, document = pair
        checked.append((check_text(f"pairs[{place}][0]", query), check_text(f"pairs[{place}][1]", document)))
    return checked


def _check_max_length(max_length: int, model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> int:
    max_length = check_whole_number("max_length", max_length, at_least=1)
    limit = tokenizer.model_max_length
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # The RoBERTa family counts positions from pad_token_id + 1: bge-reranker-v2-m3 has 8194, of which 8192 serve.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        limit = min(limit, positions - offset)
    if max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model reads at most {limit} tokens")
    return max_length


def _check_model(model: Callable[..., Any], device: torch.device) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes scores random: call model.eval() first")
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"device is {str(device)!r}, but the model is on {str(weight.device)!r}: pass that one")


def _tokenise(
    pairs: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
    name: str,
    first_place: dict[tuple[str, str], int],
) -> tuple[list[_Window], list[bool]]:
    """Return the windows of all pairs, and for each pair whether text was left out."""
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}, expected a fast one: it knows each token's place")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    with _tokenizer_lock:
        # verbose=False: the tokenizer's own warning of a long text comes without a remedy; the error below has one.
        lengths = [len(ids) for ids in tokenizer(queries, add_special_tokens=False, verbose=False)["input_ids"]]
        longest = max(lengths)
        room = max_length - special - longest
        if room < 1:
            query = queries[lengths.index(longest)]
            place = next(first_place[pair] for pair in pairs if pair[0] == query)
            raise ValueError(
                f"{'query' if name == 'documents' else f'pairs[{place}][0]'} has {longest} tokens, which with "
                f"{special} special tokens leaves no room for a document in max_length={max_length}: shorten the query "
                "or raise max_length"
            )
        if stride is not None and check_whole_number("stride", stride, at_least=0) >= room:
            raise ValueError(
                f"stride is {stride}, but beside the query a window holds {room} tokens of the document, and windows "
                f"must overlap by less than that: lower stride or raise max_length"
            )
        encodings = tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="only_second",
            max_length=max_length,
            stride=stride or 0,
        ).encodings

    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    windows = []
    for pair, encoding in enumerate(encodings):
        for window in [encoding] if stride is None else [encoding, *encoding.overflowing]:
            token_ids = window.ids
            if sum(map(token_ids.count, controls)) > special:
                token_ids = _without_controls(window, controls, tokenizer)
            start, end = _document_span(window)
            windows.append(_Window(pair, start, end, token_ids, window.type_ids))
    return windows, [stride is None and bool(encoding.overflowing) for encoding in encodings]


def _without_controls(window: Encoding, controls: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make `</s>` or `<mask>` that someone wrote in a text unknown words: they must not steer the model.

    `split_special_tokens=True` does not do it for XLM-RoBERTa, whose vocabulary holds the special tokens as pieces too.
    """
    unknown = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    return [
        unknown if sequence is not None and token in controls else token
        for token, sequence in zip(window.ids, window.sequence_ids, strict=True)
    ]


def _document_span(window: Encoding) -> tuple[int, int]:
    """Return the first and the last character (exclusive) of the document's tokens in this window."""
    spans = [span for span, sequence in zip(window.offsets, window.sequence_ids, strict=True) if sequence == 1]
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else (0, 0)


def _run(
    windows: list[_Window],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    batch_tokens: int,
    done: Callable[[int], object],
) -> list[float]:
    """Return one logit a window, in the order of `windows`. `done(pair)` is called when a pair's last window ran."""
    # Longest first: batches pad little, and memory peaks at once. Equal lengths go by their tokens, so that batches,
    # and with them rounding errors, do not depend on the order of the input.
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].token_ids), windows[i].token_ids))
    waiting = Counter(window.pair for window in windows)
    results = []
    begin = 0
    with torch.inference_mode():
        while begin < len(order):
            longest = len(windows[order[begin]].token_ids)
            batch = [windows[i] for i in order[begin : begin + max(1, batch_tokens // longest)]]
            try:
                results.append(_forward(batch, model, tokenizer, device))
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                batch_tokens = len(batch) * longest // 2
                torch.cuda.empty_cache()
                logger.warning("CUDA is out of memory: going on with batch_tokens=%d", batch_tokens)
                continue
            begin += len(batch)
            for window in batch:
                waiting[window.pair] -= 1
                if not waiting[window.pair]:
                    done(window.pair)
        # Only here the results leave the device: a copy after each batch would make the GPU wait for Python.
        logits = torch.cat(results).tolist()
    restored = [0.0] * len(order)
    for place, logit in zip(order, logits, strict=True):
        restored[place] = logit
    return restored


def _forward(
    batch: list[_Window], model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> torch.Tensor:
    """Pad one batch, run the model, and return its logits in float32, shape (windows,)."""
    longest = max(len(window.token_ids) for window in batch)

    def padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
        left = tokenizer.padding_side == "left"
        padding = ((row, [filler] * (longest - len(row))) for row in rows)
        tensor = torch.tensor([fill + row if left else row + fill for row, fill in padding])
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    inputs = {
        "input_ids": padded((window.token_ids for window in batch), tokenizer.pad_token_id),
        "attention_mask": padded(([1] * len(window.token_ids) for window in batch), 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = padded((window.type_ids for window in batch), tokenizer.pad_token_type_id)
    logits = model(**inputs).logits
    if logits.shape != (len(batch), 1):
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for {len(batch)} pairs, expected "
            f"({len(batch)}, 1): it is no reranker with one logit a pair"
        )
    return logits[:, 0].float()
