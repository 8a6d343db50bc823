"""Train the whole as what it is, a cross-encoder, on right and wrong documents; then save the model.

Attention between query and document is opened a little in the upper layers, and training decides how far. A step has
groups of one kind: facts in eleven languages (`facts.jsonl`: query, answer and near misses, the near misses mostly in
the query's language and the answer often in another), or what mine.py found, where part of the
target is the label and part is what the teachers say. The weights are rounded in the loop, as in distil.py.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from compare import save
from construct import CLOSED, HEAD, WIDTH, encode, read
from data import facts
from distil import BFLOAT16, Rounding, freeze_gates
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STEPS, RATE, WARMUP = 500, 8e-5, 30
FACTS, MINED = 6, 4  # groups a step
FACTS_SHARE = 0.35  # of the steps
WRONG = 4  # documents a group
CUTS = ((300, 0.5), (600, 0.3), (1200, 0.2))  # characters of a mined document at most, share of these steps
LENGTH = 320  # tokens of a pair at most
LONG = 0.3  # share of the facts whose documents stand among other texts
TEMPERATURE, LABEL = 0.02, 0.4  # of the teachers' similarities; the label's share of the target
CALIBRATION = 0.3  # weight of the loss that puts right documents above 0 and wrong ones below
OPENED, AJAR = 8, 3.0  # from this layer on, attention between the texts is closed by this much only, in logits
ENGLISH, ACROSS = 0.3, 0.6  # shares of the facts: asked in English; answered in any language
PLAIN, JOINED, NEAR = 0.5, 0.15, 0.7  # answered in the question's words; behind a near miss; among near misses
WEIGHTS = {"python": 2.0, "help": 0.6, "messages": 0.6}  # how often a mined group is drawn, by its source


def fact(groups: list[dict], rng: np.random.Generator) -> tuple[str, list[str], Tensor]:
    """A query, its documents with the right one first, and the target.

    The answer says it in other words or in the question's own. Without the latter, a model learns that a document which
    repeats the question is wrong.
    """
    chosen = groups[rng.integers(len(groups))]
    languages = list(chosen)

    def language() -> str:
        return languages[rng.integers(len(languages))]

    def other() -> str:
        while (group := groups[rng.integers(len(groups))]) is chosen:
            pass
        return group[language() if rng.random() < 0.5 else asked][1 + rng.integers(4)]

    asked = "en" if rng.random() < ENGLISH else language()
    answered = language() if rng.random() < ACROSS else asked
    query, _, *near, _ = chosen[asked]
    _, answer, *far, plain = chosen[answered]
    right = plain if rng.random() < PLAIN else answer
    if rng.random() < JOINED:
        right = f"{far[rng.integers(2)]} {right}"
    if rng.random() < NEAR:
        wrong = [*near, far[rng.integers(2)] if answered != asked else other(), other()]
    else:
        wrong = [other() for _ in range(WRONG)]
    documents = [right, *wrong]
    if rng.random() < LONG:
        # A document may be long and only a sentence of it answer: its place and its company say nothing.
        for i, document in enumerate(documents):
            company = [other() for _ in range(rng.integers(2, 7))]
            company.insert(rng.integers(len(company) + 1), document)
            documents[i] = " ".join(company)
    target = torch.zeros(WRONG + 1)
    target[0] = 1
    return query, documents, target


def found(groups: list[dict], often: np.ndarray, size: int, rng: np.random.Generator) -> tuple[str, list[str], Tensor]:
    """The same from groups.jsonl, documents cut at `size` characters."""
    group = groups[int(np.searchsorted(often, rng.random() * often[-1], side="right"))]
    wrong = 1 + rng.choice(len(group["documents"]) - 1, WRONG, replace=False)
    places = [0, *wrong.tolist()]
    target = (1 - LABEL) * torch.tensor([group["similarities"][i] for i in places]).div(TEMPERATURE).softmax(0)
    target[0] += LABEL
    return group["query"], [group["documents"][i][:size] for i in places], target


def loss(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How well each group is ordered, and on which side of 0 its documents are."""
    wrong = F.softplus(logits[:, 1:]).mean(1)
    return {
        "order": -(target * logits.log_softmax(1)).sum(1).mean(),
        "zero": CALIBRATION * (F.softplus(-logits[:, 0]) + wrong).mean(),
    }


def open_layers(model, before: float, after: float) -> None:
    """Let a token see more or less of the other text: attention to it is smaller by `after` logits, not by `before`."""
    for layer in model.roberta.encoder.layer[OPENED:12]:
        for part in (layer.attention.self.query, layer.attention.self.key):
            for start in (HEAD - 2, HEAD - 1):
                part.weight.data[start:WIDTH:HEAD] *= (after / before) ** 0.5
                part.bias.data[start:WIDTH:HEAD] *= (after / before) ** 0.5


def keep_exact(layer) -> None:
    """Let the layer that compares compute in float32 in any case: it subtracts nearly equal numbers."""
    forward = layer.forward

    def exact(hidden: Tensor, *args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return forward(hidden.float(), *args, **kwargs)

    layer.forward = exact


@torch.no_grad()
def first(model, tokenizer, groups: list[dict]) -> str:
    """How often the answer comes first: near misses in the query's language, the answer there or in another."""
    right = {0: 0, 3: 0}
    for group in groups:
        languages = list(group)
        for move in right:
            rows = [
                {"query": group[name][0], "document": document}
                for i, name in enumerate(languages)
                for document in (group[languages[(i + move) % len(languages)]][1], *group[name][2:4])
            ]
            right[move] += int((model(**encode(tokenizer, rows)).logits.view(-1, 3).argmax(1) == 0).sum())
    asked = sum(map(len, groups))
    return f"held-out facts: same language {right[0] / asked:.3f}, another {right[3] / asked:.3f}"


def train(start: Path, data: Path, out: Path, steps: int) -> None:
    """Train, and save the average of the weights at half-time and at the end."""
    torch.manual_seed(1)
    rng = np.random.default_rng(6)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    gates = model.config.gates
    open_layers(model, CLOSED, AJAR)
    keep_exact(model.roberta.encoder.layer[-1])
    freeze_gates(model, gates, opened=OPENED)
    weights = Rounding(model.parameters(), RATE, WARMUP, least=0.03, clip=1.0, steps=steps)
    mined, known, began, totals, saved = read(data / "groups.jsonl"), facts(), time.monotonic(), {}, []
    often = np.cumsum([WEIGHTS.get(group["source"], 1.0) for group in mined])
    for step in range(1, steps + 1):
        if rng.random() < FACTS_SHARE:
            kind, groups = "facts", [fact(known, rng) for _ in range(FACTS)]
        else:
            size = CUTS[rng.choice(len(CUTS), p=[share for _, share in CUTS])][0]
            kind, groups = "mined", [found(mined, often, size, rng) for _ in range(MINED)]
        weights.use()
        rows = [{"query": query, "document": document} for query, documents, _ in groups for document in documents]
        with BFLOAT16:
            hidden = model.roberta(**encode(tokenizer, rows, LENGTH)).last_hidden_state
        logits = model.classifier(hidden).view(len(groups), -1)
        parts = loss(logits, torch.stack([target for *_, target in groups]))
        sum(parts.values()).backward()
        weights.step()
        parts["first"] = (logits.argmax(1) == 0).float().mean()
        for name, part in parts.items():
            totals.setdefault(f"{kind} {name}", []).append(part.item())
        if step % 20 == 0:
            shown = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(totals.items()))
            print(f"step {step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
            totals = {}
        if step in (steps // 2, steps):
            weights.use()
            print(first(model, tokenizer, held_out()), flush=True)
            saved.append([parameter.detach().clone() for parameter in weights.used])
    # Weights averaged along the way generalise better than the last ones: https://arxiv.org/abs/1803.05407
    weights.use([sum(two) / 2 for two in zip(*saved, strict=True)])
    save(model, tokenizer, out)


def held_out() -> list[dict]:
    """The facts that training never sees."""
    with (Path(__file__).parent / "facts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["texts"] for i, line in enumerate(file) if not i % 15]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the model that compare.py wrote")
    parser.add_argument("data", type=Path, help="the folder that data.py and mine.py filled")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.start, arguments.data, arguments.out, arguments.steps)
