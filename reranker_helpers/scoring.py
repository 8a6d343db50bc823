"""From (query, document) pairs to logits: tokenise, sort by length, batch by a budget of tokens, run, restore order."""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

from .packed import can_pack, pack_and_run
from .tokenising import Pair, Window, count_tokens, tokenise_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
"""Default limit of a pair, in tokens: query, document and special tokens together."""

BATCH_TOKENS = {"cpu": 512, "packed": 1024, "cuda": 16_384}
"""Default budget of a batch, in tokens with padding: small batches pad little and stay in the cache. The fast path of
`packed.py` pads nothing, so that larger ones pay."""

logger = logging.getLogger(__name__)


class Passage(NamedTuple):
    """A stretch of a document, `document[start:end]` in characters, and the logit that the model gives it."""

    logit: float
    start: int
    end: int


class ScoredPair(NamedTuple):
    """What the model made of one pair."""

    passages: list[Passage]
    """At least one, in the order of the text."""
    truncated: bool
    """Whether text beyond `max_length` was left out."""
    tokens: int
    """How many tokens the model read, the query and special tokens of each window included, padding not."""


class _Input(NamedTuple):
    """What is kept of a window that the model has read."""

    pair: Pair
    start: int
    end: int
    truncated: bool
    tokens: int


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
    max_length, stride = check_limits(query_names(pairs, name), model, tokenizer, max_length, stride)
    _check_model(model, device)
    packed = can_pack(model, device)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS["packed"] if packed else BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batch_tokens = check_whole_number("batch_tokens", batch_tokens, at_least=1)
    forward = _forward_packed if packed else _forward_padded
    if not pairs:
        return []

    copies = Counter(pairs)  # equal pairs are scored once, so that they tie exactly
    first_place = {pair: place for place, pair in reversed(list(enumerate(pairs)))}
    # By length in characters, for each chunk to hold pairs of like length. Equal lengths go by the text, so that chunks
    # and batches, and with them rounding errors, do not depend on the order of the input.
    unique = sorted(copies, key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    with (
        closing(tokenise_ahead(unique, tokenizer, max_length, stride)) as chunks,
        tqdm(total=len(pairs), unit="document", disable=not show_progress) as bar,
    ):
        results = _run(
            chunks,
            lambda batch: forward(batch, model, tokenizer, device),
            batch_tokens,
            lambda pair: bar.update(copies[pair]),
        )

    read = {}
    for window, logit in results:
        read.setdefault(window.pair, []).append((window, logit))
    scored = {}
    for pair in copies:  # in input order, for the error to name the first
        windows = sorted(read[pair], key=lambda result: result[0].start)
        passages = [Passage(logit, window.start, window.end) for window, logit in windows]
        for logit, *_ in passages:
            if not math.isfinite(logit):
                raise ArithmeticError(
                    f"the model returned {logit} for {name}[{first_place[pair]}]: the ranking would be meaningless. "
                    "Check the weights; if the model runs in float16, load it with dtype='float32' or 'bfloat16'"
                )
        tokens = sum(window.tokens for window, _ in windows)
        scored[pair] = ScoredPair(passages, windows[0][0].truncated, tokens)
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


def query_names(pairs: Iterable[Pair], name: str) -> dict[str, str]:
    """Return what an error calls each query: "query" where the list is "documents", else its first place."""
    names: dict[str, str] = {}
    for place, (query, _) in enumerate(pairs):
        names.setdefault(query, "query" if name == "documents" else f"{name}[{place}][0]")
    return names


def check_limits(
    queries: Mapping[str, str],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
) -> tuple[int, int | None]:
    """Return `max_length` and `stride` as ints, if the model reads so much and each query leaves room for a document.

    `queries` maps each query to what an error calls it. Raises TypeError or ValueError.
    """
    max_length = check_whole_number("max_length", max_length, at_least=1)
    if stride is not None:
        stride = check_whole_number("stride", stride, at_least=0)
    limit = tokenizer.model_max_length
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # The RoBERTa family counts positions from pad_token_id + 1: bge-reranker-v2-m3 has 8194, of which 8192 serve.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        limit = min(limit, positions - offset)
    if max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model reads at most {limit} tokens")
    if not queries:
        return max_length, stride
    lengths = count_tokens(list(queries), tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = max(lengths)
    room = max_length - special - longest
    if room < 1:
        name = list(queries.values())[lengths.index(longest)]
        raise ValueError(
            f"{name} has {longest} tokens, which with {special} special tokens leaves no room for a document in "
            f"max_length={max_length}: shorten the query or raise max_length"
        )
    if stride is not None and stride >= room:
        raise ValueError(
            f"stride is {stride}, but beside the query a window holds {room} tokens of the document, and windows must "
            "overlap by less than that: lower stride or raise max_length"
        )
    return max_length, stride


def _check_model(model: Callable[..., Any], device: torch.device) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes scores random: call model.eval() first")
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"device is {str(device)!r}, but the model is on {str(weight.device)!r}: pass that one")


def _run(
    chunks: Iterable[list[Window]],
    forward: Callable[[list[Window]], torch.Tensor],
    batch_tokens: int,
    done: Callable[[Pair], object],
) -> Iterator[tuple[_Input, float]]:
    """Return what the model read, each with its logit, in the order in which it was read.

    `forward` takes a batch and returns its logits, still on the device.
    `done(pair)` is called when a pair's last window has been given to the model.
    """
    inputs, logits = [], []
    with torch.inference_mode():
        for chunk in chunks:
            # Longest first: batches pad little, and memory peaks at once. Equal lengths go by their tokens, so that
            # batches, and with them rounding errors, do not depend on the order of the input.
            queue = sorted(chunk, key=lambda window: (-len(window.token_ids), window.token_ids))
            waiting = Counter(window.pair for window in queue)
            begin = 0
            while begin < len(queue):
                longest = len(queue[begin].token_ids)
                batch = queue[begin : begin + max(1, batch_tokens // longest)]
                try:
                    logits.append(forward(batch))
                except torch.cuda.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    batch_tokens = len(batch) * longest // 2
                    torch.cuda.empty_cache()
                    logger.warning("CUDA is out of memory: going on with batch_tokens=%d", batch_tokens)
                    continue
                begin += len(batch)
                for window in batch:
                    # Not the window itself: the tokens of 100,000 documents would take a gigabyte.
                    inputs.append(_Input(*window[:4], len(window.token_ids)))
                    waiting[window.pair] -= 1
                    if not waiting[window.pair]:
                        done(window.pair)
        # Only here the results leave the device: a copy after each batch would make the GPU wait for Python.
        return zip(inputs, torch.cat(logits).tolist(), strict=True)


def _forward_packed(
    batch: list[Window],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """Run one batch without padding, and return its logits in float32, shape (windows,)."""
    takes_types = "token_type_ids" in tokenizer.model_input_names
    types = [window.type_ids if takes_types else [0] * len(window.token_ids) for window in batch]
    return _one_logit_each(pack_and_run(model, [window.token_ids for window in batch], types), len(batch))


def _forward_padded(
    batch: list[Window],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """Pad one batch, run the model as Transformers does, and return its logits in float32, shape (windows,)."""
    lengths = [len(window.token_ids) for window in batch]
    longest = max(lengths)

    def padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
        left = tokenizer.padding_side == "left"
        padding = ((row, [filler] * (longest - len(row))) for row in rows)
        tensor = torch.tensor([fill + row if left else row + fill for row, fill in padding])
        # From pinned memory a copy to a GPU runs by itself: Python goes on at once.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    inputs = {
        "input_ids": padded((window.token_ids for window in batch), tokenizer.pad_token_id),
        "attention_mask": padded(([1] * length for length in lengths), 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = padded((window.type_ids for window in batch), tokenizer.pad_token_type_id)
    if device.type == "cuda" and _takes_ready_masks(model):
        inputs["attention_mask"] = _ready_mask(inputs["attention_mask"], lengths)
    return _one_logit_each(model(**inputs).logits, len(batch))


def _takes_ready_masks(model: Callable[..., Any]) -> bool:
    """Whether this is an XLM-RoBERTa of Transformers 5, which returns a mask with four dimensions as it is."""
    return (
        int(transformers.__version__.split(".")[0]) >= 5
        and type(model) is transformers.XLMRobertaForSequenceClassification
        and model.config._attn_implementation == "sdpa"
    )


def _ready_mask(mask: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
    """Make the mask that Transformers would make. To decide if there is padding it looks at the values of the mask, and
    so waits, once a batch, until the GPU has caught up; here the lengths tell."""
    if min(lengths) == max(lengths):
        return None
    return mask[:, None, None, :].bool().expand(-1, 1, max(lengths), -1)


def _one_logit_each(logits: torch.Tensor, count: int) -> torch.Tensor:
    if logits.shape != (count, 1):
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for {count} pairs, expected ({count}, 1): it is "
            "no reranker with one logit a pair"
        )
    return logits[:, 0].float()
