"""What input is refused, and with which words: each error names the thing and says what to do instead."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .tokenising import Pair, count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def check_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
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


def check_model(model: Callable[..., Any], device: torch.device) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes scores random: call model.eval() first")
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"device is {str(device)!r}, but the model is on {str(weight.device)!r}: pass that one")
