"""From logits to a ranking: take each document's best passage (MaxP), and sort the documents by it."""

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
    """A document with its score. It unpacks as `document, score`."""

    document: Document
    """The object that was passed in."""
    score: float
    """The raw logit, unbounded: higher is more relevant."""
    index: int
    """Its position in the input."""
    truncated: bool
    """Whether text beyond `max_length` was left out, so that the score is that of the beginning."""
    passage: tuple[int, int]
    """The characters that the score is for: `text[start:end]`. With `stride` the best window, else what fitted."""
    tokens: int
    """Tokens that the model read for it: the document, and for each of its windows the query and special tokens again.
    Equal texts are read once, but each counts all tokens."""

    @property
    def probability(self) -> float:
        """The logit's sigmoid, from 0 to 1. The order is the same; what a value means must be measured on your data."""
        return torch.tensor(self.score, dtype=torch.float32, device="cpu").sigmoid().item()

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
    keep_special_tokens: bool = False,
    show_progress: bool = False,
) -> list[RankedDocument[Document]]:
    """Sort documents by their relevance to a query, best first.

    Args:
        query: the question or search text.
        documents: strings, or any objects if `key` is given, in a list, a column of a table or a generator. Equal texts
            are scored once.
        model: a sequence classifier with one label: from `load_reranker`, or anything that is called like one of
            Transformers' and returns `.logits` of shape (pairs, 1), such as an ONNX Runtime export.
        tokenizer: the model's own, a fast one.
        device: where the model is.
        top_n: how many documents to return, at least 1. Default: all.
        key: a function that returns a document's text, as in `sorted`.
        max_length: limit of a pair in tokens: query, document and special tokens together.
        stride: None reads the first `max_length` tokens of a pair and reports `truncated`. A number, at least 0, reads
            a long document whole: in windows of up to `max_length` tokens, query included, of which neighbours share
            `stride` tokens of the document. The best window's score counts: MaxP (Dai and Callan, SIGIR 2019,
            arXiv:1905.09217).
        batch_tokens: budget of a batch in tokens, padding included; a longer pair goes alone. Default: `BATCH_TOKENS`.
        keep_special_tokens: whether special tokens that a text spells out, such as `</s>`, keep their meaning. Only for
            models whose prompt, in the texts that you pass, holds some (Qwen3's `<|im_start|>`), and documents that you
            trust: whoever writes `</s>` into one could end it there. Default: each counts as the unknown token.
        show_progress: show a progress bar that counts documents.

    Returns:
        `RankedDocument`s by descending score, ties in input order; [] for no documents.

    Raises:
        TypeError, ValueError: bad input; the message names it, as in `documents[3] is NoneType, expected str`.
        ArithmeticError: the model returned NaN or an infinity; the message names the document.

    Example, with the `reranker` that `load_reranker` returned:

    >>> bread = "Bread is baked in an oven. "
    >>> pages = [{"id": 7, "text": bread}, {"id": 8, "text": bread * 99 + "The panda is a bear."}]
    >>> options = {"key": lambda page: page["text"], "max_length": 64, "stride": 16}
    >>> best, other = rerank("what is a panda?", pages, *reranker, **options)
    >>> assert best.document is pages[1] and best.score > other.score
    >>> assert pages[1]["text"][slice(*best.passage)].endswith("The panda is a bear.")
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
        keep_special_tokens=keep_special_tokens,
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
