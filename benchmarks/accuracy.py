"""What int8 costs in quality, where weights mean something: python -m benchmarks.accuracy [model folder]

The labelled sets of tests/data, in float32 and in int8, on the stand-in unless another model is named.
"""

import json
import statistics
import sys
from pathlib import Path

import bm25s
import ir_measures
import torch
from ir_measures import nDCG

from benchmarks.compare import RESULTS, kendall_tau, machine
from benchmarks.variants import top_n_in_float32
from benchmarks.workload import ROOT
from reranker_helpers import load_reranker, score

HEADER = (
    "| set | of | nDCG@10 float32 | int8 | difference (95 % interval, paired bootstrap over queries) "
    "| Kendall's tau, mean over queries | largest difference of a logit | standard deviation of the logits "
    "| scored again for the top 10 | top 10 as in float32 |"
)


def handwritten() -> list[tuple[str, list[str], set[str]]]:
    """Return for each query its text, its candidates, and the relevant ones."""
    rows = read("handwritten/queries.jsonl")
    return [(row["query"], row["documents"], {row["documents"][i] for i in row["relevant"]}) for row in rows]


def python_faq() -> list[tuple[str, list[str], set[str]]]:
    """Every third question with BM25's top 50."""
    texts = {row["id"]: row["text"] for row in read("python_faq/documents.jsonl")}
    queries = read("python_faq/queries.jsonl")[::3]
    index = bm25s.BM25(corpus=list(texts.values()))
    index.index(words(index.corpus), show_progress=False)
    found, _ = index.retrieve(words([row["text"] for row in queries]), k=50, show_progress=False)
    relevant = [{texts[i] for i in row["relevant"]} for row in queries]
    return [(row["text"], list(top), good) for row, top, good in zip(queries, found, relevant, strict=True)]


def words(texts: list[str]):
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "tests/data" / name).read_text(encoding="utf-8").splitlines()]


def row(name: str, queries, exact, fast, max_length: int) -> str:
    """Return one row of the table."""
    pairs = [(query, document) for query, documents, _ in queries for document in documents]
    right = dict(zip(pairs, score(pairs, *exact, max_length=max_length), strict=True))
    near = dict(zip(pairs, score(pairs, *fast, max_length=max_length), strict=True))
    ndcg, taus, again, equal = [], [], 0, 0
    for query, documents, relevant in queries:
        mine = [(query, document) for document in documents]
        logits = [[scores[pair] for pair in mine] for scores in (right, near)]
        qrels = {"": dict.fromkeys(relevant, 1)}
        runs = [{"": dict(zip(documents, values, strict=True))} for values in logits]
        ndcg.append([ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10] for run in runs])
        taus.append(kendall_tau(*logits))
        mixed = top_n_in_float32(
            mine, 10, lambda pairs: [near[pair] for pair in pairs], lambda pairs: [right[pair] for pair in pairs]
        )
        again += sum(ours != theirs for ours, theirs in zip(mixed, logits[1], strict=True))
        equal += best(mixed) == best(logits[0])
    means, gain = torch.tensor(ndcg).mean(0), torch.tensor([after - before for before, after in ndcg])
    draws = torch.randint(len(gain), (10_000, len(gain)), generator=torch.Generator().manual_seed(0))
    low, high = gain[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))
    return (
        f"| {name} | {len(queries)} queries, {len(pairs)} pairs of up to {max_length} tokens "
        f"| {means[0]:.3f} | {means[1]:.3f} | {gain.mean():+.4f} ({low:+.4f} to {high:+.4f}) "
        f"| {statistics.mean(taus):.3f} | {max(abs(right[pair] - near[pair]) for pair in pairs):.2f} "
        f"| {statistics.stdev(right.values()):.2f} | {again / len(pairs):.0%} | {equal} of {len(queries)} |"
    )


def best(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda place: (-logits[place], place))[:10]


def main(folder: Path = RESULTS, model: Path = ROOT / "tests/stand_in_model") -> None:
    exact, fast = (load_reranker(model, device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    config, found = exact.model.config, machine("cpu")
    lines = [
        "# int8-accuracy",
        "",
        f"Written by `python -m benchmarks.accuracy`: {model.name}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, on {found['processor']} ({' '.join(found['instructions'])}), torch {torch.__version__}",
        "",
        HEADER,
        "|---" * (HEADER.count("|") - 1) + "|",
        row("hand-written", handwritten(), exact, fast, 512),
        row("Python FAQ", python_faq(), exact, fast, 96),
    ]
    (folder / "int8-accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(RESULTS, *map(Path, sys.argv[1:2]))
