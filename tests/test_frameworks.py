"""The Local notebook's snippets for LangChain, LlamaIndex and Haystack, with the frameworks' own document classes."""

from pathlib import Path

import nbformat
import pytest

from reranker_helpers import rerank

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["bread oven", "the panda bear", "moon and star", "panda"]
QUERY = "what is a panda"


@pytest.fixture
def snippets(tiny):
    """The functions of the notebook's cell, on the tiny reranker."""
    cells = nbformat.read(ROOT / "BGE_Reranker_Local.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.id == "stack"]
    names = {"rerank": rerank, "reranker": tiny}
    exec(source, names)
    return names


@pytest.fixture
def expected(tiny):
    return [result.document for result in rerank(QUERY, TEXTS, *tiny, top_n=3)]


def test_langchain(snippets, expected):
    documents = pytest.importorskip("langchain_core.documents", reason="langchain-core is missing")
    given = [documents.Document(page_content=text, metadata={"place": i}) for i, text in enumerate(TEXTS)]
    ranking = snippets["rerank_langchain"](QUERY, given, top_n=3)
    assert [document.page_content for document in ranking] == expected
    assert all(document is given[document.metadata["place"]] for document in ranking)


def test_llama_index(snippets, expected):
    schema = pytest.importorskip("llama_index.core.schema", reason="llama-index-core is missing")
    given = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.5) for text in TEXTS]
    ranking = snippets["rerank_llama_index"](QUERY, given, top_n=3)
    assert [node.node.get_content() for node in ranking] == expected
    assert [node.score for node in ranking] == sorted((node.score for node in ranking), reverse=True)
    assert all(node.score == 0.5 for node in given)


def test_haystack(snippets, expected):
    haystack = pytest.importorskip("haystack", reason="haystack-ai is missing")
    given = [haystack.Document(content=text) for text in TEXTS]
    ranking = snippets["rerank_haystack"](QUERY, given, top_n=3)
    assert [document.content for document in ranking] == expected
