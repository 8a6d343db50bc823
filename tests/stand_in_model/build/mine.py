"""Find wrong documents for the queries, with the teachers' similarities: groups.jsonl.

{"query", "documents": [the right one, then wrong ones, nearest first], "similarities", "language", "source"}

A pool has texts of one source in one language and, for translations, in English. e5 takes many
texts in the query's language for relevant: these are the wrong documents of which the student can learn most. For
English, the similarity is the mean of e5's and all-MiniLM-L6-v2's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from construct import PREFIXES, read, sample
from distil import MODEL, Teacher
from e5 import read_e5
from transformers import AutoModel, AutoTokenizer

QUERIES = {"wiki": 1300, "python": 2400, "help": 450, "messages": 450}  # of each language
CHARACTERS = {"wiki": 600, "python": 1200, "help": 300, "messages": 300}
WRONG, NEAREST = 7, 12  # wrong documents: four of the nearest, two further ones, one at random
SAME = 0.985  # of e5's similarity: the same text in other words, or a duplicate
MINILM_SCALE = 0.15  # MiniLM's similarities spread about seven times as far as e5's


class MiniLM:
    """all-MiniLM-L6-v2 as sentence-transformers runs it."""

    def __init__(self, packages: Path) -> None:
        folder = next(packages.glob("minilm/*/model"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((self.model(**inputs).last_hidden_state * mask).sum(1))


def embed(texts: list[str], model) -> np.ndarray:
    """Unit vectors of `texts`, computed in batches of like length."""
    vectors = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        for i, vector in zip(batch, model([texts[i] for i in batch]).numpy(), strict=True):
            vectors[i] = vector
    return np.stack(vectors)


def add_minilm(e5: np.ndarray, minilm: np.ndarray) -> np.ndarray:
    """The mean of both teachers' similarities, on e5's scale."""
    both = e5 + MINILM_SCALE * minilm
    return (both - both.mean()) / 2 + e5.mean()


def groups(rows: list[dict], e5: Teacher, minilm: MiniLM, rng: np.random.Generator):
    """The groups of the rows of one language and source."""
    size = CHARACTERS[rows[0]["source"]]
    queries = [row["query"][:size] for row in rows]
    # A translation's query is in the language or in English, so the pool has both.
    texts = [row["document"] for row in rows] + [row["query"] for row in rows if "english" in row]
    pool = list(dict.fromkeys(text[:size] for text in texts))
    place = {text: i for i, text in enumerate(pool)}
    asked, found = (embed(side, lambda t, p=p: e5(t, p)) for side, p in zip((queries, pool), PREFIXES, strict=True))
    near = asked @ found.T
    taught = near
    if rows[0]["language"] == "en":
        taught = add_minilm(near, embed(queries, minilm) @ embed(pool, minilm).T)
    titles: dict[str, set[int]] = {}
    for row in rows:  # several queries of an article share its text, or parts of it
        titles.setdefault(row["query"], set()).add(place[row["document"][:size]])
    for i, row in enumerate(rows):
        right = place[row["document"][:size]]
        out = {right, place.get(queries[i], right)} | titles[row["query"]]
        order = [
            int(j)
            for j in np.argsort(-taught[i])[:80]
            if j not in out and near[i, j] < SAME and found[j] @ found[right] < SAME
        ]
        wrong = [
            *rng.choice(order[:NEAREST], 4, replace=False),
            *rng.choice(order[NEAREST:], 2, replace=False),
            rng.integers(len(pool)),
        ]
        chosen = [right, *(int(j) for j in wrong if j != right)]
        yield {
            "query": queries[i],
            "documents": [pool[j] for j in chosen],
            "similarities": [round(float(taught[i, j]), 4) for j in chosen],
            "language": row["language"],
            "source": row["source"],
        }


def mine(packages: Path, data: Path) -> None:
    """Write groups.jsonl."""
    rng = np.random.default_rng(4)
    e5, minilm = Teacher(read_e5(packages / MODEL)), MiniLM(packages)
    kinds: dict[tuple[str, str], list[dict]] = {}
    for row in sample(read(data / "pairs.jsonl"), max(QUERIES.values()), 5):
        if row["source"] in QUERIES:
            kinds.setdefault((row["language"], row["source"]), []).append(row)
    with (data / "groups.jsonl").open("w", encoding="utf-8") as file:
        for (language, source), rows in kinds.items():
            count = 0
            for group in groups(rows[: QUERIES[source]], e5, minilm, rng):
                file.write(json.dumps(group, ensure_ascii=False) + "\n")
                count += 1
            print(language, source, count, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    arguments = parser.parse_args()
    mine(arguments.packages, arguments.data)
