"""Embed all texts with the teacher, all-MiniLM-L6-v2, and find each query's hard negatives.

Writes documents.npy, queries.npy (unit vectors, float16) and candidates.npy (for each query, the teacher's 30 nearest
documents and BM25's first 20, without its own document).
"""

import argparse
import json
from pathlib import Path

import bm25s
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

MAX_TOKENS = 192


def read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def minilm(packages: Path) -> Path:
    """The folder of the teacher's weights among the fetched packages."""
    return next(packages.glob("minilm/*/model"))


@torch.inference_mode()
def embed(texts: list[str], folder: Path, tokens_per_batch: int = 8192) -> np.ndarray:
    """Unit vectors of `texts`: the mean over the last hidden states, as sentence-transformers does for this model."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
    vectors = np.zeros((len(texts), 384), np.float32)
    while order:
        count = max(1, tokens_per_batch // len(encoded[order[0]]))
        batch, order = order[:count], order[count:]
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        vectors[batch] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return vectors


def candidates(documents: list[dict], queries: list[dict], texts: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """For each query 50 documents that look relevant, -1 in place of its own one."""
    own = np.array([query["document"] for query in queries])
    dense = np.concatenate(
        [np.argpartition(-(asked[i : i + 2048] @ texts.T), 30, axis=1)[:, :30] for i in range(0, len(asked), 2048)]
    )
    retriever = bm25s.BM25()
    options = {"stopwords": "en", "show_progress": False}
    retriever.index(bm25s.tokenize([row["text"] for row in documents], **options), show_progress=False)
    tokens = bm25s.tokenize([row["text"] for row in queries], **options)
    lexical, _ = retriever.retrieve(tokens, k=20, show_progress=False)
    found = np.concatenate([dense, lexical], axis=1).astype(np.int32)
    found[found == own[:, None]] = -1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py wrote")
    arguments = parser.parse_args()
    rows = {name: read(arguments.data / f"{name}.jsonl") for name in ("documents", "queries")}
    vectors = {name: embed([row["text"] for row in rows[name]], minilm(arguments.packages)) for name in rows}
    for name in rows:
        np.save(arguments.data / f"{name}.npy", vectors[name].astype(np.float16))
    np.save(
        arguments.data / "candidates.npy",
        candidates(rows["documents"], rows["queries"], vectors["documents"], vectors["queries"]),
    )
