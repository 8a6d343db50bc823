"""Build the untrained cross-encoder out of the teacher's weights.

A bi-encoder compares mean(query tokens) with mean(document tokens). All of that fits into a cross-encoder:

1. the teacher's layers encode query and document side by side. Two coordinates of the hidden state,
   the gates, say which is which: the first is -1 in the document and 0 in the query, the second the other way round.
   Two of the 32 query-key dimensions of each head multiply one token's first gate with the other's second one, which
   keeps the attention inside a segment and, being 0 there, changes nothing inside it. <s> is open to both.
2. one more layer compares: half of its heads average the document's tokens into <s>, the other half the query's; its
   feed-forward block multiplies the two vectors, by gelu(x) + gelu(-x) ~ sqrt(2 / pi) * x^2 and
   4ab = (a + b)^2 - (a - b)^2.
3. the head reads the sum of the products, roughly the cosine, as a logit.

Training (train.py) starts from there and is free to change all of it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from teacher import minilm, read
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, XLMRobertaConfig, XLMRobertaForSequenceClassification
from vocabulary import build, choose, teacher_ids

# All layers are kept and, but for four units a layer, all feed-forward units. Fewer would be faster, but each
# dropped layer is dear: the cosine of MiniLM's vectors to the full model's is .93 without layer 3, .87 without layers 1
# and 3, and .66 with layers 0, 2 and 5 alone.
LAYERS = (0, 1, 2, 3, 4, 5)
VOCABULARY = 14000
INTERMEDIATE = 1536
HEADS, HEAD = 12, 32
PRODUCTS = 191  # dimensions of each vector that are compared; the 192nd makes room for the score
SCORE = 191  # the coordinate of the comparison layer that carries the score
CLOSED, AJAR = 10.0, 5.0  # how much smaller, in logits, attention across segments is in the lower and the last layer


def calibration(tokenizer, documents: list[dict], queries: list[dict]) -> tuple[Tensor, Tensor]:
    """Some texts, tokenised: (ids, mask)."""
    texts = [row["text"] for row in documents[::40]] + [row["text"] for row in queries[::150]]
    encoded = tokenizer(texts, truncation=True, max_length=96, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def attend(layer, hidden: Tensor, mask: Tensor) -> Tensor:
    """The output of a BERT layer's attention block, after its LayerNorm."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

    own = layer.attention.self
    q, k, v = split(own.query(hidden)), split(own.key(hidden)), split(own.value(hidden))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
    return layer.attention.output.LayerNorm(hidden + layer.attention.output.dense(context))


def feed(layer, hidden: Tensor) -> Tensor:
    """The activations inside a BERT layer's feed-forward block."""
    return F.gelu(layer.intermediate.dense(hidden))


def prune(bert, ids: Tensor, mask: Tensor) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Drop layers and feed-forward units. Returns each kept layer's new block and the hidden states that enter it.

    The output weights are refitted by least squares, so that a layer also does, as far as it can, what the dropped
    layers after it did: its output should look like what entered the next kept layer in the teacher.
    """
    layers = bert.encoder.layer
    start = bert.embeddings(input_ids=ids)
    before_norm, hidden = [], start
    for layer in layers:
        middle = attend(layer, hidden, mask)
        before_norm.append(middle + layer.output.dense(feed(layer, middle)))
        hidden = layer.output.LayerNorm(before_norm[-1])
    blocks, inputs, hidden = [], [], start
    for place, index in enumerate(LAYERS):
        layer, last = layers[index], LAYERS[place + 1] - 1 if place + 1 < len(LAYERS) else len(layers) - 1
        inputs.append(hidden[mask])
        middle = attend(layer, hidden, mask)
        active = feed(layer, middle)
        weight = active[mask].var(0) * layer.output.dense.weight.square().sum(0)
        units = weight.topk(INTERMEDIATE - 4).indices.sort().values
        features = torch.cat([active[mask][:, units], torch.ones(int(mask.sum()), 1)], 1)
        target = (before_norm[last] - middle)[mask]
        gram = features.T @ features
        gram.diagonal()[:-1] += 1e-3 * gram.diagonal()[:-1].mean()
        solution = torch.linalg.solve(gram.double(), (features.T @ target).double()).float()
        norm = layers[last].output.LayerNorm
        hidden = norm(middle + active[..., units] @ solution[:-1] + solution[-1])
        blocks.append(
            {
                "intermediate.dense.weight": layer.intermediate.dense.weight[units],
                "intermediate.dense.bias": layer.intermediate.dense.bias[units],
                "output.dense.weight": solution[:-1].T,
                "output.dense.bias": solution[-1],
                "output.LayerNorm.weight": norm.weight,
                "output.LayerNorm.bias": norm.bias,
            }
        )
    inputs.append(hidden[mask])
    return blocks, inputs


def free_dimensions(query, key, hidden: Tensor, gates: list[int], strength: float) -> dict[str, Tensor]:
    """Query and key weights in which the last two dimensions of each head compare the gates of the two tokens.

    The other 30 are the best approximation, on the hidden states seen, of the teacher's 32. (A key's bias shifts all
    logits of a query alike, so it is dropped.)
    """
    seen = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    moment = torch.linalg.cholesky(seen.T @ seen / len(seen) + 1e-6 * torch.eye(seen.shape[1]))
    spread = moment[:-1, :-1]
    names = ("query.weight", "query.bias", "key.weight", "key.bias")
    result = {name: torch.zeros(384, 384) if name.endswith("weight") else torch.zeros(384) for name in names}
    for start in range(0, 384, HEAD):
        rows, inner = slice(start, start + HEAD), slice(start, start + HEAD - 2)
        left = torch.cat([query.weight[rows], query.bias[rows, None]], 1).double()
        u, s, v = torch.linalg.svd(moment.T @ left.T @ key.weight[rows].double() @ spread, full_matrices=False)
        size = s[: HEAD - 2].sqrt()
        new = torch.linalg.solve_triangular(moment.T, u[:, : HEAD - 2] * size, upper=True).T.float()
        result["query.weight"][inner], result["query.bias"][inner] = new[:, :-1], new[:, -1]
        result["key.weight"][inner] = torch.linalg.solve_triangular(
            spread.T, (v[: HEAD - 2] * size[:, None]).T, upper=True
        ).T.float()
    result["query.weight"][:, gates] = result["key.weight"][:, gates] = 0
    factor = (strength * HEAD**0.5) ** 0.5
    for place, (one, other) in enumerate((gates, gates[::-1])):
        rows = torch.arange(HEAD - 2 + place, 384, HEAD)
        result["query.weight"][rows, one], result["key.weight"][rows, other] = factor, -factor
    return result


def comparison(vectors: Tensor, gates: list[int]) -> dict[str, Tensor]:
    """The weights of the comparison layer. `vectors` are means of the hidden states that enter it, for the PCA."""
    axes = torch.linalg.eigh((vectors.T @ vectors).double())[1].flip(1)[:, :PRODUCTS].T.float()
    # A random rotation keeps the products' sum and makes all coordinates alike, small enough for gelu's parabola.
    axes = torch.linalg.qr(torch.randn(PRODUCTS, PRODUCTS))[0] @ axes
    axes[:, gates] = 0
    value = torch.zeros(384, 384)
    value[:PRODUCTS] = value[192 : 192 + PRODUCTS] = axes
    # The query is a constant; the key reads a gate. Heads 0 to 5 avoid the query's tokens, 6 to 11 the document's.
    constant, key = torch.randn(384, 384) * 0.02, torch.randn(384, 384) * 0.02
    first = torch.arange(0, 384, HEAD)
    constant[first] = key[first] = 0
    bias = torch.zeros(384)
    bias[first] = 10 * HEAD**0.5
    key[first[:6], gates[1]] = key[first[6:], gates[0]] = 1
    # 20 times larger than the residual, which the LayerNorm then all but removes.
    mix = 20 * torch.eye(384)
    mix[:, [SCORE, 383]] = mix[[SCORE, 383]] = 0
    norm = torch.ones(384)
    norm[SCORE] = 0
    # Units 0 to 190 see a + b, 191 to 381 see a - b; unit 382 takes away the linear part, with a bias so large that
    # gelu is the identity there. The rest is free for training.
    width, every = 0.3, torch.arange(PRODUCTS)
    up, down = torch.randn(INTERMEDIATE, 384) * 0.02, torch.zeros(384, INTERMEDIATE)
    up_bias, down_bias = torch.zeros(INTERMEDIATE), torch.zeros(384)
    up[: 2 * PRODUCTS + 1] = 0
    up[every, every] = up[every, 192 + every] = width
    up[PRODUCTS + every, every], up[PRODUCTS + every, 192 + every] = width, -width
    up[2 * PRODUCTS, 192 : 192 + PRODUCTS] = width
    up_bias[2 * PRODUCTS] = offset = 30.0
    # The sum of the products is 192 times the cosine; the score coordinate gets 5 times the cosine.
    scale = 5 / 192 * math.sqrt(2 * math.pi) / (4 * width**2)
    down[SCORE, :PRODUCTS], down[SCORE, PRODUCTS : 2 * PRODUCTS], down[SCORE, 2 * PRODUCTS] = scale, -scale, -scale
    down_bias[SCORE] = scale * offset
    return {
        "attention.self.query.weight": constant,
        "attention.self.query.bias": bias,
        "attention.self.key.weight": key,
        "attention.self.key.bias": torch.zeros(384),
        "attention.self.value.weight": value,
        "attention.self.value.bias": torch.zeros(384),
        "attention.output.dense.weight": mix,
        "attention.output.dense.bias": torch.zeros(384),
        "attention.output.LayerNorm.weight": norm,
        "attention.output.LayerNorm.bias": torch.zeros(384),
        "intermediate.dense.weight": up,
        "intermediate.dense.bias": up_bias,
        "output.dense.weight": down,
        "output.dense.bias": down_bias,
        "output.LayerNorm.weight": torch.ones(384),
        "output.LayerNorm.bias": torch.zeros(384),
    }


def classifier() -> dict[str, Tensor]:
    """The head: logit = 12 tanh((22 cosine - 9) / 12), so a cosine of .1 is near -7 and one of .6 near +4."""
    dense, out = torch.randn(384, 384) * 0.02, torch.randn(1, 384) * 0.02
    bias, units = torch.zeros(384), slice(0, 4)
    dense[units] = 0
    dense[units, SCORE], bias[units], out[0, units] = 22 / 5 / 12, -9 / 12, 12 / 4
    dense[4:, SCORE] = 0
    return {"dense.weight": dense, "dense.bias": bias, "out_proj.weight": out, "out_proj.bias": torch.zeros(1)}


def renew_gates(layer: dict[str, Tensor], gates: list[int], size: Tensor) -> None:
    """Add four feed-forward units that write the gates anew: LayerNorm scales them differently for each token.

    gelu(-20 x - 3) - gelu(-20 x - 7) is about 4 for a gate x near -1 and 0 for one near 0.
    """
    up, down = torch.zeros(4, 384), torch.zeros(384, 4)
    for place, gate in enumerate(gates):
        units = [2 * place, 2 * place + 1]
        up[units, gate] = -20
        down[gate, units] = torch.tensor([-size, size])
    layer["intermediate.dense.weight"] = torch.cat([layer["intermediate.dense.weight"], up])
    layer["intermediate.dense.bias"] = torch.cat([layer["intermediate.dense.bias"], torch.tensor([-3.0, -7.0] * 2)])
    layer["output.dense.weight"] = torch.cat([layer["output.dense.weight"], down], 1)


def keep_gates(model: XLMRobertaForSequenceClassification, gates: list[int], inputs: dict[str, Tensor]) -> None:
    """Set each LayerNorm's factor so that an active gate leaves it at -1 on average, first LayerNorm first."""
    inside = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != 0)
    active = [(inputs["token_type_ids"] == segment) & inside for segment in (1, 0)]
    norms = [model.roberta.embeddings.LayerNorm]
    for layer in model.roberta.encoder.layer[:-1]:
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
    for norm in norms:
        outputs: list[Tensor] = []
        handle = norm.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        norm.weight[gates], norm.bias[gates] = 1, 0
        model(**inputs)
        handle.remove()
        for gate, where in zip(gates, active, strict=True):
            norm.weight[gate] = -1 / outputs[0][..., gate][where].mean()


@torch.no_grad()
def construct(teacher: Path, data: Path):
    """The untrained model and its tokenizer."""
    torch.manual_seed(1)
    documents, queries = read(data / "documents.jsonl"), read(data / "queries.jsonl")
    vocabulary = choose(teacher, [row["text"] for row in documents + queries], VOCABULARY)
    tokenizer = build(teacher, vocabulary)
    bert = AutoModel.from_pretrained(teacher, dtype=torch.float32).eval()
    words = bert.embeddings.word_embeddings.weight[teacher_ids(teacher, vocabulary)]
    bert.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(words)

    ids, mask = calibration(tokenizer, documents, queries)
    blocks, inputs = prune(bert, ids, mask)
    means = torch.stack([part.mean(0) for part in inputs[-1].split(mask.sum(1).tolist())])

    # The gates take the coordinates whose loss costs least: small values, little weight on them.
    cost = sum(
        hidden.square().mean(0) * bert.encoder.layer[index].attention.self.value.weight.square().sum(0)
        for index, hidden in zip(LAYERS, inputs, strict=False)
    )
    cost = cost / cost.mean() + inputs[-1].square().mean(0) / inputs[-1].square().mean()
    gates = cost.topk(2, largest=False).indices.tolist()

    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=384,
        num_hidden_layers=len(LAYERS) + 1,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=514,
        type_vocab_size=2,
        num_labels=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-12,
    )
    model = XLMRobertaForSequenceClassification(config).eval()
    positions = torch.cat([torch.zeros(2, 384), bert.embeddings.position_embeddings.weight])
    types = bert.embeddings.token_type_embeddings.weight[:1].repeat(2, 1)
    spread = (words + types[:1]).std(1).mean()
    words, positions, types = words.clone(), positions.clone(), types.clone()
    words[:, gates] = positions[:, gates] = 0
    types[:, gates] = -4 * spread * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    words[0, gates[1]] = 4 * spread  # <s> belongs to both sides, as each text has its [CLS] in the teacher
    state = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": positions,
        "embeddings.token_type_embeddings.weight": types,
        "embeddings.LayerNorm.weight": bert.embeddings.LayerNorm.weight,
        "embeddings.LayerNorm.bias": bert.embeddings.LayerNorm.bias,
    }
    for place, index in enumerate(LAYERS):
        layer, attention = dict(bert.encoder.layer[index].named_parameters()), bert.encoder.layer[index].attention.self
        strength = AJAR if place == len(LAYERS) - 1 else CLOSED
        new = free_dimensions(attention.query, attention.key, inputs[place], gates, strength)
        layer |= blocks[place] | {f"attention.self.{name}": tensor for name, tensor in new.items()}
        layer = {name: tensor.clone() for name, tensor in layer.items()}
        for name in ("attention.output.dense", "output.dense"):  # nothing writes the gates ...
            layer[f"{name}.weight"][gates] = layer[f"{name}.bias"][gates] = 0
        for name in ("attention.self.value", "intermediate.dense"):  # ... and nothing else reads them
            layer[f"{name}.weight"][:, gates] = 0
        renew_gates(layer, gates, inputs[place].std())
        state |= {f"encoder.layer.{place}.{name}": tensor for name, tensor in layer.items()}
    state |= {f"encoder.layer.{len(LAYERS)}.{name}": tensor for name, tensor in comparison(means, gates).items()}
    state = {f"roberta.{name}": tensor for name, tensor in state.items()}
    state |= {f"classifier.{name}": tensor for name, tensor in classifier().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("position_ids" not in name and "token_type_ids" not in name for name in missing):
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")

    pairs = [(query["text"], documents[query["document"]]["text"]) for query in queries[::700]]
    keep_gates(
        model,
        gates,
        tokenizer(*zip(*pairs, strict=True), truncation=True, max_length=192, padding=True, return_tensors="pt"),
    )
    return model, tokenizer


def save(model: XLMRobertaForSequenceClassification, tokenizer, folder: Path) -> None:
    """Save matrices as 8-bit floats and vectors as 16-bit ones; Transformers 5 loads them as float32.

    With 8 bits all six layers fit into 20 MB. The rounding costs MiniLM's vectors a cosine of .006.
    """
    small = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float8_e4m3fn if tensor.ndim == 2 else torch.float16
        small[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    model.config.dtype = "float32"
    model.save_pretrained(folder, state_dict=small)
    # Truncation and padding, once used, would be saved as the tokenizer's own settings.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # Transformers 5 names a class that version 4 doesn't know; both know this one.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in (
        "backend",
        "is_local",
        "local_files_only",
        "max_length",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "stride",
        "truncation_side",
        "truncation_strategy",
    ):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that fetch.sh filled")
    parser.add_argument("data", type=Path, help="the folder that data.py wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    save(*construct(minilm(arguments.packages), arguments.data), arguments.out)
