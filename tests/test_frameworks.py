"""The rerankers in the Local notebook's text for LangChain, LlamaIndex and Haystack, used as each framework does, and
a server that runs greenlets."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from reranker_helpers import rerank

ROOT = Path(__file__).resolve().parent.parent
GREENLETS = """
from gevent import monkey; monkey.patch_all()
import sys; sys.path.insert(0, sys.argv[1])
import gevent, torch
from reranker_helpers import load_reranker, rerank
reranker = load_reranker(sys.argv[2], device="cpu")
documents = ["bread " * (1 + i % 50) for i in range(600)] + ["panda"]  # several chunks
gevent.joinall([gevent.spawn(lambda: print(len(rerank("panda", documents, *reranker)))) for _ in range(4)])
assert not torch.is_inference_mode_enabled()
"""
TEXTS = ["bread oven", "the panda bear", "moon and star", "panda"]
QUERY = "what is a panda"


@pytest.fixture
def snippet(tiny):
    """A function that runs the block of text that defines a class, on the tiny reranker, and returns the class."""

    def snippet(name: str) -> type:
        cells = nbformat.read(ROOT / "BGE_Reranker_Local.ipynb", as_version=4).cells
        (text,) = [cell.source for cell in cells if cell.id == "h-stack"]
        (code,) = [block for block in re.findall(r"```python\n(.+?)```", text, re.DOTALL) if f"class {name}" in block]
        names = {"rerank": rerank, "reranker": tiny}
        exec(code, names)
        return names[name]

    return snippet


@pytest.fixture
def expected(tiny):
    ranking = rerank(QUERY, TEXTS, *tiny)
    assert [result.index for result in ranking[:2]] != [0, 1], "a class that only cuts the list would pass"
    return ranking


def test_greenlets(installed, tiny_folder):
    """In gunicorn's gevent workers the process crashed: a greenlet that waited left torch's inference mode on."""
    installed("gevent")
    run = subprocess.run(
        [sys.executable, "-c", GREENLETS, ROOT, tiny_folder], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.split()) == (0, ["601"] * 4), run.stderr


def test_langchain(snippet, expected, installed):
    documents = installed("langchain_core.documents")
    runnables = installed("langchain_core.runnables")
    retrievers = installed("langchain_classic.retrievers")
    reranker = snippet("LangChainReranker")
    given = [documents.Document(text, id=f"d{i}", metadata={"from": {"page": i}}) for i, text in enumerate(TEXTS)]
    before = copy.deepcopy(given)

    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=reranker(top_n=2), base_retriever=runnables.RunnableLambda(lambda query: given)
    )
    best = [
        documents.Document(
            result.document,
            id=f"d{result.index}",
            metadata={"from": {"page": result.index}, "relevance_score": result.probability},
        )
        for result in expected[:2]
    ]
    assert retriever.invoke(QUERY) == best
    assert [page.page_content for page in reranker().compress_documents(given, QUERY)] == [r.document for r in expected]
    assert given == before
    assert reranker().compress_documents([], QUERY) == []
    with pytest.raises(ValueError, match="top_k"):
        reranker(top_k=2)


def test_llama_index(snippet, expected, installed):
    core = installed("llama_index.core")
    from llama_index.core.llms import MockLLM
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = snippet("LlamaIndexReranker")
    nodes = [TextNode(text=text, id_=f"n{i}", metadata={"page": i}) for i, text in enumerate(TEXTS)]
    given = [NodeWithScore(node=node, score=0.5) for node in nodes]
    before = copy.deepcopy(given)
    best = [NodeWithScore(node=nodes[result.index], score=result.score) for result in expected]

    assert reranker().postprocess_nodes(given, query_str=QUERY) == best
    assert given == before
    assert reranker().postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ValueError, match="pass query_bundle= or query_str="):
        reranker().postprocess_nodes(given)
    with pytest.raises(ValueError, match="top_k"):
        reranker(top_k=2)

    index = core.VectorStoreIndex(nodes, embed_model=core.MockEmbedding(embed_dim=2))
    engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=4, node_postprocessors=[reranker(top_n=2)])
    found = engine.query(QUERY).source_nodes
    assert [(node.text, node.metadata["page"]) for node in found] == [(r.document, r.index) for r in expected[:2]]
    assert [node.score for node in found] == pytest.approx([result.score for result in expected[:2]], abs=1e-4)


def test_haystack(snippet, expected, monkeypatch, installed):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    haystack = installed("haystack")
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    reranker = snippet("HaystackReranker")
    given = [
        haystack.Document(content=text, score=0.5, meta={"page": i}, embedding=[1.0]) for i, text in enumerate(TEXTS)
    ]
    before = copy.deepcopy(given)
    best = [
        haystack.Document(
            id=given[result.index].id,
            content=result.document,
            score=result.score,
            meta={"page": result.index},
            embedding=[1.0],
        )
        for result in expected
    ]
    assert reranker().run(query=QUERY, documents=given) == {"documents": best}
    assert reranker(top_k=3).run(query=QUERY, documents=given, top_k=1) == {"documents": best[:1]}
    assert given == before
    assert reranker().run(query=QUERY, documents=[]) == {"documents": []}
    assert len(reranker().run(query=QUERY, documents=[haystack.Document(content=None)])["documents"]) == 1
    with pytest.raises(ValueError, match="top_n"):
        reranker().run(query=QUERY, documents=given, top_k=0)

    store = InMemoryDocumentStore()
    store.write_documents(given)
    pipeline = haystack.Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=4))
    pipeline.add_component("reranker", reranker(top_k=2))
    pipeline.connect("retriever", "reranker")
    answer = pipeline.run({"retriever": {"query": QUERY}, "reranker": {"query": QUERY}})
    found = answer["reranker"]["documents"]
    assert [(page.content, page.meta) for page in found] == [(r.document, {"page": r.index}) for r in expected[:2]]
    assert [page.score for page in found] == pytest.approx([result.score for result in expected[:2]], abs=1e-4)
