"""Add the layer that compares the two texts, and the head; store all of it small.

Half of the layer's heads average the document's tokens into <s>, the other half the query's. Both means are taken
relative to the mean of all texts, since e5's vectors all point the same way. The feed-forward block multiplies them, by
gelu(x) + gelu(-x) ~ sqrt(2 / pi) * x^2 and 4ab = (a + b)^2 - (a - b)^2, and adds what e5's cosine has besides: how far
each text lies along that common direction, and its length. A logistic regression on training pairs says how much of
each, so that relevant documents come out above 0 and others below.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from construct import HEAD, WIDTH, encode, read, sample
from distil import rounded
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, XLMRobertaForSequenceClassification

PRODUCTS = 191  # dimensions of each vector that are compared
SCORE, CONSTANT = 191, 383  # the coordinates that are left: one for the score, one against LayerNorm
QUERIES = 70  # of each language and source
GELU_WIDTH = 0.3
LINEAR = 8.0  # keeps small weights above the smallest 8-bit floats
LIMIT = 12.0  # logits stay between -12 and 12, as the head has a tanh


def training_pairs(data: Path) -> list[dict]:
    """For each query the right document and one of the wrong ones."""
    rng = np.random.default_rng(3)
    result = []
    for row in sample(read(data / "groups.jsonl"), QUERIES, 5):
        wrong = int(rng.integers(1, len(row["documents"])))
        for place in (0, wrong):
            result.append({"query": row["query"], "document": row["documents"][place][:250], "right": float(not place)})
    return result


@torch.inference_mode()
def text_means(model, tokenizer, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """The means that the layer will see, (document, query): <s> belongs to both."""
    rows = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["query"] + pairs[i]["document"]))
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        inputs = encode(tokenizer, [pairs[i] for i in chosen])
        hidden = model.roberta(**inputs).last_hidden_state
        first = torch.zeros_like(inputs["attention_mask"])
        first[:, 0] = 1
        for segment in (1, 0):
            inside = (
                ((inputs["token_type_ids"] == segment) | (first == 1)) & (inputs["attention_mask"] == 1)
            ).unsqueeze(-1)
            for i, mean in zip(chosen, (hidden * inside).sum(1) / inside.sum(1), strict=True):
                rows[i] = (mean,) if segment else (*rows[i], mean)
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


class Comparison:
    """The layer's fixed part, and the features that its feed-forward block can compute exactly."""

    def __init__(self, document: Tensor, query: Tensor, gates: list[int]) -> None:
        both = torch.cat([document, query])
        both[:, gates] = 0
        self.centre = both.mean(0)
        spread = both - self.centre
        axes = torch.linalg.eigh((spread.T @ spread).double())[1].flip(1)[:, : PRODUCTS - 1].float()
        axes = torch.linalg.qr(torch.cat([self.centre[:, None], axes], 1))[0].T
        axes[:, gates] = 0
        # A random rotation keeps the products' sum and makes all coordinates alike, small enough for gelu's parabola.
        self.value = rounded(torch.linalg.qr(torch.randn(PRODUCTS, PRODUCTS))[0] @ axes * 2)
        self.shift = -self.value @ self.centre
        self.common = F.normalize(self.value @ self.centre, dim=0)
        a, b = self.project(document), self.project(query)
        # So large that LayerNorm divides by nearly the same number for all pairs.
        self.constant = float((2 * (a.square() + b.square()).sum(1).mean()) ** 0.5)
        a, b = self.normalised(document, query)
        self.width = GELU_WIDTH / float(a.std())

    def project(self, mean: Tensor) -> Tensor:
        return mean @ self.value.T + self.shift

    def normalised(self, document: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Both vectors as they leave the LayerNorm after attention."""
        a, b = self.project(document), self.project(query)
        size = ((a.square() + b.square()).sum(1, keepdim=True) + 2 * self.constant**2).div(WIDTH).sqrt()
        return a / size, b / size

    def features(self, document: Tensor, query: Tensor) -> Tensor:
        """One row a pair: the product, both along the common direction, both lengths."""
        a, b = self.normalised(document, query)

        def square(x: Tensor) -> Tensor:
            x = x * self.width
            return (F.gelu(x) + F.gelu(-x)).sum(1) * math.sqrt(math.pi / 2) / self.width**2

        product = (square(a + b) - square(a - b)) / 4
        return torch.stack([product, a @ self.common, b @ self.common, square(a), square(b)], 1)


def fit(features: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """Logistic regression: weights and bias, in logits."""
    mean, spread = features.mean(0), features.std(0)
    weights, bias = torch.zeros(features.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200)

    def closure():
        optimizer.zero_grad()
        logits = (features - mean) / spread @ weights + bias
        loss = F.binary_cross_entropy_with_logits(logits, right) + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights, bias = weights.detach(), bias.detach()
    return weights / spread, float(bias - (weights / spread) @ mean)


def two_factors(wanted: float, width: float) -> tuple[float, float]:
    """A width and a factor, both 8-bit floats, for which factor * (gelu(width x) + gelu(-width x)) ~ wanted * x^2."""
    widths = torch.linspace(0.7 * width, 1.4 * width, 200).to(torch.float8_e4m3fn).float().unique()
    exact = wanted * math.sqrt(math.pi / 2) / widths.square()
    factors = exact.to(torch.float8_e4m3fn).float()
    best = int((factors / exact - 1).abs().argmin())
    return float(widths[best]), float(factors[best])


def layer(comparison: Comparison, weights: Tensor, bias: float, gates: list[int]) -> dict[str, Tensor]:
    """The weights of the layer; its score coordinate gets the logit divided by LIMIT."""
    value, value_bias = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)
    for start in (0, 192):
        value[start : start + PRODUCTS], value_bias[start : start + PRODUCTS] = comparison.value, comparison.shift
    # The query is a constant; the key reads a gate. Heads 0 to 5 avoid the query's tokens, 6 to 11 the document's.
    key, query_bias = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)
    first = torch.arange(0, WIDTH, HEAD)
    query_bias[first] = 12 * HEAD**0.5
    key[first[:6], gates[1]] = key[first[6:], gates[0]] = 1
    # Larger than the residual, which LayerNorm then all but removes.
    times = 64.0
    mix, mix_bias = times * torch.eye(WIDTH), torch.zeros(WIDTH)
    mix[:, [SCORE, CONSTANT]] = mix[[SCORE, CONSTANT]] = 0
    mix_bias[SCORE], mix_bias[CONSTANT] = times * comparison.constant, -times * comparison.constant
    norm = torch.ones(WIDTH)
    norm[[SCORE, CONSTANT]] = 0

    every, size, inner = torch.arange(PRODUCTS), PRODUCTS, 4 * WIDTH
    up, up_bias = torch.zeros(inner, WIDTH), torch.zeros(inner)
    down, down_bias = torch.zeros(WIDTH, inner), torch.zeros(WIDTH)
    product, along_a, along_b, length_a, length_b = (weights / LIMIT).tolist()
    # gelu(x) + gelu(-x): units for a + b and a - b, and for a and b alone.
    blocks = [(1, 1, product / 4), (1, -1, -product / 4), (1, 0, length_a), (0, 1, length_b)]
    for place, (a, b, wanted) in enumerate(blocks):
        width, factor = two_factors(wanted, comparison.width)
        for half, sign in enumerate((1, -1)):
            rows = (2 * place + half) * size + every
            up[rows, every], up[rows, 192 + every] = sign * a * width, sign * b * width
            down[SCORE, rows] = factor
    # gelu(x) - gelu(-x) = x: two units for the rest.
    for half, sign in enumerate((1, -1)):
        row = 2 * len(blocks) * size + half
        up[row, :PRODUCTS], up[row, 192 : 192 + PRODUCTS] = (
            sign * along_a * LINEAR * comparison.common,
            sign * along_b * LINEAR * comparison.common,
        )
        down[SCORE, row] = sign / LINEAR
    down_bias[SCORE] = bias / LIMIT
    # Against the last LayerNorm.
    down_bias[CONSTANT] = 40.0
    return {
        "attention.self.query.weight": torch.zeros(WIDTH, WIDTH),
        "attention.self.query.bias": query_bias,
        "attention.self.key.weight": key,
        "attention.self.key.bias": torch.zeros(WIDTH),
        "attention.self.value.weight": value,
        "attention.self.value.bias": value_bias,
        "attention.output.dense.weight": mix,
        "attention.output.dense.bias": mix_bias,
        "attention.output.LayerNorm.weight": norm,
        "attention.output.LayerNorm.bias": torch.zeros(WIDTH),
        "intermediate.dense.weight": up,
        "intermediate.dense.bias": up_bias,
        "output.dense.weight": down,
        "output.dense.bias": down_bias,
        "output.LayerNorm.weight": torch.ones(WIDTH),
        "output.LayerNorm.bias": torch.zeros(WIDTH),
    }


@torch.no_grad()
def compare(start: Path, data: Path, out: Path) -> None:
    """Fit, assemble, save."""
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoder = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    gates = encoder.config.gates
    pairs = training_pairs(data)
    document, query = text_means(encoder, tokenizer, pairs)
    right = torch.tensor([row["right"] for row in pairs])
    comparison = Comparison(document, query, gates)
    features = comparison.features(document, query)
    # What e5 was trained to compare is the cosine: the features' best approximation of it, then its scale and bias.
    cosine = F.cosine_similarity(document, query)
    line = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    size = line.std(0).clamp(min=1e-9)
    size[-1] = 1
    solution = (torch.linalg.lstsq(line / size, cosine.double()[:, None]).solution[:, 0] / size).float()
    near = features @ solution[:-1]
    error = near + solution[-1] - cosine
    print(f"cosine: spread {cosine.std():.4f}, error {error.std():.4f}")
    with torch.enable_grad():
        weights, bias = fit(near[:, None], right)
    weights = weights * solution[:-1]
    wanted = features @ weights + bias
    print("weights", [f"{w:.3f}" for w in weights.tolist()], f"bias {bias:.2f}")
    above, others = ((wanted[right == label] > 0).float().mean() for label in (1, 0))
    print(f"right answers above 0: {above:.3f}, others {others:.3f}")

    config = encoder.config
    config.num_hidden_layers += 1
    model = XLMRobertaForSequenceClassification(config).eval()
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith("roberta.")}
    place = config.num_hidden_layers - 1
    state |= {f"roberta.encoder.layer.{place}.{name}": t for name, t in layer(comparison, weights, bias, gates).items()}
    missing, unexpected = model.load_state_dict(
        {name: rounded(t) if t.is_floating_point() else t for name, t in state.items()}, strict=False
    )
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    # The head undoes the last LayerNorm: a line from what comes out of it to what was wanted.
    few = list(range(0, len(pairs), 48))
    scores = [model.roberta(**encode(tokenizer, [pairs[i]])).last_hidden_state[0, 0, SCORE] for i in few]
    line = torch.stack([torch.stack(scores), torch.ones(len(few))], 1)
    slope, offset = torch.linalg.lstsq(line, wanted[few, None] / LIMIT).solution[:, 0]
    error = (line @ torch.stack([slope, offset]) * LIMIT - wanted[few]).abs()
    print(f"the layer's logits differ by {error.mean():.3f} from the regression's, at most {error.max():.3f}")
    head = {name: torch.zeros_like(t) for name, t in model.classifier.state_dict().items()}
    # Eight units, whose slopes are 8-bit floats around the wanted one.
    units = 8
    head["dense.weight"][:units, SCORE] = split(slope, units)
    head["dense.bias"][:units] = offset
    head["out_proj.weight"][0, :units] = LIMIT / units
    model.classifier.load_state_dict({name: rounded(t) for name, t in head.items()})
    save(model, tokenizer, out)


def split(value: Tensor, parts: int) -> Tensor:
    """`parts` 8-bit floats whose mean is nearly `value`."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    low, high = grid[grid <= value].max(), grid[grid >= value].min()
    share = 0 if high == low else round(float((value - low) / (high - low)) * parts)
    return torch.tensor([float(high)] * share + [float(low)] * (parts - share))


def save(model: XLMRobertaForSequenceClassification, tokenizer, folder: Path) -> None:
    """Save matrices as 8-bit floats and vectors as 16-bit ones; Transformers 5 loads them as float32."""
    small = {
        name: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 else torch.float16)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }
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
    # One line instead of 150,000.
    path = folder / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the encoder that distil.py wrote")
    parser.add_argument("data", type=Path, help="the folder that data.py filled")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    compare(arguments.start, arguments.data, arguments.out)
