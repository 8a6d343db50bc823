"""Measure a cross-encoder: nDCG@10 and MRR@10 of BM25's top 50 before and after reranking, with 95 % intervals.

python tests/stand_in_model/build/evaluate.py tests/stand_in_model
"""

import argparse
import json
from pathlib import Path

import bm25s
import ir_measures
import numpy as np
import torch
from ir_measures import RR, P, Qrel, ScoredDoc, nDCG
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DATA = Path(__file__).parents[2] / "data"
DEPTH, TOKENS = 50, 8192


def read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@torch.inference_mode()
def scores(pairs: list[tuple[str, str]], model, tokenizer) -> np.ndarray:
    """One logit per pair; pairs of similar length share a batch."""
    encoded = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=512)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    logits = np.zeros(len(pairs))
    while order:
        count = max(1, TOKENS // lengths[order[0]])
        batch, order = order[:count], order[count:]
        inputs = tokenizer.pad({name: [encoded[name][i] for i in batch] for name in encoded}, return_tensors="pt")
        logits[batch] = model(**inputs).logits[:, 0].numpy()
    return logits


def measure(qrels: list[Qrel], run: list[ScoredDoc], measures: list) -> dict:
    """measure -> one value per query, in the order of the queries' names; a query without results counts as 0."""
    queries = sorted({qrel.query_id for qrel in qrels})
    values = {(m.measure, m.query_id): m.value for m in ir_measures.iter_calc(measures, qrels, run)}
    return {name: np.array([values.get((name, query), 0.0) for query in queries]) for name in measures}


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, by bootstrap over the queries."""
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(10_000, len(difference)))].mean(1)
    return tuple(np.quantile(means, (0.025, 0.975)))


def retrieval(name: str, documents: list[dict], queries: list[dict], model, tokenizer) -> None:
    """Print how reranking changes BM25's order."""
    options = {"stopwords": "en", "show_progress": False}
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([row["text"] for row in documents], **options), show_progress=False)
    tokens = bm25s.tokenize([row["text"] for row in queries], **options)
    found, first = retriever.retrieve(tokens, k=min(DEPTH, len(documents)), show_progress=False)
    pairs = [(q["text"], documents[d]["text"]) for q, row in zip(queries, found, strict=True) for d in row]
    second = scores(pairs, model, tokenizer).reshape(found.shape)
    qrels = [Qrel(q["id"], relevant, 1) for q in queries for relevant in q["relevant"]]
    values = []
    for matrix in (first, second):
        run = [
            ScoredDoc(q["id"], documents[d]["id"], float(score))
            for q, row, line in zip(queries, found, matrix, strict=True)
            for d, score in zip(row, line, strict=True)
        ]
        values.append(measure(qrels, run, [nDCG @ 10, RR @ 10]))
    print(f"{name}: {len(queries)} queries, {len(documents)} documents")
    for metric, before in values[0].items():
        after = values[1][metric]
        low, high = interval(after - before)
        print(
            f"  {metric}: BM25 {before.mean():.3f}, reranked {after.mean():.3f}, "
            f"difference {(after - before).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        )


def handwritten(queries: list[dict], model, tokenizer) -> None:
    """Print P@1 and nDCG@10 on queries that bring their own documents."""
    qrels, run = [], []
    for i, row in enumerate(queries):
        qrels += [Qrel(str(i), str(d), 1) for d in row["relevant"]]
        logits = scores([(row["query"], document) for document in row["documents"]], model, tokenizer)
        run += [ScoredDoc(str(i), str(d), float(logit)) for d, logit in enumerate(logits)]
    values = measure(qrels, run, [P @ 1, nDCG @ 10])
    print(f"hand-written: {len(queries)} queries")
    for metric, value in values.items():
        print(f"  {metric}: {value.mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--wiki", type=Path, help="wiki.jsonl, the held-out articles that data.py wrote")
    arguments = parser.parse_args()
    loaded = (
        AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(arguments.model),
    )
    handwritten(read(DATA / "handwritten" / "queries.jsonl"), *loaded)
    faq = DATA / "python_faq"
    retrieval("Python FAQ", read(faq / "documents.jsonl"), read(faq / "queries.jsonl"), *loaded)
    if arguments.wiki:
        articles = [{"id": str(i), **row} for i, row in enumerate(read(arguments.wiki))]
        asked = [
            {"id": row["id"], "text": row["queries"][0], "relevant": [row["id"]]} for row in articles if row["queries"]
        ]
        retrieval("held-out Wikipedia articles", articles, asked[::3], *loaded)
