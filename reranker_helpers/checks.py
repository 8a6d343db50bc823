"""Checks of what the caller passes in. Each error names the argument at fault and says what to do instead."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import transformers

from .tokenising import Pair, count_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Item = TypeVar("Item")

COUNT_FROM_PAD = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Model types whose positions start at `pad_token_id + 1`, so that the first rows of the position table go unused."""


def check_text(name: str, text: object) -> str:
    """Return `text`. Raises TypeError if it is not a string, ValueError if it cannot be encoded as UTF-8.

    `name` is what the message calls it, here and below.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode: lone surrogate at character {error.start}") from None
    return text


def check_whole_number(name: str, value: object, *, at_least: int) -> int:
    """Return `value` as an int. Raises TypeError if it is not a whole number, ValueError if it is below `at_least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}, expected a whole number") from None
    if number < at_least:
        raise ValueError(f"{name} is {number}, expected at least {at_least}")
    return number


def check_list(name: str, values: Iterable[Item], expected: str) -> list[Item]:
    """Return a list, column, generator or other iterable as a list. Raises TypeError for a string, dict or table."""
    if hasattr(values, "columns"):  # iterating over a DataFrame gives the names of its columns
        raise TypeError(
            f"{name} is {type(values).__name__}, a table, expected {expected}: pass one column, such as table['text'], "
            "or its rows"
        )
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {type(values).__name__}, expected {expected}: put it into brackets?")
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)  # Arrow's strings are not str


def check_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return `pairs` as a list of tuples of two strings. Raises TypeError or ValueError for the first bad one."""
    checked = []
    for place, pair in enumerate(check_list("pairs", pairs, "a list of (query, document) tuples")):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs[{place}] is {type(pair).__name__}, expected a (query, document) tuple")
        query, document = pair
        checked.append((check_text(f"pairs[{place}][0]", query), check_text(f"pairs[{place}][1]", document)))
    return checked


def query_names(pairs: Iterable[Pair], name: str) -> dict[str, str]:
    """Map each query to what errors call it: "query" if `name` is "documents", else its first place: "pairs[0][0]"."""
    names: dict[str, str] = {}
    for place, (query, _) in enumerate(pairs):
        names.setdefault(query, "query" if name == "documents" else f"{name}[{place}][0]")
    return names


def longest_pair(model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a pair the model can read: query, document and special tokens together."""
    config = getattr(model, "config", None)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:  # XLNet says -1: it has no limit
        return tokenizer.model_max_length
    # bge-reranker-v2-m3 has 8194 positions but reads 8192 tokens.
    offset: int = config.pad_token_id + 1 if _counts_from_pad(config) else 0
    return min(tokenizer.model_max_length, positions - offset)


def check_limits(
    queries: Mapping[str, str],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
) -> tuple[int, int | None]:
    """Check that the model can read `max_length` tokens, and that every query leaves room for a document in them.

    Args:
        queries: maps each query to what errors call it, see `query_names`.
        model, tokenizer: must have passed `check_model`.
        max_length: limit of a pair in tokens: query, document and special tokens together.
        stride: tokens that neighbouring windows share, or None to cut documents off.

    Returns:
        `max_length` and `stride` as ints.

    Raises:
        TypeError: one of them is not a whole number.
        ValueError: one of them is out of range, or a query is empty or too long.
    """
    max_length = check_whole_number("max_length", max_length, at_least=1)
    if stride is not None:
        stride = check_whole_number("stride", stride, at_least=0)
    limit = longest_pair(model, tokenizer)
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
    """Refuse a model, tokenizer or device that would fail later or score wrongly. Raises TypeError or ValueError."""
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
        # Decoders find the end of a text by it, and the RoBERTa family derives positions from it.
        raise ValueError(
            f"tokenizer.pad_token_id is {tokenizer.pad_token_id}, but model.config.pad_token_id is {pad}, so scores "
            "would depend on the batch: set one to the other, to what the model was trained with"
        )
    if not isinstance(model, torch.nn.Module):
        return
    changing = torch.nn.modules.dropout._DropoutNd | torch.nn.modules.batchnorm._BatchNorm
    for name, part in model.named_modules():
        if part.training and (part is model or isinstance(part, changing)):
            what = f"the model's part {name}" if name else "the model"
            raise ValueError(f"{what} is in training mode, where dropout makes scores random: call model.eval() first")
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise ValueError(f"device is {str(device)!r}, but the model is on {str(weight.device)!r}: pass that one")


def _counts_from_pad(config: object) -> TypeGuard[PretrainedConfig]:
    return getattr(config, "model_type", None) in COUNT_FROM_PAD
