"""What input is refused, and with which words: each error names the thing and says what to do instead."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .tokenising import Pair, count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT_FROM_PAD = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Model types that count positions from `pad_token_id + 1`, so that the first ones of the table are never used."""


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


def check_list(name: str, values: object, expected: str) -> list:
    """Return a list, a column, a generator or the like as a list, else say what `name` is instead."""
    if hasattr(values, "columns"):  # iterating over a DataFrame gives the names of its columns
        raise TypeError(
            f"{name} is {type(values).__name__}, a table, expected {expected}: pass one column, such as table['text'], "
            "or its rows"
        )
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {type(values).__name__}, expected {expected}: put it into brackets?")
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)  # Arrow's own strings are no str


def check_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (query, document) pairs as tuples of strings, else say which one is something else."""
    checked = []
    for place, pair in enumerate(check_list("pairs", pairs, "a list of (query, document) tuples")):
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
    if positions and positions > 0:  # XLNet says -1: it has no limit
        # bge-reranker-v2-m3 has 8194 positions but reads 8192 tokens.
        offset = config.pad_token_id + 1 if _counts_from_pad(config) else 0
        limit = min(limit, positions - offset)
    if max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model reads at most {limit} tokens")
    if not queries:
        return max_length, stride
    lengths = count_tokens(list(queries), tokenizer)
    if 0 in lengths:
        name = list(queries.values())[lengths.index(0)]
        raise ValueError(f"{name} is empty, or has only characters that the tokenizer drops: ask something")
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


def check_model(model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    """Refuse what would fail later or score wrongly. Raises TypeError or ValueError."""
    if isinstance(model, transformers.PreTrainedTokenizerBase) or isinstance(tokenizer, torch.nn.Module):
        raise TypeError(
            f"model is {type(model).__name__} and tokenizer is {type(tokenizer).__name__}: they are swapped, the model "
            "comes first"
        )
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}, expected one from load_reranker, or one like it")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}, expected a fast one: it knows each token's place")
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    if pad is None and _counts_from_pad(config):
        raise ValueError(
            f"model.config.pad_token_id is None, but {config.model_type} counts positions from it: in config.json set "
            f"what the model was trained with (the tokenizer has {tokenizer.pad_token_id}), and load the model again"
        )
    if tokenizer.pad_token_id is not None and pad is not None and pad != tokenizer.pad_token_id:
        # A decoder finds the end of a text by it, and the RoBERTa family the positions.
        raise ValueError(
            f"tokenizer.pad_token_id is {tokenizer.pad_token_id}, but model.config.pad_token_id is {pad}, so scores "
            "would depend on the batch: set one to the other, to what the model was trained with"
        )
    if not isinstance(model, torch.nn.Module):
        return
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes scores random: call model.eval() first")
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"device is {str(device)!r}, but the model is on {str(weight.device)!r}: pass that one")


def _counts_from_pad(config: object) -> bool:
    return getattr(config, "model_type", None) in COUNT_FROM_PAD
