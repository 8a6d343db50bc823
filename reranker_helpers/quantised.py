"""int8 for the CPU: weights with a scale for each output, activations with a scale for each token.

Plain int8 is too coarse for this model: a few inputs of a layer are far from zero or far larger than the rest, and the
steps that hold them swallow what tells two documents apart. So each layer's inputs are first moved and stretched, by
numbers that a few built-in texts give when the model is loaded (Outlier Suppression+, arXiv:2304.09145; SmoothQuant,
arXiv:2211.10438):

    rows @ W.T + b  =  ((rows - shift) / stretch) @ (W * stretch).T  +  (b + W @ shift)
                       rounded, token by token      rounded by output   exact

What that does to the output is measured on the same texts, layer by layer, and a layer that errs too much stays as it
is. Sums are exact in int32, so that a score does not depend on the batch.
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
"""How much a layer may err in int8: the error's size against that of the output's differences between tokens."""

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
    """Quantise a model in place, for `run_packed`: what `load_reranker(dtype="int8")` does after loading.

    The encoder's linear layers become `QuantisedLinear`, one after the other, so that there are never two copies of the
    weights; the head, layer norms and embeddings stay in float32, and so do layers that err by more than `LIMIT`. What
    stayed, and how far the logits of `TEXTS` moved, goes to the log. (Transformers maps a model.safetensors in float32
    into memory. Until the end its pages count as the process's, but the system takes them back when memory runs short.)

    Args:
        model: an XLM-RoBERTa in float32 on the CPU.
        tokenizer: the model's own.
        folder: where the model was loaded from. If it holds a model.safetensors, the embeddings (1 GB of the 2.3 of
            bge-reranker-v2-m3) stay in that file, which must not change while the model is in use, and only the rows
            of tokens that occur are read from it. Otherwise they are kept in memory.

    Raises:
        ValueError: the model is of another architecture, on another device, or was changed.
    """
    device = torch.device("cpu")
    if not can_pack(model, device) or model.dtype != torch.float32:
        raise ValueError(f"int8 takes an unchanged XLM-RoBERTa in float32 on the CPU, not this {type(model).__name__}")
    check_model(model, tokenizer, device)
    windows = tokenise(TEXTS, tokenizer, 40, None)
    *layers, last = model.roberta.encoder.layer
    for layer in [*layers, last]:
        own, output = layer.attention.self, layer.attention.output
        # In the last layer queries are made of first tokens only.
        first = [("query",), ("key", "value")] if layer is last else [("query", "key", "value")]
        groups = [[(own, name) for name in names] for names in first]
        groups += [[(output, "dense")], [(layer.intermediate, "dense")], [(layer.output, "dense")]]
        for group in groups:
            for parent, name in list(group):
                # GELU's values are hardly ever below zero: the next layer's inputs lie on one side.
                setattr(parent, name, _Pending(getattr(parent, name), group, parent is layer.output))
    with torch.no_grad():
        exact = run_packed(windows, model, tokenizer, device)
        _leave_the_file(model, folder)
        moved = (run_packed(windows, model, tokenizer, device) - exact).abs().max().item()
    parts = dict(model.roberta.encoder.named_modules())
    kept = [name for name, part in parts.items() if type(part) is torch.nn.Linear]
    levels = {part.levels for part in parts.values() if isinstance(part, Grid)}
    logger.info(
        "int8: %s; in float32 stay %s; the logits of %d built-in texts, %.2f to %.2f, moved by up to %.2f",
        "products in int8" if levels - {None} else "products in float32, which is faster or more exact here",
        ", ".join(kept) or "embeddings, layer norms and the head only",
        len(exact),
        exact.min(),
        exact.max(),
        moved,
    )


def refuse_int8(config: PretrainedConfig, device: torch.device) -> str | None:
    """Return why a model cannot be had in int8, which can be said before its weights are loaded, or None."""
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
    """Copy what is left of the model out of the file that Transformers mapped into memory, so that this is given back;
    then map the large tables of embeddings alone."""
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
    """Takes a linear layer's place until the first rows arrive. Then it and those that read the same rows are
    quantised by them, and it does its float32 work for the last time."""

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
    """Return for each layer its form in int8, or itself if that errs too much. `rows` are what they all read."""
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
    """Return a factor for each input that makes its values and its weights equally hard to round: half of what is
    coarse in one goes to the other (SmoothQuant's alpha = 0.5)."""

    def size(*blocks: Tensor) -> Tensor:  # between root mean square and maximum: few rows say little of either
        sums = sum(torch.linalg.vector_norm(block, dim=0) ** 2 for block in blocks)
        largest = torch.stack([torch.maximum(block.amax(0), -block.amin(0)) for block in blocks]).amax(0)
        sizes = ((sums / sum(map(len, blocks))).sqrt() * largest).sqrt()
        return sizes.clamp_min((sizes.mean() / 100).item() or 1e-30)

    factor = (size(rows) / size(*(source.weight for source in sources))).sqrt()
    return factor / factor.log().mean().exp()


def _error(rows: Tensor, exact: Tensor) -> float:
    """Return the size of the error against that of the differences between tokens: what is common to all says nothing
    about any."""
    return ((rows - exact).norm() / (exact - exact.mean(0)).norm().clamp_min(1e-30)).item()
