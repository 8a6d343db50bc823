"""From logits to a ranking: the best passage of each document (MaxP), then best document first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from .checks import check_list, check_text, check_whole_number
from .scoring import MAX_LENGTH, score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class RankedDocument(Generic[Document]):
    """A document and its place in the ranking. It unpacks as `document, score`."""

    document: Document
    """The very object that was passed in."""
    score: float
    """The raw logit, unbounded: higher is more relevant."""
    index: int
    """Its position in the input."""
    truncated: bool
    """Whether text beyond `max_length` was left out, so that the score is for the beginning only."""
    passage: tuple[int, int]
    """The characters that scored: `text[start:end]`. With `stride=` the best window, else what fitted."""
    tokens: int
    """How many tokens the model read for it: the document, and with each of its windows the query and special tokens.
    Equal texts are read once, and all say so."""

    @property
    def probability(self) -> float:
        """The logit's sigmoid, between 0 and 1. Same order; what a value means must be measured on your data."""
        return torch.tensor(self.score, dtype=torch.float32).sigmoid().item()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.document, self.score))


def rerank(
    query: str,
    documents: Iterable[Document],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    top_n: int | None = None,
    *,
    key: Callable[[Document], str] | None = None,
    max_length: int = MAX_LENGTH,
    stride: int | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> list[RankedDocument[Document]]:
    """Sort documents by their relevance to a query, best first.

    Args:
        query: the question or search text.
        documents: strings, or any objects together with `key`, as a list, a column of a table, a generator. Equal
            texts are scored once.
        model: a sequence classifier with one label: from `load_reranker`, or anything that is called like one of
            Transformers' and returns `.logits` of shape (pairs, 1), such as an ONNX Runtime export.
        tokenizer: the model's own, a fast one.
        device: where the model is.
        top_n: how many documents to return, at least 1. Default: all.
        key: a function that gives a document's text, as in `sorted`, e.g. `lambda row: row["text"]`.
        max_length: limit of a pair in tokens: query, document and special tokens together.
        stride: None reads the first `max_length` tokens and reports `truncated`. A number reads all of a long
            document in windows of up to `max_length` tokens, neighbours sharing `stride` tokens of the document (the
            tokenizer's own `stride`), and takes the best window's score: MaxP (Dai and Callan, SIGIR 2019,
            arXiv:1905.09217).
        batch_tokens: budget of a batch in tokens with padding; a longer pair goes alone. Default: `BATCH_TOKENS`.
        show_progress: show a progress bar in documents.

    Returns:
        `RankedDocument`s by descending score, ties in input order; [] for no documents.

    Raises:
        TypeError, ValueError: bad input; the message names it, as in `documents[3] is NoneType, expected str`.
        ArithmeticError: the model returned NaN or an infinity; the message names the document.
    """
    check_text("query", query)
    documents = check_list("documents", documents, "a list of documents")
    if top_n is not None:
        top_n = check_whole_number("top_n", top_n, at_least=1)
    pairs = [(query, _text(document, key, index)) for index, document in enumerate(documents)]
    scored = score_pairs(
        pairs,
        model,
        tokenizer,
        device,
        max_length=max_length,
        stride=stride,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
        name="documents",
    )
    ranked = []
    for index, (document, pair) in enumerate(zip(documents, scored, strict=True)):
        best = max(pair.passages, key=lambda passage: passage.logit)
        ranked.append(RankedDocument(document, best.logit, index, pair.truncated, (best.start, best.end), pair.tokens))
    ranked.sort(key=lambda result: (-result.score, result.index))
    return ranked[:top_n]


def _text(document: Document, key: Callable[[Document], str] | None, index: int) -> str:
    if key is not None:
        return check_text(f"key(documents[{index}])", key(document))
    try:
        return check_text(f"documents[{index}]", document)
    except TypeError as error:
        if document is None:
            raise
        raise TypeError(f"{error}, or pass key= to say where its text is, e.g. key=lambda d: d['text']") from None
