"""What reranking needs, in one object: the model, its tokenizer and the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .checks import longest_pair
from .quantising import is_quantised
from .ranking import Document, RankedDocument, rerank
from .scoring import MAX_LENGTH, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reranker(NamedTuple):
    """A model, its tokenizer and its device. It unpacks in the order of `rerank`'s and `score`'s parameters:
    `rerank(query, documents, *reranker)` and `reranker.rerank(query, documents)` are the same.

    >>> reranker.rerank("what is a panda?", ["Hi!", "The panda is a bear."])[0].document
    'The panda is a bear.'
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    def rerank(
        self, query: str, documents: Iterable[Document], top_n: int | None = None, *,
        key: Callable[[Document], str] | None = None, max_length: int = MAX_LENGTH, stride: int | None = None,
        batch_tokens: int | None = None, keep_special_tokens: bool = False, show_progress: bool = False,
    ) -> list[RankedDocument[Document]]:  # fmt: skip
        """Sort documents by their relevance to a query, best first: see the function `rerank`."""
        return rerank(
            query, documents, *self, top_n, key=key, max_length=max_length, stride=stride,
            batch_tokens=batch_tokens, keep_special_tokens=keep_special_tokens, show_progress=show_progress,
        )  # fmt: skip

    def score(
        self, pairs: Iterable[tuple[str, str]], *, max_length: int = MAX_LENGTH, batch_tokens: int | None = None,
        keep_special_tokens: bool = False, show_progress: bool = False,
    ) -> list[float]:  # fmt: skip
        """Score (query, document) pairs with raw logits: see the function `score`."""
        return score(
            pairs, *self, max_length=max_length, batch_tokens=batch_tokens,
            keep_special_tokens=keep_special_tokens, show_progress=show_progress,
        )  # fmt: skip

    def __repr__(self) -> str:
        model, tokenizer, device = self
        name = getattr(model, "name_or_path", "") or type(model).__name__
        int8 = isinstance(model, torch.nn.Module) and is_quantised(model)
        dtype = "int8" if int8 else str(getattr(model, "dtype", "unknown dtype")).removeprefix("torch.")
        return f"Reranker({name}, {dtype} on {device}, reads at most {longest_pair(model, tokenizer)} tokens)"
