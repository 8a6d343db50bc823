"""The packed path: XLM-RoBERTa on a CPU without padding, and each matrix product by the fastest route that is exact.

The texts of a batch lie end to end in one long row of tokens, so no product is spent on padding. NVIDIA's MLPerf
submission did this for BERT (github.com/mlcommons/training_results_v1.1, padding.py); FlashAttention's and ModernBERT's
bert_padding.py follow it.

    padded   <s> what is ... </s>                packed   <s> what is ... </s><s> a ... </s><s> an ... </s>
             <s> a ... </s><pad><pad>
             <s> an ... </s><pad><pad>

Only attention connects one token with others, so only attention takes the texts one by one. The classifier reads only
the first token of each text, so the last layer computes only that one. The model is not changed: this file reads its
weights, and calls its embeddings and activation functions.

In the shapes below, `tokens` is the number of tokens of all texts together, `texts` the number of texts, and `hidden`
the width of the model (1024 in bge-reranker-v2-m3).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from .products import linear, multiplies_in
from .quantised_linear import QuantisedLinear
from .tokenising import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaConfig, XLMRobertaForSequenceClassification
    from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

SLICE = 512
"""Tokens that the feed-forward part takes at a time. Its inner vectors are four times as wide as the others, so 8192
tokens at once would take 270 MB; a small buffer stays in the processor's cache."""


class _Plan(NamedTuple):
    """What a part of a model computes, but for its weights."""

    kind: type
    facts: dict[str, object]
    parts: list[tuple[str, _Plan]]


_plans: dict[tuple[tuple[str, object], ...], _Plan] = {}


def can_pack(model: object, device: torch.device) -> bool:
    """Whether `run_packed` computes what `model` would: it is on a CPU, and what Transformers makes of its config.

    It is not with hooks, adapters, autocast, compiled parts, another attention function, parts that another library has
    quantised, or parts or attributes that were replaced after the model was made.
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
        and not torch.nn.modules.module._has_any_global_hook()
        and all(type(weight) is torch.nn.Parameter and weight.device.type == "cpu" for weight in weights)
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.bfloat16}, {torch.float16})
        and _is_made_by(_plan_of(config), model)
    )


def _plan_of(config: XLMRobertaConfig) -> _Plan:
    """Return the plan of a model with one layer that Transformers makes from this config, without weights."""
    key = tuple((name, value) for name, value in vars(config).items() if isinstance(value, str | int | float | None))
    if key not in _plans:
        config = copy.deepcopy(config)
        config.num_hidden_layers = 1
        with torch.device("meta"):
            _plans[key] = _plan(transformers.XLMRobertaForSequenceClassification(config))
    return _plans[key]


def _plan(part: torch.nn.Module) -> _Plan:
    return _Plan(type(part), _facts(part), [(name, _plan(child)) for name, child in part.named_children()])


def _facts(part: torch.nn.Module) -> dict[str, object]:
    """Return the attributes that say what a part computes, such as a layer norm's `eps`, and which weights it has."""
    if isinstance(part, transformers.PreTrainedModel):  # its own attributes are its name and the like
        return {}
    facts: dict[str, object] = {name: weight is None for name, weight in part._parameters.items()}
    for name, value in vars(part).items():
        if name[0] != "_" and name not in ("training", "layer_idx") and isinstance(value, str | int | float | tuple):
            facts[name] = value
    return facts


def _is_made_by(plan: _Plan, part: torch.nn.Module) -> bool:
    if part._forward_hooks or part._forward_pre_hooks or part._compiled_call_impl or "forward" in vars(part):
        return False
    if plan.kind is torch.nn.Linear and type(part) is QuantisedLinear:
        return True
    if type(part) is not plan.kind or _facts(part) != plan.facts:
        return False
    children = list(part.named_children())
    if plan.kind is torch.nn.ModuleList:  # the layers, each like the plan's one
        return all(_is_made_by(plan.parts[0][1], child) for _, child in children)
    return [name for name, _ in children] == [name for name, _ in plan.parts] and all(
        _is_made_by(child_plan, child) for (_, child_plan), (_, child) in zip(plan.parts, children, strict=True)
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
        (windows, labels), in the order of the windows, in float32. The head computes in float32 whatever the model's
        dtype, which takes no measurable time: in bfloat16 half of the logits of a long list tie.
    """
    with torch.inference_mode():
        return packed_logits(windows, model, tokenizer)


def packed_logits(
    windows: list[Window], model: XLMRobertaForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Compute what `run_packed` returns, in whatever mode torch is in."""
    lengths = [len(window.token_ids) for window in windows]
    starts = torch.tensor([0, *lengths[:-1]], device="cpu").cumsum(0)
    dtype = model.dtype if model.dtype == torch.float32 or multiplies_in(model.dtype) else torch.float32
    # Where the processor has no instructions for the dtype of the weights, each layer's are converted to float32 when
    # they are used, which keeps the memory at half and rounds nothing but the weights.
    hidden = _embed(windows, model, "token_type_ids" in tokenizer.model_input_names).to(dtype)
    *layers, last = layers_of(model)
    for layer in layers:
        hidden = _feed_forward(layer, _attention_block(layer, hidden, hidden, lengths, lengths))
    first_tokens = hidden[starts]
    first_tokens = _feed_forward(last, _attention_block(last, first_tokens, hidden, [1] * len(lengths), lengths))
    return _linear(_linear(first_tokens.float(), model.classifier.dense).tanh(), model.classifier.out_proj)


def layers_of(model: XLMRobertaForSequenceClassification) -> list[XLMRobertaLayer]:
    """Return the encoder's layers, first to last."""
    return cast("list[XLMRobertaLayer]", list(model.roberta.encoder.layer))  # a ModuleList has no type for its elements


def _embed(windows: list[Window], model: XLMRobertaForSequenceClassification, takes_types: bool) -> Tensor:
    """Return the embeddings of all texts, end to end: (tokens, hidden)."""
    ids = [torch.tensor(window.token_ids, device="cpu") for window in windows]
    types = [window.type_ids if takes_types else [0] * len(window.token_ids) for window in windows]
    # As `create_position_ids_from_input_ids` in Transformers: count from padding_idx + 1, and skip pad tokens.
    pad = model.roberta.embeddings.padding_idx
    positions = [(text != pad).cumsum(0) * (text != pad) + pad for text in ids]
    embedded: Tensor = model.roberta.embeddings(
        input_ids=torch.cat(ids)[None],
        token_type_ids=torch.tensor([type_id for text in types for type_id in text], device="cpu")[None],
        position_ids=torch.cat(positions)[None],
    )[0]
    return embedded


def _attention_block(
    layer: XLMRobertaLayer, query_tokens: Tensor, tokens: Tensor, query_lengths: list[int], lengths: list[int]
) -> Tensor:
    """Compute a layer's attention block. Each query attends to the tokens of its own text.

    Args:
        layer: one of the encoder's.
        query_tokens: (queries, hidden), the tokens whose output is wanted: all of `tokens`, or the first of each text.
        tokens: (tokens, hidden), from which keys and values are computed.
        query_lengths: how many queries each text has, (texts).
        lengths: how many tokens each text has, (texts).

    Returns:
        (queries, hidden)
    """
    output = layer.attention.output
    attended = _attention(layer, query_tokens, tokens, query_lengths, lengths)
    return _norm(_linear(attended, output.dense).add_(query_tokens), output.LayerNorm)


def _attention(
    layer: XLMRobertaLayer, query_tokens: Tensor, tokens: Tensor, query_lengths: list[int], lengths: list[int]
) -> Tensor:
    """Return the output of attention, (queries, hidden). Returning from here frees the keys and values."""
    attention = layer.attention.self

    def heads(rows: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        split = rows.view(len(rows), attention.num_attention_heads, -1).transpose(0, 1)
        return torch.split(split[None], lengths, dim=2)  # for each text (1, heads, its rows, hidden / heads)

    if query_tokens is tokens:
        queries, keys, values = _linears(tokens, attention.query, attention.key, attention.value)
    else:
        queries = _linear(query_tokens, attention.query)
        keys, values = _linears(tokens, attention.key, attention.value)
    texts = zip(heads(queries, query_lengths), heads(keys, lengths), heads(values, lengths), strict=True)
    for query, key, value in texts:
        query.copy_(F.scaled_dot_product_attention(query, key, value))  # in the place of the queries, to save memory
    return queries


def _feed_forward(layer: XLMRobertaLayer, hidden: Tensor) -> Tensor:
    """Compute a layer's feed-forward block: (rows, hidden) in, (rows, hidden) out."""
    result = torch.empty_like(hidden)
    for rows, into in zip(torch.split(hidden, SLICE), torch.split(result, SLICE), strict=True):
        inner = layer.intermediate.intermediate_act_fn(_linear(rows, layer.intermediate.dense))
        into.copy_(_norm(_linear(inner, layer.output.dense).add_(rows), layer.output.LayerNorm))
    return result


def _norm(rows: Tensor, part: torch.nn.LayerNorm) -> Tensor:
    return F.layer_norm(rows, part.normalized_shape, part.weight.to(rows), part.bias.to(rows), part.eps)


def _linear(rows: Tensor, part: torch.nn.Linear | QuantisedLinear) -> Tensor:
    return _linears(rows, part)[0]


def _linears(rows: Tensor, *parts: torch.nn.Linear | QuantisedLinear) -> list[Tensor]:
    """Return what several linear layers make of the same rows: (rows, inputs) in, a (rows, outputs) for each layer out.

    Layers of `quantised_linear.py` that share a grid round the rows only once.
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
