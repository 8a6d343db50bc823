"""Rerank documents with BAAI/bge-reranker-v2-m3, or any cross-encoder that returns one logit per pair.

>>> from reranker_helpers import load_reranker, rerank
>>> reranker = load_reranker()
>>> documents = ["Bread is baked in an oven.", "The panda is a bear that eats bamboo."]
>>> for document, score in rerank("what is a panda?", documents, *reranker, top_n=1):
...     print(document)
The panda is a bear that eats bamboo.
"""

from .loading import MODEL_NAME, load_reranker
from .ranking import RankedDocument, rerank
from .reranker import Reranker
from .scoring import BATCH_TOKENS, MAX_LENGTH, score
from .stopping import before_each_batch

__version__ = "0.2.0"

__all__ = [
    "BATCH_TOKENS",
    "MAX_LENGTH",
    "MODEL_NAME",
    "RankedDocument",
    "Reranker",
    "before_each_batch",
    "load_reranker",
    "rerank",
    "score",
]
