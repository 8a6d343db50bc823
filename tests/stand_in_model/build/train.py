"""Train the constructed cross-encoder on pairs. The number of steps and the seeds are fixed.

Each query comes with six documents: its own, four of the hard negatives that teacher.py found, a random one. In the
short batches another query about a document stands in for it, so that one-sentence documents are seen, too.
The loss has four parts: the teacher's distribution over the six (KL), the label (cross-entropy), the teacher's cosine
on the scale of the logits (so that relevant pairs come out positive and others negative), and, with a falling weight,
the teacher's vectors of query and document, which the layer before the comparison should yield.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from construct import HEAD, save
from teacher import read
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STEPS, HORIZON = 90, 150  # training ends after STEPS; rate and weights fall as if it went on to HORIZON
HARD, RANDOM = 4, 1
# Tokens a pair, queries a batch, share of the batches. Most pairs are short, which sees more of them in the time.
BATCHES = ((56, 20, 0.35), (112, 10, 0.45), (160, 7, 0.14), (320, 3, 0.06))
SHORT = 56
RATE, SLOW, WARMUP = 6e-5, 2e-5, 10
WEIGHTS = {"distribution": 1.0, "label": 0.3, "scale": 0.2, "vectors": 5.0}
SLOPE, OFFSET, BONUS = 22.0, 9.0, 2.0  # cosine -> logit, and what the query's own document gets on top


class Pairs:
    """Batches of queries, each with its own document first."""

    def __init__(self, data: Path, tokenizer) -> None:
        documents, queries = read(data / "documents.jsonl"), read(data / "queries.jsonl")
        options = {"add_special_tokens": False, "truncation": True}
        self.documents = tokenizer([row["text"] for row in documents], max_length=320, **options)["input_ids"]
        self.queries = tokenizer([row["text"] for row in queries], max_length=48, **options)["input_ids"]
        self.own = [row["document"] for row in queries]
        self.about: dict[int, list[int]] = {}
        for query, document in enumerate(self.own):
            self.about.setdefault(document, []).append(query)
        self.candidates = np.load(data / "candidates.npy")
        self.document_vectors = torch.from_numpy(np.load(data / "documents.npy")).float()
        self.query_vectors = torch.from_numpy(np.load(data / "queries.npy")).float()
        self.rng = np.random.default_rng(1)
        self.order: list[int] = []

    def __call__(self, count: int, length: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """(model inputs, query vectors, document vectors, which documents are seen at least in their larger part)."""
        if len(self.order) < count:
            self.order = self.rng.permutation(len(self.queries)).tolist()
        asked, self.order = self.order[:count], self.order[count:]
        rows, vectors, seen = [], [], []
        for query in asked:
            hard = np.unique(self.candidates[query])
            hard = self.rng.choice(hard[hard >= 0], HARD, replace=False)
            room = length - len(self.queries[query]) - 4
            for document in (self.own[query], *hard, *self.rng.integers(len(self.documents), size=RANDOM)):
                others = [other for other in self.about.get(int(document), []) if other != query]
                if length == SHORT and others:
                    other = int(self.rng.choice(others))
                    ids, vector = self.queries[other], self.query_vectors[other]
                else:
                    ids, vector = self.documents[document], self.document_vectors[document]
                vectors.append(vector)
                seen.append(len(ids) <= 1.7 * room)
                rows.append(([0, *self.queries[query], 2], [2, *ids[: max(8, room)], 2]))
        longest = max(len(a) + len(b) for a, b in rows)
        ids, types, mask = (torch.full((len(rows), longest), fill) for fill in (1, 0, 0))
        for i, (a, b) in enumerate(rows):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            types[i, len(a) : len(a) + len(b)] = 1
            mask[i, : len(a) + len(b)] = 1
        inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
        wanted = self.query_vectors[asked].repeat_interleave(1 + HARD + RANDOM, 0)
        return inputs, wanted, torch.stack(vectors), torch.tensor(seen)


def losses(
    output, gates: Tensor, inputs: dict[str, Tensor], query: Tensor, document: Tensor, seen: Tensor
) -> dict[str, Tensor]:
    """The four parts of the loss. `gates` are the coordinates that tell the segments apart."""
    logits = output.logits.view(-1, 1 + HARD + RANDOM)
    target = SLOPE * (query * document).sum(1).view_as(logits) - OFFSET
    target[:, 0] += BONUS
    hidden = output.hidden_states[-2].clone()
    hidden[..., gates] = 0
    apart = []
    for segment, vectors, use in ((0, query, torch.ones_like(seen)), (1, document, seen)):
        inside = ((inputs["token_type_ids"] == segment) & (inputs["attention_mask"] == 1)).unsqueeze(-1)
        mean = (hidden * inside).sum(1) / inside.sum(1)
        apart.append((1 - F.cosine_similarity(mean, vectors))[use].sum() / use.sum().clamp(min=1))
    return {
        "distribution": F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean"),
        "label": F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)),
        "scale": F.smooth_l1_loss(logits, target.clamp(-8, 8)),
        "vectors": sum(apart),
    }


def groups(model) -> list[dict]:
    """Parameter groups: the comparison and the head are exact arithmetic at first and learn more slowly."""
    late = (f"encoder.layer.{model.config.num_hidden_layers - 1}.", "classifier.")
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if any(part in name for part in late) is slow], "lr": rate}
        for slow, rate in ((False, RATE), (True, SLOW))
    ]


def freeze_gates(model, gates: Tensor) -> None:
    """Keep training from blurring the gates: no gradient for what writes, reads or compares them.

    Each weight that touches them moves many tokens at once, so their gradients would drown all others.
    """
    everything = slice(None)
    freed = torch.cat([torch.arange(HEAD - 2, 384, HEAD), torch.arange(HEAD - 1, 384, HEAD)])
    embeddings, norms = model.roberta.embeddings, [model.roberta.embeddings.LayerNorm]
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    frozen = [(table.weight, (everything, gates)) for table in tables]
    for layer in model.roberta.encoder.layer[:-1]:
        own, up, down = layer.attention.self, layer.intermediate.dense, layer.output.dense
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
        frozen += [(part.weight, (everything, gates)) for part in (own.value, up)]
        for part in (own.query, own.key):
            frozen += [(part.weight, (everything, gates)), (part.weight, (freed,)), (part.bias, (freed,))]
        for part in (layer.attention.output.dense, down):
            frozen += [(part.weight, (gates,)), (part.bias, (gates,))]
        frozen += [(part, (slice(-4, None),)) for part in (up.weight, up.bias)]
        frozen += [(down.weight, (everything, slice(-4, None)))]
    frozen += [(part, (gates,)) for norm in norms for part in (norm.weight, norm.bias)]

    def hook(gradient: Tensor, where: tuple) -> Tensor:
        gradient = gradient.clone()
        gradient[where] = 0
        return gradient

    for parameter, where in frozen:
        parameter.register_hook(lambda gradient, where=where: hook(gradient, where))


def train(start: Path, data: Path, out: Path, steps: int) -> None:
    """Train, save to `out` now and then and at the end."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(start)
    # Evaluation mode throughout: this short a training needs no dropout.
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    types = model.roberta.embeddings.token_type_embeddings.weight
    gates = (types[0] - types[1]).abs().topk(2).indices
    freeze_gates(model, gates)
    pairs = Pairs(data, tokenizer)
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.0, (HORIZON - step) / (HORIZON - WARMUP)))
    )
    rng, began, totals = np.random.default_rng(2), time.monotonic(), dict.fromkeys(WEIGHTS, 0.0)
    for step in range(1, steps + 1):
        length, count, _ = BATCHES[rng.choice(len(BATCHES), p=[share for *_, share in BATCHES])]
        inputs, *targets = pairs(count, length)
        parts = losses(model(**inputs, output_hidden_states=True), gates, inputs, *targets)
        optimizer.zero_grad()
        falling = {"vectors": 1 - 0.8 * step / HORIZON}
        sum(WEIGHTS[name] * falling.get(name, 1) * part for name, part in parts.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        for name, part in parts.items():
            totals[name] += part.item()
        if step % 20 == 0:
            means = "  ".join(f"{name} {value / 20:.3f}" for name, value in totals.items())
            print(f"step {step}  {time.monotonic() - began:.0f} s  {means}", flush=True)
            totals = dict.fromkeys(WEIGHTS, 0.0)
        if step % 30 == 0 or step == steps:
            save(model, tokenizer, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the model that construct.py wrote")
    parser.add_argument("data", type=Path, help="the folder that data.py and teacher.py filled")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.start, arguments.data, arguments.out, arguments.steps)
