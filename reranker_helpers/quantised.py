"""int8 for the CPU: one scale per output for the weights, one scale per token for the activations.

Plain int8 is too coarse for this model: a few inputs of each layer lie far from zero or are much larger than the rest,
and steps wide enough for them round away what tells two documents apart. So each layer's inputs are first shifted and
scaled, by amounts found on a few built-in texts when the model is loaded (Outlier Suppression+, arXiv:2304.09145;
SmoothQuant, arXiv:2211.10438):

    rows @ W.T + b  =  ((rows - shift) / stretch) @ (W * stretch).T  +  (b + W @ shift)
                       rounded, token by token      rounded by output   exact

Each layer's error is measured on the same texts, and a layer that errs too much stays in float32. Sums are exact in
int32, so a score does not depend on the batch.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from .checks import check_model
from .int8 import Grid, QuantisedLinear, levels_for
from .packed import can_pack, run_packed
from .products import linear
from .tokenising import tokenise

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, XLMRobertaForSequenceClassification

LIMIT = 0.1
"""The largest error that a layer may have in int8, as `_error` measures it."""

# Several languages and kinds of text, related and unrelated pairs. Each pair is cut at 40 tokens.
TEXTS = [
    (
        "How do plants make food?",
        "Plants turn sunlight, water and carbon dioxide into sugar and oxygen in their leaves.",
    ),
    ("How do plants make food?", "The museum is closed on Mondays. Tickets cost 12 euros; children get in free."),
    ("mutable default argument", "def f(x=[]): the list is made once, when the function is defined. Use None instead."),
    ("error 0x80070005", "Access is denied: run the installer as administrator, or ask whoever owns the folder."),
    ("Wie lange hält frische Milch?", "Im Kühlschrank bleibt geöffnete Milch etwa drei Tage frisch."),
    ("Combien coûte un timbre ?", "La tour Eiffel mesure 330 mètres et fut construite entre 1887 et 1889."),
    ("¿Cuál es la capital de Perú?", "Lima es la capital y la ciudad más grande del Perú, en la costa del Pacífico."),
    ("почему небо голубое", "Солнечный свет рассеивается в атмосфере, синие лучи сильнее красных."),
    ("什么是机器学习", "机器学习是人工智能的一个分支，让计算机从数据中学习规律。"),
    ("東京の人口は？", "富士山は日本で一番高い山で、標高は3776メートルです。"),
    ("ما هي عاصمة مصر؟", "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها."),
    ("भारत की राजधानी क्या है?", "नई दिल्ली भारत की राजधानी है।"),
]

logger = logging.getLogger(__name__)


def quantise(
    model: XLMRobertaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: str | None = None
) -> None:
    """Quantise a model in place. `load_reranker(dtype="int8")` calls this after loading.

    The encoder's linear layers become `QuantisedLinear`, one after the other, so there are never two copies of the
    weights. The head, layer norms and embeddings stay in float32, and so do the parts of the last layer that read first
    tokens only, and layers that err by more than `LIMIT`. The log says which stayed, and how far the logits of `TEXTS`
    moved.

    Args:
        model: an XLM-RoBERTa in float32 on the CPU, in evaluation mode.
        tokenizer: the model's own.
        folder: where the model was loaded from. If it holds a model.safetensors, the embeddings (1 of the 2.3 GB of
            bge-reranker-v2-m3) stay in that file, and only the rows of tokens that occur are read from it: the file
            must not change while the model is in use. Default: they are kept in memory.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: the model has another architecture or device, was changed, or is not in evaluation mode; or its
            config has no pad token, or not the tokenizer's.

    Example, with the `reranker` that `load_reranker` returned:

    >>> pairs = [("what is a panda?", text) for text in ("The panda is a bear.", "Bread is baked in an oven.")]
    >>> panda, bread = score(pairs, *reranker)
    >>> quantise(reranker.model, reranker.tokenizer)
    >>> panda8, bread8 = score(pairs, *reranker)
    >>> assert panda8 > bread8
    >>> assert abs(panda8 - panda) < 0.25 * (panda - bread)
    """
    device = torch.device("cpu")
    if not can_pack(model, device) or model.dtype != torch.float32:
        raise ValueError(f"int8 takes an unchanged XLM-RoBERTa in float32 on the CPU, not this {type(model).__name__}")
    check_model(model, tokenizer, device)
    windows = tokenise(TEXTS, tokenizer, 40, None)
    last = model.roberta.encoder.layer[-1]
    for layer in model.roberta.encoder.layer:
        own, output = layer.attention.self, layer.attention.output
        if layer is last:
            # The rest of it reads first tokens only: int8 would save next to no time there, and made half of the error
            # on this repository's stand-in.
            groups = [[(own, "key"), (own, "value")]]
        else:
            groups = [[(own, "query"), (own, "key"), (own, "value")]]
            groups += [[(output, "dense")], [(layer.intermediate, "dense")], [(layer.output, "dense")]]
        for group in groups:
            for parent, name in list(group):
                # GELU's outputs are hardly ever below zero, so the layer after it gets one-sided inputs.
                setattr(parent, name, _Pending(getattr(parent, name), group, parent is layer.output))
    with torch.no_grad():
        exact = run_packed(windows, model, tokenizer, device)  # float32; each layer is replaced after its turn
        _leave_the_file(model, folder)
        moved = (run_packed(windows, model, tokenizer, device) - exact).abs().max().item()
    parts = dict(model.roberta.encoder.named_modules())
    kept = [name for name, part in parts.items() if type(part) is torch.nn.Linear]
    levels = {part.levels for part in parts.values() if isinstance(part, Grid)}
    logger.info(
        "int8: %s; in float32 stay embeddings, layer norms, the head, %s; the logits of %d built-in texts, %.2f to "
        "%.2f, moved by up to %.2f",
        "products in int8" if levels - {None} else "products in float32, which is faster or more exact here",
        ", ".join(kept),
        len(exact),
        exact.min(),
        exact.max(),
        moved,
    )


def refuse_int8(config: PretrainedConfig, device: torch.device) -> str | None:
    """Return why a model cannot be quantised, as far as its config tells before weights are loaded, or None."""
    if device.type != "cpu":
        return (
            f"dtype is 'int8', which is for the CPU, and device is {str(device)!r}: pass another dtype or device='cpu'"
        )
    if config.model_type != "xlm-roberta":
        return (
            f"dtype is 'int8', which is for XLM-RoBERTa, and this model is of the type {config.model_type!r}: pass "
            "another dtype, or export it to int8 for OpenVINO or ONNX Runtime, whose models rerank takes as they are"
        )
    return None


def _leave_the_file(model: XLMRobertaForSequenceClassification, folder: str | None) -> None:
    """Copy what is left of the model, so that the file that Transformers mapped into memory is freed. Embeddings are
    mapped again instead, each by itself."""
    with ExitStack() as stack:
        file, names = None, []
        if folder and (Path(folder) / "model.safetensors").exists():
            file = stack.enter_context(safe_open(Path(folder) / "model.safetensors", framework="pt"))
            names = file.keys()
        for name, weight in model.named_parameters():
            stored = file.get_tensor(name) if name.endswith("_embeddings.weight") and name in names else None
            same = stored is not None and stored.dtype == weight.dtype and stored.shape == weight.shape
            weight.data = stored if same else weight.detach().clone()


class _Pending(torch.nn.Module):
    """Takes a linear layer's place until the first rows arrive. With them it quantises itself and the layers that read
    the same rows, and then computes its own product in float32 one last time."""

    def __init__(self, source: torch.nn.Linear, rest: list[tuple[torch.nn.Module, str]], one_sided: bool):
        super().__init__()
        self.source, self.rest, self.one_sided = source, rest, one_sided

    def grid(self, rows: Tensor) -> Tensor:
        return rows

    def product(self, rows: Tensor) -> Tensor:
        if self.rest:
            sources = [getattr(parent, name).source for parent, name in self.rest]
            for (parent, name), part in zip(self.rest, _quantised(sources, rows, self.one_sided), strict=True):
                setattr(parent, name, part)
            self.rest.clear()
        return linear(rows, self.source.weight, self.source.bias)


def _quantised(sources: list[torch.nn.Linear], rows: Tensor, one_sided: bool) -> list[torch.nn.Module]:
    """Return each layer in int8, or itself where that errs too much. `rows` (tokens, inputs) are what they all read."""
    levels = levels_for(*sources[0].weight.shape)
    shift = rows.mean(0)
    exact = [linear(rows, source.weight, source.bias) for source in sources]
    best, least = None, None
    for stretch in (torch.ones_like(shift), _stretch(rows - shift, sources)):
        grid = Grid(shift, stretch, levels, one_sided)
        parts = [QuantisedLinear(source, grid) for source in sources]
        errors = [_error(part(rows), right) for part, right in zip(parts, exact, strict=True)]
        if least is None or sum(errors) < sum(least):
            best, least = parts, errors
    chosen = zip(sources, best, least, strict=True)
    return [part if error <= LIMIT else source for source, part, error in chosen]


def _stretch(rows: Tensor, sources: list[torch.nn.Linear]) -> Tensor:
    """Return a factor for each input, (inputs,), that makes its values and its weights equally hard to round.

    SmoothQuant with alpha = 0.5 (arXiv:2211.10438), except for what it takes as the size of an input.
    """

    def size(*blocks: Tensor) -> Tensor:  # geometric mean of root mean square and maximum: a few rows pin down neither
        sums = sum(torch.linalg.vector_norm(block, dim=0) ** 2 for block in blocks)
        largest = torch.stack([torch.maximum(block.amax(0), -block.amin(0)) for block in blocks]).amax(0)
        sizes = ((sums / sum(map(len, blocks))).sqrt() * largest).sqrt()
        return sizes.clamp_min((sizes.mean() / 100).item() or 1e-30)

    factor = (size(rows) / size(*(source.weight for source in sources))).sqrt()
    return factor / factor.log().mean().exp()


def _error(rows: Tensor, exact: Tensor) -> float:
    """Return the norm of the error as a share of the norm of `exact` around its mean over the tokens: what all tokens
    have in common tells none of them apart. Both are (tokens, outputs)."""
    return ((rows - exact).norm() / (exact - exact.mean(0)).norm().clamp_min(1e-30)).item()
