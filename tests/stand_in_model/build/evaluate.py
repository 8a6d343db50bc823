"""Measure a cross-encoder on the labelled sets of this repository, none of which it was trained on.

python tests/stand_in_model/build/evaluate.py tests/stand_in_model

With `--closed` no token of one text may look at the other text's, up to the layer that compares them: what is lost
then is what reading both texts together is worth.
"""

import argparse
import json
import sys
from pathlib import Path

import bm25s
import ir_measures
import numpy as np
import torch
from ir_measures import RR, P, Qrel, ScoredDoc, nDCG
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests/data"
DEPTH = 50


def read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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


def retrieval(name: str, documents: list[dict], queries: list[dict], score) -> None:
    """Print how reranking changes BM25's order, and what the logits of right and wrong documents are."""
    options = {"stopwords": "en", "show_progress": False}
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([row["text"] for row in documents], **options), show_progress=False)
    tokens = bm25s.tokenize([row["text"] for row in queries], **options)
    found, first = retriever.retrieve(tokens, k=min(DEPTH, len(documents)), show_progress=False)
    pairs = [(q["text"], documents[d]["text"]) for q, row in zip(queries, found, strict=True) for d in row]
    second = np.array(score(pairs)).reshape(found.shape)
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
    right = np.array(
        [[documents[d]["id"] in q["relevant"] for d in row] for q, row in zip(queries, found, strict=True)]
    )
    above, wrong = (second[right] > 0).mean(), (second[~right] > 0).mean()
    print(f"  above 0: {above:.0%} of the right answers, {wrong:.0%} of the others")


def own_documents(name: str, queries: list[dict], score) -> None:
    """Print P@1 and nDCG@10 on queries that bring their own documents."""
    qrels, run = [], []
    logits = iter(score([(row["query"], document) for row in queries for document in row["documents"]]))
    for i, row in enumerate(queries):
        qrels += [Qrel(str(i), str(d), 1) for d in row["relevant"]]
        run += [ScoredDoc(str(i), str(d), next(logits)) for d in range(len(row["documents"]))]
    values = measure(qrels, run, [P @ 1, nDCG @ 10])
    print(f"{name}: {len(queries)} queries, " + ", ".join(f"{m} {value.mean():.3f}" for m, value in values.items()))


def contrast(queries: list[dict], score) -> None:
    """Print how often the one of two documents that answers has the higher logit, by kind and by half."""
    logits = np.reshape(score([(row["query"], text) for row in queries for text in row["documents"]]), (-1, 2))
    groups: dict[str, list[bool]] = {}
    for row, two in zip(queries, logits, strict=True):
        (right,) = row["relevant"]
        for name in ("all", "kept half" if row["kept"] else "other half", row["kind"]):
            groups.setdefault(name, []).append(two[right] > two[1 - right])
    for name, hits in groups.items():
        low, high = interval(np.array(hits))
        print(f"contrast, {name}: {len(hits)} queries, P@1 {np.mean(hits):.3f} [{low:.3f}, {high:.3f}]")


def apart(segment: Tensor, inside: Tensor) -> Tensor:
    """The attention mask, (pairs, 1, tokens, tokens), under which no token sees the other text.

    `<s>`, at which every token may look, looks at nothing but itself, or it would carry one text to the other.
    """
    seen = (segment[:, :, None] == segment[:, None]) & inside[:, None]
    seen[:, :, 0] = True
    seen[:, 0, 1:] = False
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9).unsqueeze(1)


def close(model) -> None:
    """Keep query and document apart in all layers but the last."""
    sides = {}

    def remember(module, args, kwargs):
        sides["mask"] = apart(kwargs["token_type_ids"], kwargs["attention_mask"].bool())

    def hide(module, args, kwargs):
        return (args[0], sides["mask"], *args[2:]), {k: v for k, v in kwargs.items() if k != "attention_mask"}

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.roberta.encoder.layer[:-1]:
        layer.register_forward_pre_hook(hide, with_kwargs=True)


def unknown(tokenizer, rows: list[dict]) -> str:
    """How much of the cross-lingual set's documents is `<unk>`, by language."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        for language, document in zip(row["languages"], row["documents"], strict=True):
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            counts.setdefault(language, []).extend(i == tokenizer.unk_token_id for i in ids)
    return ", ".join(f"{language} {np.mean(hits):.2%}" for language, hits in sorted(counts.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from reranker_helpers import load_reranker
    from reranker_helpers import score as helper_score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take every n-th question of Python's FAQ")
    parser.add_argument("--closed", action="store_true", help="no attention between query and document")
    arguments = parser.parse_args()
    reranker = load_reranker(arguments.model)
    if arguments.closed:
        close(reranker.model)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        return helper_score(pairs, *reranker)

    hand_written = read(DATA / "handwritten/queries.jsonl")
    for kind in (None, "direction", "negation"):
        rows = [row for row in hand_written if row.get("kind") == kind]
        own_documents(f"hand-written, {kind or 'topics'}", rows, score)
    cross_lingual = read(DATA / "cross_lingual/queries.jsonl")
    own_documents("cross-lingual", cross_lingual, score)
    print("<unk>:", unknown(reranker.tokenizer, cross_lingual))
    contrast(read(DATA / "contrast/queries.jsonl"), score)
    faq = DATA / "python_faq"
    questions = read(faq / "queries.jsonl")[:: arguments.every]
    retrieval("Python FAQ", read(faq / "documents.jsonl"), questions, score)
