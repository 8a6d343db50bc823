"""int8 for the CPU: one scale per output for the weights, one scale per token for the activations.

Plain int8 is too coarse for this model: a few inputs of each layer lie far from zero or are much larger than the rest,
and steps wide enough for them round away what tells two documents apart. So each layer's inputs are first shifted and
scaled, by amounts found on a few built-in texts when the model is loaded (Outlier Suppression+, arXiv:2304.09145;
SmoothQuant, arXiv:2211.10438):

    rows @ W.T + b  =  ((rows - shift) / stretch) @ (W * stretch).T  +  (b + W @ shift)
                       rounded, token by token      rounded by output   exact

Each layer's error is measured on the same texts, and a layer that errs too much stays in float32. Sums are exact in
int32, so a score does not depend on the batch. What the texts decide is computed in float64 and rounded: in float32 the
last bits depend on the number of threads, and a weight halfway between two steps could be rounded either way.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from .checks import check_model
from .packed import can_pack, layers_of, packed_logits
from .products import multiplies_in
from .quantised_linear import Grid, QuantisedLinear, levels_for, stay
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

    The parameters no longer require gradients. After Ctrl-C or an error the model is as it was, or raises RuntimeError
    when it is used, if weights are lost already.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: the model has another architecture or device, was changed, is quantised already, or is not in
            evaluation mode; or its config has no pad token, or not the tokenizer's.

    Example, with the `reranker` that `load_reranker` returned:

    >>> pairs = [("what is a panda?", text) for text in ("The panda is a bear.", "Bread is baked in an oven.")]
    >>> panda, bread = score(pairs, *reranker)
    >>> quantise(reranker.model, reranker.tokenizer)
    >>> panda8, bread8 = score(pairs, *reranker)
    >>> assert panda8 > bread8
    >>> assert abs(panda8 - panda) < 0.25 * (panda - bread)
    """
    device = torch.device("cpu")
    if is_quantised(model):
        raise ValueError("the model is in int8 already: quantise takes one in float32")
    if not can_pack(model, device) or model.dtype != torch.float32:
        raise ValueError(f"int8 takes an unchanged XLM-RoBERTa in float32 on the CPU, not this {type(model).__name__}")
    check_model(model, tokenizer, device)
    windows = tokenise(TEXTS, tokenizer, 40, None)
    try:
        _postpone(model)
        with torch.no_grad():
            before = packed_logits(windows, model, tokenizer)  # in float32; each layer is replaced after its turn
            _leave_the_file(model, folder)
            moved = (packed_logits(windows, model, tokenizer) - before).abs().max().item()
    except BaseException:
        _give_up(model)
        raise
    model.requires_grad_(False)
    for module in model.modules():
        if is_quantised(module) and not isinstance(module, QuantisedLinear):
            # Else half the model would have changed before a layer refuses.
            vars(module)["_apply"] = partial(stay, module)
    _report(model, before, moved)


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether any layer of the model is in int8."""
    return any(isinstance(part, QuantisedLinear) for part in model.modules())


def _postpone(model: XLMRobertaForSequenceClassification) -> None:
    """Have each layer that is to be quantised wait for the rows that it will read."""
    layers = layers_of(model)
    for layer in layers:
        own, output = layer.attention.self, layer.attention.output
        if layer is layers[-1]:
            # The rest of it reads first tokens only: int8 would save next to no time there, and made half of the error
            # on this repository's stand-in.
            groups: list[list[tuple[torch.nn.Module, str]]] = [[(own, "key"), (own, "value")]]
        else:
            groups = [[(own, "query"), (own, "key"), (own, "value")]]
            groups += [[(output, "dense")], [(layer.intermediate, "dense")], [(layer.output, "dense")]]
        for group in groups:
            for parent, name in group:
                # GELU's outputs are hardly ever below zero, so the layer after it gets one-sided inputs.
                setattr(parent, name, _Pending(getattr(parent, name), group, parent is layer.output))


def _give_up(model: XLMRobertaForSequenceClassification) -> None:
    """Make the model what it was before `quantise`, or unusable if a layer's weights are gone."""
    if is_quantised(model):
        model.roberta.add_module("encoder", _Interrupted())
        return
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, _Pending):
                setattr(parent, name, part.source)


def _report(model: XLMRobertaForSequenceClassification, before: Tensor, moved: float) -> None:
    parts = dict(model.roberta.encoder.named_modules())
    kept = [name for name, part in parts.items() if type(part) is torch.nn.Linear]
    logger.info(
        "int8: in float32 stay embeddings, layer norms, the head, %s; the logits of %d built-in texts, %.2f to %.2f, "
        "moved by up to %.2f",
        ", ".join(kept),
        len(before),
        before.min(),
        before.max(),
        moved,
    )
    if None in {part.levels for part in parts.values() if isinstance(part, Grid)}:
        logger.warning(
            "int8 products are not to be had, or not exact, with this processor and build of torch, so int8 only saves "
            "memory: dtype='%s' is faster",
            "bfloat16" if multiplies_in(torch.bfloat16) else "float32",
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
            stored = file.get_tensor(name) if file and name.endswith("_embeddings.weight") and name in names else None
            if stored is None or stored.dtype != weight.dtype or stored.shape != weight.shape:
                stored = weight.detach().clone()
            weight.data = stored


class _Pending(torch.nn.Module):
    """Takes a linear layer's place until the first rows arrive. With them it quantises itself and the layers that read
    the same rows, and then returns its product in float32 one last time."""

    def __init__(self, source: torch.nn.Linear, group: list[tuple[torch.nn.Module, str]], one_sided: bool):
        super().__init__()
        self.source, self.group, self.one_sided = source, group, one_sided
        self.result: Tensor | None = None

    def grid(self, rows: Tensor) -> Tensor:
        return rows

    def product(self, rows: Tensor) -> Tensor:
        if self.result is None:
            pending = [getattr(parent, name) for parent, name in self.group]
            sources = [part.source for part in pending]
            for part in pending:
                part.result = _exact(part.source, rows)
            quantised = _quantised(sources, rows, [part.result for part in pending], self.one_sided)
            for (parent, name), part in zip(self.group, quantised, strict=True):
                setattr(parent, name, part)
        assert self.result is not None  # a layer is in its own group
        return self.result


class _Interrupted(torch.nn.Module):
    """What is left of an encoder when quantising ends early."""

    def forward(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError("quantising this model was interrupted, and its weights are lost: load it again")


def _exact(source: torch.nn.Linear, rows: Tensor) -> Tensor:
    return F.linear(rows.double(), source.weight.double(), source.bias.double()).float()


def _quantised(
    sources: list[torch.nn.Linear], rows: Tensor, exact: list[Tensor], one_sided: bool
) -> list[torch.nn.Module]:
    """Return each layer in int8, or itself where that errs too much. `rows` (tokens, inputs) are what they all read,
    and `exact` what they make of them."""
    levels = levels_for(*sources[0].weight.shape)
    shift = rows.double().mean(0)
    best: list[QuantisedLinear] = []
    least: list[float] = []
    for stretch in (torch.ones_like(shift), _stretch(rows - shift, sources)):
        grid = Grid(shift, stretch, levels, one_sided)
        parts = [QuantisedLinear(source, grid) for source in sources]
        errors = [_error(part(rows), right) for part, right in zip(parts, exact, strict=True)]
        if not best or sum(errors) < sum(least):
            best, least = parts, errors
    chosen = zip(sources, best, least, strict=True)
    return [part if error <= LIMIT else source for source, part, error in chosen]


def _stretch(rows: Tensor, sources: list[torch.nn.Linear]) -> Tensor:
    """Return a factor for each input, (inputs,), that makes its values and its weights equally hard to round: in
    float64, as `rows`.

    SmoothQuant with alpha = 0.5 (arXiv:2211.10438), except for what it takes as the size of an input.
    """

    def size(*blocks: Tensor) -> Tensor:  # geometric mean of root mean square and maximum: a few rows pin down neither
        sums = sum(torch.linalg.vector_norm(block, dim=0) ** 2 for block in blocks)
        largest = torch.stack([torch.maximum(block.amax(0), -block.amin(0)) for block in blocks]).amax(0)
        sizes: Tensor = ((sums / sum(map(len, blocks))).sqrt() * largest).sqrt()
        return sizes.clamp_min((sizes.mean() / 100).item() or 1e-30)

    factor = (size(rows) / size(*(source.weight.double() for source in sources))).sqrt()
    return factor / factor.log().mean().exp()


def _error(rows: Tensor, exact: Tensor) -> float:
    """Return the norm of the error as a share of the norm of `exact` around its mean over the tokens: what all tokens
    have in common tells none of them apart. Both are (tokens, outputs)."""
    exact = exact.double()
    return float((rows - exact).norm() / (exact - exact.mean(0)).norm().clamp_min(1e-30))
