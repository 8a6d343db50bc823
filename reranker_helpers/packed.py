"""The fast path on a CPU: XLM-RoBERTa without padding, and each matrix product by the fastest route that is exact.

The texts of a batch lie end to end in one long row of tokens, so no product is spent on padding. NVIDIA's MLPerf
submission did this for BERT (github.com/mlcommons/training_results_v1.1, padding.py); FlashAttention's and ModernBERT's
bert_padding.py follow it.

    padded   <s> what is ... </s>                packed   <s> what is ... </s><s> a ... </s><s> an ... </s>
             <s> a ... </s><pad><pad>
             <s> an ... </s><pad><pad>

Only attention looks from one token at another, so only attention takes the texts one by one. The classifier reads only
the first token of each text, so the last layer computes only that one. The model is not changed: this file reads its
weights, and calls its embeddings and activation functions.

In the shapes below, `tokens` is the number of tokens of all texts together, `texts` the number of texts, and `hidden`
the width of the model (1024 in bge-reranker-v2-m3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from .products import linear, measure_once, seconds
from .tokenising import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForSequenceClassification

SLICE = 512
"""Tokens that the feed-forward part takes at a time. Its inner vectors are four times as wide as the others, so 8192
tokens at once would take 270 MB; a small buffer stays in the processor's cache."""

_PLAIN_MODULES = (
    "torch.nn.modules.",
    "transformers.models.xlm_roberta.",
    "transformers.activations",
    f"{__package__}.int8",
)


def can_pack(model: object, device: torch.device) -> bool:
    """Whether `run_packed` computes what `model` would, that is, whether it is an unchanged XLM-RoBERTa on a CPU.

    It is not with hooks, adapters, autocast, compiled parts, another attention function, or parts that another library
    has quantised.
    """
    if type(model) is not transformers.XLMRobertaForSequenceClassification or device.type != "cpu":
        return False
    config = model.config
    weights = list(model.parameters())
    return (
        not config.is_decoder
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not torch.is_autocast_enabled("cpu")
        and all(type(weight) is torch.nn.Parameter and weight.device.type == "cpu" for weight in weights)
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.bfloat16}, {torch.float16})
        and all(
            type(module).__module__.startswith(_PLAIN_MODULES)
            and not module._forward_hooks
            and not module._forward_pre_hooks
            and not module._compiled_call_impl
            and "forward" not in vars(module)
            for module in model.modules()
        )
    )


def run_packed(
    windows: list[Window],
    model: XLMRobertaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Tensor:
    """Return the model's logits for the windows.

    Args:
        windows: from `tokenise`, of any lengths, in any order.
        model: one for which `can_pack(model, device)` holds.
        tokenizer: the model's own.
        device: the CPU.

    Returns:
        (windows, labels), in the order of the windows, in the dtype of `_arithmetic`.
    """
    lengths = [len(window.token_ids) for window in windows]
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    dtype = _arithmetic(model)
    hidden = _embed(windows, model, "token_type_ids" in tokenizer.model_input_names).to(dtype)
    *layers, last = model.roberta.encoder.layer
    for layer in layers:
        hidden = _feed_forward(layer, _attend(layer, hidden, hidden, lengths, lengths))
    read = hidden[firsts]
    read = _feed_forward(last, _attend(last, read, hidden, [1] * len(lengths), lengths))
    return _linear(_linear(read, model.classifier.dense).tanh(), model.classifier.out_proj)


def _embed(windows: list[Window], model: XLMRobertaForSequenceClassification, takes_types: bool) -> Tensor:
    """Return the embeddings of all texts, end to end: (tokens, hidden)."""
    ids = [torch.tensor(window.token_ids) for window in windows]
    types = [window.type_ids if takes_types else [0] * len(window.token_ids) for window in windows]
    # As `create_position_ids_from_input_ids` in Transformers: count from padding_idx + 1, and skip pad tokens.
    pad = model.roberta.embeddings.padding_idx
    positions = [(text != pad).cumsum(0) * (text != pad) + pad for text in ids]
    return model.roberta.embeddings(
        input_ids=torch.cat(ids)[None],
        token_type_ids=torch.tensor([type_id for text in types for type_id in text])[None],
        position_ids=torch.cat(positions)[None],
    )[0]


def _attend(layer, readers: Tensor, tokens: Tensor, reader_lengths: list[int], lengths: list[int]) -> Tensor:
    """Compute a layer's attention block, in which each row of `readers` looks at the tokens of its own text.

    Args:
        layer: an `XLMRobertaLayer`.
        readers: (readers, hidden), the tokens whose output is wanted: all of `tokens`, or the first one of each text.
        tokens: (tokens, hidden).
        reader_lengths: how many of the readers each text has, (texts).
        lengths: how many tokens each text has, (texts).

    Returns:
        (readers, hidden)
    """
    output = layer.attention.output
    seen = _look(layer.attention.self, readers, tokens, reader_lengths, lengths)
    return _norm(_linear(seen, output.dense).add_(readers), output.LayerNorm)


def _look(attention, readers: Tensor, tokens: Tensor, reader_lengths: list[int], lengths: list[int]) -> Tensor:
    """Return what each reader sees, (readers, hidden). Returning from here frees the keys and values."""

    def heads(rows: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        split = rows.view(len(rows), attention.num_attention_heads, -1).transpose(0, 1)
        return split[None].split(lengths, dim=2)  # for each text (1, heads, its rows, hidden / heads)

    if readers is tokens:
        seen, keys, values = _linears(tokens, attention.query, attention.key, attention.value)
    else:
        (seen,), (keys, values) = _linears(readers, attention.query), _linears(tokens, attention.key, attention.value)
    texts = zip(heads(seen, reader_lengths), heads(keys, lengths), heads(values, lengths), strict=True)
    for query, key, value in texts:
        query.copy_(F.scaled_dot_product_attention(query, key, value))  # into `seen`: saves memory
    return seen


def _feed_forward(layer, hidden: Tensor) -> Tensor:
    """Compute a layer's feed-forward block: (rows, hidden) in, (rows, hidden) out."""
    result = torch.empty_like(hidden)
    for rows, into in zip(hidden.split(SLICE), result.split(SLICE), strict=True):
        inner = layer.intermediate.intermediate_act_fn(_linear(rows, layer.intermediate.dense))
        into.copy_(_norm(_linear(inner, layer.output.dense).add_(rows), layer.output.LayerNorm))
    return result


def _norm(rows: Tensor, part: torch.nn.LayerNorm) -> Tensor:
    return F.layer_norm(rows, part.normalized_shape, part.weight.to(rows), part.bias.to(rows), part.eps)


def _linear(rows: Tensor, part: torch.nn.Module) -> Tensor:
    return _linears(rows, part)[0]


def _linears(rows: Tensor, *parts: torch.nn.Module) -> list[Tensor]:
    """Return what several linear layers make of the same rows: (rows, inputs) in, a (rows, outputs) for each layer out.

    Layers of `int8.py` that share a grid round the rows only once.
    """
    results, shared = [], {}
    for part in parts:
        if isinstance(part, torch.nn.Linear):
            # `.to` copies nothing if the weights have the rows' dtype already.
            results.append(linear(rows, part.weight.to(rows), part.bias.to(rows)))
        else:
            if part.grid not in shared:
                shared[part.grid] = part.grid(rows)
            results.append(part.product(shared[part.grid]))
    return results


def _arithmetic(model: XLMRobertaForSequenceClassification) -> torch.dtype:
    """Return the dtype to compute in: that of the weights, unless float32 is measured to be faster here.

    It is on processors without instructions for bfloat16 or float16. There each layer's weights are converted to
    float32 when they are used, which keeps the memory at half and rounds nothing but the weights.
    """
    if model.dtype == torch.float32:
        return torch.float32
    return measure_once((model.dtype, model.config.intermediate_size), lambda: _faster_type(model))


def _faster_type(model: XLMRobertaForSequenceClassification) -> torch.dtype:
    part = model.roberta.encoder.layer[0].intermediate.dense

    def product(dtype: torch.dtype) -> Callable[[], object]:
        rows = torch.ones(128, part.in_features, dtype=dtype)
        return lambda: F.linear(rows, part.weight.to(dtype), part.bias.to(dtype))

    own, wide = seconds(product(model.dtype), product(torch.float32))
    return model.dtype if own < wide else torch.float32
