"""The fast path on a CPU: XLM-RoBERTa without padding, and each matrix product by the fastest route that is exact.

The texts of a batch lie end to end in one long row of tokens, so that no product is spent on padding:

    padded   <s> what is ... </s>                packed   <s> what is ... </s><s> a ... </s><s> an ... </s>
             <s> a ... </s><pad><pad>
             <s> an ... </s><pad><pad>

Only attention looks from one token at another; it takes the texts one by one. Everything else works on single tokens
and doesn't care where a text ends. From the last layer only the first token of each text is read, so only that one is
computed. The model itself is not touched: this file reads its weights and calls its small parts.
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
"""Tokens that the feed-forward part takes at a time: its inner vectors are four times as wide as the others."""

_PLAIN_MODULES = (
    "torch.nn.modules.",
    "transformers.models.xlm_roberta.",
    "transformers.activations",
    f"{__package__}.int8",
)


def can_pack(model: object, device: torch.device) -> bool:
    """Whether `run_packed` computes what `model` would: an XLM-RoBERTa on a CPU that nobody has changed.

    Hooks, adapters, autocast, compiled parts, other attention functions and parts that another library quantised take
    the model's own way.
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
    """Return the model's logits for the windows, shape (windows, labels), in the type that it computes in.

    `can_pack(model, device)` must hold.
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
    ids = [torch.tensor(window.token_ids) for window in windows]
    types = [window.type_ids if takes_types else [0] * len(window.token_ids) for window in windows]
    # The model's own rule: count from pad_token_id + 1, and leave out whatever looks like padding.
    pad = model.roberta.embeddings.padding_idx
    positions = [(text != pad).cumsum(0) * (text != pad) + pad for text in ids]
    return model.roberta.embeddings(
        input_ids=torch.cat(ids)[None],
        token_type_ids=torch.tensor([type_id for text in types for type_id in text])[None],
        position_ids=torch.cat(positions)[None],
    )[0]


def _attend(layer, readers: Tensor, tokens: Tensor, reader_lengths: list[int], lengths: list[int]) -> Tensor:
    """Let the rows of `readers`, some for each text, look at the rows of `tokens` that belong to their text."""
    output = layer.attention.output
    seen = _look(layer.attention.self, readers, tokens, reader_lengths, lengths)
    return _norm(_linear(seen, output.dense).add_(readers), output.LayerNorm)


def _look(attention, readers: Tensor, tokens: Tensor, reader_lengths: list[int], lengths: list[int]) -> Tensor:
    """Return what each of `readers` sees. A function of its own, so that keys and values are gone after it."""

    def heads(rows: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        split = rows.view(len(rows), attention.num_attention_heads, -1).transpose(0, 1)
        return split[None].split(lengths, dim=2)  # for each text (1, heads, rows, size of a head)

    if readers is tokens:
        seen, keys, values = _linears(tokens, attention.query, attention.key, attention.value)
    else:
        (seen,), (keys, values) = _linears(readers, attention.query), _linears(tokens, attention.key, attention.value)
    texts = zip(heads(seen, reader_lengths), heads(keys, lengths), heads(values, lengths), strict=True)
    for query, key, value in texts:
        query.copy_(F.scaled_dot_product_attention(query, key, value))  # in its place, which saves memory
    return seen


def _feed_forward(layer, hidden: Tensor) -> Tensor:
    # In slices: a text of 8192 tokens would take 270 MB here at once, and memory that is used again stays in the cache.
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
    """Return the products of the same rows with several layers. Those of `int8.py` share the rows in int8."""
    results, shared = [], {}
    for part in parts:
        if isinstance(part, torch.nn.Linear):
            # `.to` is free where the weights are of the rows' type already.
            results.append(linear(rows, part.weight.to(rows), part.bias.to(rows)))
        else:
            if part.grid not in shared:
                shared[part.grid] = part.grid(rows)
            results.append(part.product(shared[part.grid]))
    return results


def _arithmetic(model: XLMRobertaForSequenceClassification) -> torch.dtype:
    """The type to compute in: that of the weights, unless the processor is faster in float32.

    Without units for it a processor is five times slower in bfloat16 than in float32. Then a layer's weights are
    widened when it is their turn: half the memory, and no rounding but that of the weights.
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
