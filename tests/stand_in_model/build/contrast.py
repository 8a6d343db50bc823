"""Train on with long documents, every query of a batch against every document of it; then save the model.

train.py runs the whole model for each of a query's few documents. Here attention between the texts is closed up to the
layer that compares them, as with `evaluate.py --closed`, and half of that layer's heads read one text, half the other.
So a pair's query can be compared with another pair's document without running the model again. The target is part
label, part what the teachers say: e5, and for English all-MiniLM-L6-v2. Other steps are train.py's, with attention
open, so that what they taught is not forgotten.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from compare import save
from construct import HEAD, PREFIXES, WIDTH, encode, read, sample
from data import facts
from distil import BFLOAT16, MODEL, Rounding, Teacher, freeze_gates, rounded
from e5 import read_e5
from evaluate import apart
from mine import SAME, MiniLM, add_minilm, embed
from torch import Tensor
from torch.nn import functional as F
from train import (
    AJAR,
    CALIBRATION,
    FACTS,
    LENGTH,
    MINED,
    OPENED,
    WRONG,
    fact,
    first,
    held_out,
    keep_exact,
    loss,
    open_layers,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STEPS, RATE, WARMUP = 180, 4e-5, 15
KINDS = {"contrast": 0.6, "facts": 0.3, "groups": 0.1}  # shares of the steps
SOURCES = {  # rows of each source and language, and their share of the steps
    ("python", "en"): (4500, 0.6),
    ("wiki", "en"): (2500, 0.24),
    ("wiki", "fr"): (800, 0.08),
    ("wiki", "es"): (800, 0.08),
}
CLUSTERS, SIZE, NEAREST = 3, 8, 30  # a batch: three rows, each with seven of the thirty that its query is nearest to
QUERY = 200  # characters of a query at most
CUTS = ((300, 0.3), (800, 0.4), (2000, 0.3))  # characters of a document at most, share of these steps
LONG = 480  # tokens of such a pair at most
STARTS = (6, 32)  # where documents begin, in tokens
TEMPERATURE, LABEL = 0.02, 0.5
NARROW = 14.0  # instead of train.py's AJAR: so open, 400 tokens of a document outweigh a query's ten
SINKS = range(4, 9)  # layers, counted from 0, in which LayerNorm takes the gates of separators away
APART, MARGIN = 20.0, 3.0  # before the activation: between such a separator and all other tokens; from where it bends
SPARED = 15  # every 15th row is not trained on


def separate(tokens: Tensor, wanted: Tensor) -> Tensor:
    """The direction along which `wanted` tokens are larger than all others.

    It is a linear classifier's, with squared hinge loss; both kinds weigh the same, however many there are of each.
    """
    center, spread = tokens.mean(0), tokens.std(0).clamp(min=0.05)
    known, sign = (tokens - center) / spread, torch.where(wanted, 1.0, -1.0)
    weight = torch.where(wanted, 0.5 / wanted.sum(), 0.5 / (~wanted).sum())
    line, bias = torch.zeros(tokens.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([line, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        missed = (1 - sign * (known @ line + bias)).clamp(min=0)
        cost = (weight * missed.square()).sum() + 1e-3 * line.square().sum()
        cost.backward()
        return cost

    with torch.enable_grad():
        optimizer.step(closure)
    return line.detach() / spread


@torch.no_grad()
def renew_separators(model, tokenizer, data: Path) -> None:
    """Write the gates of </s> anew in the layers that take them away.

    e5 makes <s> and </s> its attention sinks: in each of SINKS one feed-forward unit fires for them alone, and writes
    so much that LayerNorm shrinks their gates to nothing. A text would then see the other one's </s>, and what that
    has gathered. Four idle units become two pairs like those of construct.py's renew_gates, one for each text's </s>.
    """
    inputs = encode(tokenizer, sample(read(data / "pairs.jsonl"), 12, seed=9), 256)
    segment, inside = inputs["token_type_ids"], inputs["attention_mask"].bool()
    separator = (inputs["input_ids"] == tokenizer.eos_token_id) & inside
    mask = torch.zeros(inside.shape).masked_fill(~inside, -1e9)[:, None, None]
    hidden = model.roberta.embeddings(inputs["input_ids"], segment)
    # The first gate is the document's.
    own = {gate: separator & (segment == side) for gate, side in zip(model.config.gates, (1, 0), strict=True)}
    for place, layer in enumerate(model.roberta.encoder.layer[: SINKS.stop]):
        up, down, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
        middle = layer.attention(hidden, mask)[0]
        if place in SINKS:
            least = F.gelu(up(middle[inside])).abs().mean(0) * down.weight.norm(dim=0)
            for (gate, where), pair in zip(own.items(), least.topk(4, largest=False).indices.view(2, 2), strict=True):
                others = inside & ~where
                line = separate(middle[inside], where[inside])
                gap = torch.quantile(middle[where] @ line, 0.01) - (middle[others] @ line).max()
                if gap <= 0:
                    raise ValueError(f"layer {place}: nothing tells one text's </s> from all other tokens")
                line = rounded(line[None] * APART / gap)
                seen = (middle @ line[0]).masked_fill(~inside, 0)
                up.weight[pair], down.weight[:, pair] = line, 0
                up.bias[pair] = -torch.stack([seen[others].max() + MARGIN, seen[where].min() - MARGIN])
                on = F.gelu(up(middle[where])[:, pair]) @ torch.tensor([1.0, -1.0])
                out = down(F.gelu(up(middle[where]))) + middle[where]
                needed = out.mean(1) + out.std(1) * (-1 - norm.bias[gate]) / norm.weight[gate] - out[:, gate]
                size = needed.mean() / on.mean()
                down.weight[gate, pair] = torch.stack([size, -size])
        hidden = layer(hidden, mask)
    gates = [f"{hidden[where][:, gate].mean():.2f}" for gate, where in own.items()]
    print(f"gates of </s> behind layer {SINKS.stop}, document and query: {' '.join(gates)}", flush=True)


@torch.no_grad()
def leave_out_separators(model, tokenizer, data: Path) -> None:
    """Keep <s> and </s> out of the averages that the last layer compares.

    <s> is open to both sides, and would put some of the document into the query's average. A regression finds what
    tells them from other tokens.
    """
    attention = model.roberta.encoder.layer[-1].attention.self
    inputs = encode(tokenizer, sample(read(data / "pairs.jsonl"), 25, seed=9), 128)
    inside = inputs["attention_mask"].bool()
    hidden = model.roberta(**inputs, output_hidden_states=True).hidden_states[-2]
    special = torch.isin(inputs["input_ids"], torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id]))[inside]
    mask = torch.zeros(inside.shape).masked_fill(~inside, -1e9)[:, None, None]
    tokens = torch.cat([hidden[inside], torch.ones(int(inside.sum()), 1)], 1).double()
    weight = torch.where(special, (~special).sum() / special.sum(), 1.0)[:, None].double()
    moment = tokens.T @ (tokens * weight) + 1e-3 * torch.eye(WIDTH + 1)
    line = torch.linalg.solve(moment, tokens.T @ (special[:, None] * weight))[:-1, 0].float()
    before = attention(hidden, mask)[0][:, 0]
    attention.key.weight[::HEAD] -= line
    after = attention(hidden, mask)[0][:, 0]
    # The averages keep their centre and their spread.
    ratio = before.std(0).view(2, -1).mean(1).div(after.std(0).view(2, -1).mean(1)).repeat_interleave(WIDTH // 2)
    attention.value.weight *= ratio[:, None]
    attention.value.bias.copy_(before.mean(0) - ratio * (after.mean(0) - attention.value.bias))
    print(f"separators left out; the averages' spread was {ratio.unique().tolist()} of what it is now", flush=True)


class Rows:
    """The pairs of one source and language, and what the teachers say of each query with each document."""

    def __init__(self, rows: list[dict], e5: Teacher, minilm: MiniLM) -> None:
        self.rows = rows
        sides = [[row[name] for row in rows] for name in ("query", "document")]
        with BFLOAT16:
            asked, found = (
                embed(side, lambda texts, p=p: e5(texts, p).float()) for side, p in zip(sides, PREFIXES, strict=True)
            )
            self.taught = near = asked @ found.T
            if rows[0]["language"] == "en":
                one, other = (embed(side, lambda texts: minilm(texts).float()) for side in sides)
                self.taught = add_minilm(near, one @ other.T)
        # An article gives several rows, and a text may be there twice: these are not wrong for one another.
        self.same = (found @ found.T > SAME) | (near > SAME)
        for side in sides:
            places: dict[str, list[int]] = {}
            for i, text in enumerate(side):
                places.setdefault(text, []).append(i)
            for alike in places.values():
                self.same[np.ix_(alike, alike)] = True
        self.seen = [i for i in range(len(rows)) if i % SPARED]
        order = np.argsort(-np.where(self.same, -1, self.taught))[:, : 2 * NEAREST]
        self.nearest = {i: [int(j) for j in order[i] if j % SPARED][:NEAREST] for i in self.seen}

    def cluster(self, rng: np.random.Generator, size: int) -> list[int]:
        """A row, and some whose documents are near its query."""
        i = self.seen[rng.integers(len(self.seen))]
        return [i, *rng.choice(self.nearest[i], size - 1, replace=False).tolist()]

    def texts(self, i: int, size: int) -> dict[str, str]:
        """A row's texts, the document cut at `size` characters."""
        return {"query": self.rows[i]["query"][:QUERY], "document": self.rows[i]["document"][:size]}

    def batch(self, size: int, rng: np.random.Generator) -> tuple[list[dict], Tensor, Tensor]:
        """Pairs, the teachers' similarity of each query (row) and document (column), and which may count as one."""
        chosen = list(dict.fromkeys(i for _ in range(CLUSTERS) for i in self.cluster(rng, SIZE)))
        grid = np.ix_(chosen, chosen)
        tables = (torch.from_numpy(table[grid]) for table in (self.taught, self.same))
        return [self.texts(i, size) for i in chosen], *tables

    def group(self, size: int, rng: np.random.Generator) -> tuple[str, list[str], Tensor]:
        """A query, documents with the right one first, and the target, as train.py's `found`."""
        chosen = self.cluster(rng, WRONG + 1)
        target = (1 - LABEL) * torch.from_numpy(self.taught[chosen[0], chosen]).float().div(TEMPERATURE).softmax(0)
        target[0] += LABEL
        texts = [self.texts(i, size) for i in chosen]
        return texts[0]["query"], [text["document"] for text in texts], target


def every_pair(model, inputs: dict[str, Tensor], starts: Tensor) -> Tensor:
    """Logits of each query (row) with each document (column) of a batch of pairs.

    `starts` says at which position each document begins. Behind its own query, a document's position would give away
    how long that query is, and so which one is right.
    """
    segment, inside = inputs["token_type_ids"], inputs["attention_mask"].bool()
    positions = torch.arange(segment.shape[1]) + 2 + segment * (starts - segment.argmax(1))[:, None]
    positions = positions.clamp(max=513).masked_fill(~inside, 1)
    mask = apart(segment, inside)
    *lower, last = model.roberta.encoder.layer
    with BFLOAT16:
        hidden = model.roberta.embeddings(inputs["input_ids"], segment, positions)
        for layer in lower:
            hidden = layer(hidden, mask.to(hidden.dtype))
    hidden, own, count = hidden.float(), last.attention.self, len(hidden)

    def heads(x: Tensor) -> Tensor:
        return x.view(count, -1, own.num_attention_heads, own.attention_head_size).transpose(1, 2)

    query, key, value = heads(own.query(hidden[:, :1])), heads(own.key(hidden)), heads(own.value(hidden))
    text = torch.zeros(count, 1, 1, hidden.shape[1]).masked_fill(~inside[:, None, None], -1e9)
    document, asked = F.scaled_dot_product_attention(query, key, value, text).reshape(count, 2, -1).unbind(1)
    both = torch.cat([document.expand(count, -1, -1), asked[:, None].expand(-1, count, -1)], -1)
    middle = last.attention.output(both, hidden[:, :1].expand(-1, count, -1))
    return model.classifier(last.feed_forward_chunk(middle).flatten(0, 1)[:, None]).view(count, count)


def contrast(logits: Tensor, taught: Tensor, same: Tensor) -> dict[str, Tensor]:
    """How well each query orders the documents and each document the queries, and on which side of 0 they are."""
    right = torch.eye(len(logits), dtype=torch.bool)
    skipped, order = same & ~right, 0
    for scores, wanted, skip in ((logits, taught, skipped), (logits.T, taught.T, skipped.T)):
        target = LABEL * right + (1 - LABEL) * (wanted.float() / TEMPERATURE).masked_fill(skip, -1e9).softmax(1)
        order = order - (target * scores.masked_fill(skip, -1e4).log_softmax(1)).sum(1).mean() / 2
    wrong = F.softplus(logits)[~(skipped | right)].mean()
    return {"order": order, "zero": CALIBRATION * (F.softplus(-logits.diagonal()).mean() + wrong)}


@torch.no_grad()
def spared(model, tokenizer, sources: dict[tuple[str, str], Rows]) -> str:
    """Of 100 rows that training never sees: how often a query's own document comes first, and which are above 0."""
    shown = []
    for name, source in sources.items():
        rows = [source.texts(i, 800) for i in range(0, len(source.rows), SPARED)][:100]
        logits = every_pair(model, encode(tokenizer, rows, LONG), torch.full((len(rows),), 16))
        right = logits.diagonal()
        first = (logits.argmax(1) == torch.arange(len(logits))).float().mean()
        others = (logits > 0).float().sum() - (right > 0).sum()
        above = f"above 0 {(right > 0).float().mean():.2f}, others {others / (logits.numel() - len(logits)):.3f}"
        shown.append(f"{' '.join(name)}: first {first:.2f}, {above}")
    return "; ".join(shown)


def teach(packages: Path, data: Path) -> dict[tuple[str, str], Rows]:
    """The sources, with the teachers' similarities."""
    rng, e5, minilm = np.random.default_rng(7), Teacher(read_e5(packages / MODEL)), MiniLM(packages)
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in read(data / "pairs.jsonl"):
        rows.setdefault((row["source"], row["language"]), []).append(row)
    sources = {}
    for name, (count, _) in SOURCES.items():
        chosen = sorted(rng.permutation(len(rows[name]))[:count])
        sources[name] = Rows([rows[name][i] for i in chosen], e5, minilm)
        print(*name, len(chosen), flush=True)
    return sources


def train(packages: Path, data: Path, start: Path, out: Path, steps: int) -> None:
    """Train, and save the average of the weights at half-time and at the end, as train.py does."""
    torch.manual_seed(1)
    rng, sources, known = np.random.default_rng(8), teach(packages, data), facts()
    shares = [share for _, share in SOURCES.values()]
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    open_layers(model, AJAR, NARROW)
    renew_separators(model, tokenizer, data)
    leave_out_separators(model, tokenizer, data)
    keep_exact(model.roberta.encoder.layer[-1])
    freeze_gates(model, model.config.gates, opened=OPENED)
    weights = Rounding(model.parameters(), RATE, WARMUP, least=0.03, clip=1.0, steps=steps)
    began, totals, saved = time.monotonic(), {}, []
    for step in range(1, steps + 1):
        weights.use()
        kind = rng.choice(list(KINDS), p=list(KINDS.values()))
        source = list(sources.values())[rng.choice(len(sources), p=shares)]
        size = CUTS[rng.choice(len(CUTS), p=[share for _, share in CUTS])][0]
        if kind == "contrast":
            rows, *tables = source.batch(size, rng)
            logits = every_pair(model, encode(tokenizer, rows, LONG), torch.randint(*STARTS, (len(rows),)))
            parts, right = contrast(logits, *tables), torch.arange(len(rows))
        else:
            if kind == "facts":
                groups, length = [fact(known, rng) for _ in range(FACTS)], LENGTH
            else:
                groups, length = [source.group(size, rng) for _ in range(MINED)], LONG
            rows = [{"query": query, "document": text} for query, documents, _ in groups for text in documents]
            with BFLOAT16:
                hidden = model.roberta(**encode(tokenizer, rows, length)).last_hidden_state
            logits = model.classifier(hidden).view(len(groups), -1)
            parts, right = loss(logits, torch.stack([target for *_, target in groups])), 0
        sum(parts.values()).backward()
        weights.step()
        parts["first"] = (logits.argmax(1) == right).float().mean()
        for name, part in parts.items():
            totals.setdefault(f"{kind} {name}", []).append(part.item())
        if step % 20 == 0 or step == steps:
            shown = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(totals.items()))
            print(f"step {step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
            totals = {}
        if step in (steps // 2, steps):
            saved.append([weight.detach().clone() for weight in weights.exact])
    weights.use([sum(two) / 2 for two in zip(*saved, strict=True)])
    print(spared(model, tokenizer, sources), first(model, tokenizer, held_out()), sep="\n", flush=True)
    del model.config.gates
    save(model, tokenizer, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    parser.add_argument("start", type=Path, help="the model that train.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.packages, arguments.data, arguments.start, arguments.out, arguments.steps)
