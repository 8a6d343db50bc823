"""What int8 costs in quality, where weights mean something: python -m benchmarks.accuracy [model folder]

The labelled sets of tests/data, in float32 and in int8, on the stand-in unless another model is named. Needs the
repository's own requirements.txt.
"""

import json
import sys
import time
from pathlib import Path

import bm25s
import ir_measures
import torch
from ir_measures import nDCG

from benchmarks.compare import kendall_tau, machine
from benchmarks.variants import top_n_in_float32
from benchmarks.workload import ROOT
from reranker_helpers import load_reranker, score

RESULT = Path(__file__).parent / "results" / "int8-accuracy.md"
DATA = ROOT / "tests" / "data"


def handwritten() -> dict[str, tuple[str, dict[str, str], list[str]]]:
    """Return for each query its text, its candidates by id, and the ids of the relevant ones."""
    rows = read("handwritten/queries.jsonl")
    return {
        str(number): (
            row["query"],
            {str(i): text for i, text in enumerate(row["documents"])},
            [str(place) for place in row["relevant"]],
        )
        for number, row in enumerate(rows)
    }


def python_faq() -> dict[str, tuple[str, dict[str, str], list[str]]]:
    """Every third question with BM25's top 50, as in chapter 12 of the Local notebook."""
    documents = {row["id"]: row["text"] for row in read("python_faq/documents.jsonl")}
    index = bm25s.BM25()
    index.index(words(list(documents.values())), show_progress=False)
    found = {}
    for row in read("python_faq/queries.jsonl")[::3]:
        places, _ = index.retrieve(words([row["text"]]), k=50, show_progress=False)
        ids = [list(documents)[place] for place in places[0]]
        found[row["id"]] = (row["text"], {i: documents[i] for i in ids}, row["relevant"])
    return found


def words(texts: list[str]):
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def compare(queries, exact, fast, max_length: int) -> list[str]:
    """Return one row of the table."""
    pairs = [(text, document) for text, candidates, _ in queries.values() for document in candidates.values()]
    begin = time.perf_counter()
    right = dict(zip(pairs, score(pairs, *exact, max_length=max_length), strict=True))
    middle = time.perf_counter()
    near = dict(zip(pairs, score(pairs, *fast, max_length=max_length), strict=True))
    end = time.perf_counter()
    runs, taus, again, equal = ({}, {}), [], 0, 0
    for name, (text, candidates, _) in queries.items():
        mine = [(text, document) for document in candidates.values()]
        logits = [right[pair] for pair in mine], [near[pair] for pair in mine]
        taus.append(kendall_tau(*logits))
        for run, values in zip(runs, logits, strict=True):
            run[name] = dict(zip(candidates, values, strict=True))
        mixed = top_n_in_float32(
            mine, 10, lambda pairs: [near[pair] for pair in pairs], lambda pairs: [right[pair] for pair in pairs]
        )
        again += sum(ours != theirs for ours, theirs in zip(mixed, logits[1], strict=True))
        equal += best(mixed) == best(logits[0])
    qrels = {name: dict.fromkeys(relevant, 1) for name, (_, _, relevant) in queries.items()}
    values = [{m.query_id: m.value for m in ir_measures.iter_calc([nDCG @ 10], qrels, run)} for run in runs]
    gain = torch.tensor([values[1][name] - values[0][name] for name in queries])
    generator = torch.Generator().manual_seed(0)
    draws = gain[torch.randint(len(gain), (10_000, len(gain)), generator=generator)].mean(1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    differences = [abs(right[pair] - near[pair]) for pair in pairs]
    means = [sum(value.values()) / len(value) for value in values]
    return [
        f"{len(queries)} queries, {len(pairs)} pairs of up to {max_length} tokens",
        f"{means[0]:.3f}",
        f"{means[1]:.3f}",
        f"{gain.mean():+.4f} ({low:+.4f} to {high:+.4f})",
        f"{sum(taus) / len(taus):.3f}",
        f"{max(differences):.2f}",
        f"{torch.tensor(list(right.values())).std():.2f}",
        f"{again / len(pairs):.0%}",
        f"{equal} of {len(queries)}",
        f"{(middle - begin) / (end - middle):.2f}",
    ]


def best(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda place: (-logits[place], place))[:10]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "tests" / "stand_in_model")
    exact, fast = load_reranker(model, device="cpu"), load_reranker(model, device="cpu", dtype="int8")
    config = exact.model.config
    found = machine("cpu")
    rows = {
        "hand-written": compare(handwritten(), exact, fast, 512),
        "Python FAQ": compare(python_faq(), exact, fast, 96),
    }
    lines = [
        "# int8-accuracy",
        "",
        f"Written by `python -m benchmarks.accuracy`: {Path(model).name}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, on {found['processor']} ({' '.join(found['instructions'])}), torch {torch.__version__}",
        "",
        "| set | of | nDCG@10 float32 | int8 | difference (95 % interval, paired bootstrap over queries) "
        "| Kendall's tau, mean over queries "
        "| largest difference of a logit | standard deviation of the logits | scored again for the "
        "top 10 | top 10 as in float32 | times as fast, other programs running |",
        "|---" * 11 + "|",
        *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items()),
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
