"""From (query, document) pairs to logits: tokenise, sort by length, cut into batches, run, restore the order."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from . import stopping
from .checks import check_limits, check_model, check_pairs, check_whole_number, query_names
from .packed import can_pack, run_packed
from .padded import run_padded
from .side_by_side import side_by_side
from .tokenising import Pair, Window, tokenise_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
"""Default limit of a pair in tokens: query, document and special tokens together."""

BATCH_TOKENS = {"cpu": 512, "packed": 1024, "cuda": 16_384}
"""Default batch budget in tokens, padding included, by type of device; "packed" is the packed path. On a CPU
small batches pad little and stay in the cache (benchmarks/results/ablation.md)."""

Forward = Callable[[list[Window]], torch.Tensor]
Results = Generator[tuple[list[Window], torch.Tensor], None, None]  # batches, each with its logits

logger = logging.getLogger(__name__)


class Passage(NamedTuple):
    """The characters `document[start:end]`, and their logit."""

    logit: float
    start: int
    end: int


class ScoredPair(NamedTuple):
    """What scoring one pair gave."""

    passages: list[Passage]
    """At least one, in the order of the text."""
    truncated: bool
    """Whether text beyond `max_length` was left out."""
    tokens: int
    """Tokens that the model read, with the query and special tokens of each window, without padding."""


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
    keep_special_tokens: bool = False,
    show_progress: bool = False,
) -> list[float]:
    """Score (query, document) pairs, for one query or many.

    Args:
        pairs: (query, document) tuples of strings.
        model: a sequence classifier with one label: from `load_reranker`, or anything that is called like one of
            Transformers' and returns `.logits` of shape (pairs, 1), such as an ONNX Runtime export.
        tokenizer: the model's own, a fast one.
        device: where the model is.
        max_length: limit of a pair in tokens, special tokens included. The end of a longer document is silently left
            out. `rerank` reports that, and reads the whole document with `stride`.
        batch_tokens: budget of a batch in tokens, padding included; a longer pair goes alone. Default: `BATCH_TOKENS`.
            It affects speed and memory, and scores only by rounding errors (about 1e-6 in float32).
        keep_special_tokens: whether special tokens that a text spells out, such as `</s>`, keep their meaning. Only for
            models whose prompt, in the texts that you pass, holds some (Qwen3's `<|im_start|>`), and documents that you
            trust: whoever writes `</s>` into one could end it there. Default: each counts as the unknown token.
        show_progress: show a progress bar that counts documents.

    Returns:
        One raw logit per pair, in input order: unbounded, higher is more relevant. Equal pairs get equal logits.

    Raises:
        TypeError, ValueError: bad input; the message says where, as in `pairs[1][0] is NoneType, expected str`.
        ArithmeticError: the model returned NaN or an infinity for a pair.

    Example, with the `reranker` that `load_reranker` returned:

    >>> query = "what is a panda?"
    >>> panda, bread = score([(query, "The panda is a bear."), (query, "Bread is baked in an oven.")], *reranker)
    >>> assert panda > bread
    """
    scored = score_pairs(
        check_pairs(pairs),
        model,
        tokenizer,
        device,
        max_length=max_length,
        batch_tokens=batch_tokens,
        keep_special_tokens=keep_special_tokens,
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
    keep_special_tokens: bool = False,
    show_progress: bool = False,
    name: str = "pairs",
) -> list[ScoredPair]:
    """Like `score`, but return passages: one of the first `max_length` tokens, or with `stride` one for each window.

    The texts must have passed `check_text`. `name` is what errors call the list that the caller passed in: "pairs", or
    "documents" if all pairs have one query.
    """
    device = torch.device(device)
    check_model(model, tokenizer, device)
    max_length, stride = check_limits(query_names(pairs, name), model, tokenizer, max_length, stride)
    packed = can_pack(model, device)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS["packed"] if packed else BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    batch_tokens = check_whole_number("batch_tokens", batch_tokens, at_least=1)
    forward: Callable[..., torch.Tensor] = run_packed if packed else run_padded
    if not pairs:
        return []

    copies = Counter(pairs)  # equal pairs are scored once, so they tie exactly
    first_place = {pair: place for place, pair in reversed(list(enumerate(pairs)))}
    # By length in characters, so that a chunk holds pairs of similar length. Equal lengths are sorted by text, so that
    # chunks and batches, and with them rounding errors, do not depend on the order of the input.
    unique = sorted(copies, key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    with (
        closing(tokenise_ahead(unique, tokenizer, max_length, stride, keep_special_tokens)) as chunks,
        tqdm(total=len(pairs), unit="document", disable=not show_progress) as bar,
    ):
        results = _run(
            chunks,
            lambda batch: forward(batch, model, tokenizer, device),
            batch_tokens,
            lambda pair: bar.update(copies[pair]),
            _several_at_a_time if packed else _one_at_a_time,
        )

    read: dict[Pair, list[tuple[_Input, float]]] = {}
    for window, logit in results:
        read.setdefault(window.pair, []).append((window, logit))
    scored = {}
    for pair in copies:  # in input order, so that the error names the first
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


def _run(
    chunks: Iterable[list[Window]],
    forward: Forward,
    batch_tokens: int,
    done: Callable[[Pair], object],
    run: Callable[[Iterable[list[Window]], Forward, int], Results],
) -> Iterator[tuple[_Input, float]]:
    """Return what the model read, each input with its logit, in the order in which they were read.

    Args:
        chunks: windows in any order; those of one pair are in one chunk.
        forward: takes a batch and returns its logits, (windows, 1), on any device.
        batch_tokens: budget of a batch in tokens.
        done: called with a pair when its last window has been given to the model.
        run: `_one_at_a_time` or `_several_at_a_time`.
    """
    inputs, logits = [], []
    waiting: Counter[Pair] = Counter()

    def queues() -> Iterator[list[Window]]:
        for chunk in chunks:
            waiting.update(window.pair for window in chunk)
            # Longest first, so that batches pad little and memory peaks early. Equal lengths are sorted by tokens,
            # for the reason that `score_pairs` gives.
            yield sorted(chunk, key=lambda window: (-len(window.token_ids), window.token_ids))

    with closing(run(queues(), forward, batch_tokens)) as results:
        for batch, result in results:
            logits.append(_one_logit_each(result, len(batch)))
            for window in batch:
                # Not the whole window: the tokens of 100,000 documents would take a gigabyte.
                inputs.append(_Input(*window[:4], len(window.token_ids)))
                waiting[window.pair] -= 1
                if not waiting[window.pair]:
                    done(window.pair)
    # Only now do results leave the device: a copy after each batch would make the GPU wait for Python.
    return zip(inputs, torch.cat(logits).tolist(), strict=True)


def _one_at_a_time(queues: Iterable[list[Window]], forward: Forward, batch_tokens: int) -> Results:
    """Yield (batch, logits). On a CUDA out-of-memory error the budget is halved, for the rest of the call."""
    for queue in queues:
        begin = 0
        while begin < len(queue):
            stopping.check()
            batch = _next_batch(queue, begin, batch_tokens)
            try:
                logits = forward(batch)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                batch_tokens = len(batch) * len(batch[0].token_ids) // 2
                torch.cuda.empty_cache()
                logger.warning("CUDA is out of memory: going on with batch_tokens=%d", batch_tokens)
                continue
            begin += len(batch)
            yield batch, logits


def _several_at_a_time(queues: Iterable[list[Window]], forward: Forward, batch_tokens: int) -> Results:
    """Yield (batch, logits). A window that is longer than the budget runs first, on all threads, or the others would be
    done long before it."""
    for queue in queues:
        batches = _cut(queue, batch_tokens)
        threads = torch.get_num_threads()
        if 1 < len(batches) < 4 * threads:  # else hardly anything is lost when one thread has a batch more than another
            rounds = -(-len(batches) // threads)
            tokens = sum(len(window.token_ids) for window in queue)
            batches = _cut(queue, min(batch_tokens, tokens // (rounds * threads) + len(queue[0].token_ids) // 2))
        alone = sum(len(batch[0].token_ids) > batch_tokens for batch in batches)
        for some in (*([batch] for batch in batches[:alone]), batches[alone:]):
            with closing(side_by_side(forward, some)) as results:
                for batch in some:
                    stopping.check()
                    yield batch, next(results)


def _cut(queue: list[Window], batch_tokens: int) -> list[list[Window]]:
    batches, begin = [], 0
    while begin < len(queue):
        batches.append(_next_batch(queue, begin, batch_tokens))
        begin += len(batches[-1])
    return batches


def _next_batch(queue: list[Window], begin: int, batch_tokens: int) -> list[Window]:
    return queue[begin : begin + max(1, batch_tokens // len(queue[begin].token_ids))]


def _one_logit_each(logits: torch.Tensor, count: int) -> torch.Tensor:
    if logits.shape != (count, 1):
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for {count} pairs, expected ({count}, 1): it is "
            "no reranker with one logit a pair"
        )
    return logits[:, 0].float()
