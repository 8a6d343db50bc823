"""Run a batch as Transformers does, padded to its longest text. For any model on any device."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .tokenising import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# For each model that was tried: the pad token, and whether the model ignores padding.
_tried: weakref.WeakKeyDictionary[Callable[..., Any], tuple[int | None, bool]] = weakref.WeakKeyDictionary()


def run_padded(
    windows: list[Window],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """Return the model's logits for the windows.

    The windows go through the model together, padded on the right, because positions count from the left. Two kinds of
    models get fewer at a time, and the log says so once: without a pad token, one window; if padding changes the scores
    in spite of the attention mask, windows of equal length.

    Args:
        windows: from `tokenise`, longest first.
        model: anything that is called like one of Transformers' sequence classifiers.
        tokenizer: the model's own.
        device: where the model is.

    Returns:
        (windows, labels), in the order of the windows, on the device and in the model's dtype.
    """
    pad = pad_token_id(model, tokenizer)
    padding = len(windows[0].token_ids) > len(windows[-1].token_ids)
    if len(windows) == 1 or (pad is not None and not padding) or _ignores_padding(windows, model, tokenizer, device):
        return _run(windows, model, tokenizer, device)
    groups = groupby(windows, key=id if pad is None else lambda window: len(window.token_ids))
    return torch.cat([_run(list(group), model, tokenizer, device) for _, group in groups])


def pad_token_id(model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that short texts are padded with: the tokenizer's, else the model's, else None."""
    own: int | None = tokenizer.pad_token_id
    return getattr(getattr(model, "config", None), "pad_token_id", None) if own is None else own


def _ignores_padding(
    windows: list[Window], model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> bool:
    """Whether a text gets the same logit with padding as without. Tried once for each model and pad token.

    Not with MobileBERT, ConvBERT, FNet, Nystromformer and YOSO, which mix neighbouring tokens, padding included, nor
    with a model that reads the last position even if that is padding.
    """
    pad = pad_token_id(model, tokenizer)
    tried = None
    with contextlib.suppress(TypeError):  # a model that cannot be hashed is tried again for each batch
        tried = _tried.get(model)
    if tried is None or tried[0] != pad:
        tried = pad, _try_padding(windows[0], windows[-1], model, tokenizer, device)
        with contextlib.suppress(TypeError):
            _tried[model] = tried
    return tried[1]


def _try_padding(
    long: Window, short: Window, model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> bool:
    if pad_token_id(model, tokenizer) is None:
        logger.warning(
            "Neither the tokenizer nor the model has a pad token, so texts are scored one by one, which is slow: set "
            "tokenizer.pad_token and model.config.pad_token_id"
        )
        return False
    together = _run([long, short], model, tokenizer, device)[1]
    alone = _run([short], model, tokenizer, device)[0]
    # Rounding errors grow over the layers, to about 30 times that of one operation. 0.005 allows for TensorFloat32.
    allowed = max(0.005, 32 * torch.finfo(alone.dtype).eps) * (1 + alone.float().abs())
    change = (together.float() - alone.float()).abs()
    if not (change > allowed).any():
        return True
    logger.warning(
        "Padding changes the scores of %s (by %.3f for one text), so only texts of equal length are scored together: "
        "right, but slower",
        type(model).__name__,
        change.max().item(),
    )
    return False


def _run(
    windows: list[Window], model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> torch.Tensor:
    lengths = [len(window.token_ids) for window in windows]
    longest = max(lengths)

    def padded(rows: Iterable[list[int]], filler: int | None) -> torch.Tensor:
        tensor = torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device="cpu")
        # The copy from pinned memory to a GPU is asynchronous: Python does not wait for it.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    mask = padded(([1] * length for length in lengths), 0)
    ready = device.type == "cuda" and _takes_ready_masks(model)
    inputs = {
        "input_ids": padded((window.token_ids for window in windows), pad_token_id(model, tokenizer)),
        "attention_mask": _ready_mask(mask, lengths) if ready else mask,
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = padded((window.type_ids for window in windows), tokenizer.pad_token_type_id)
    # For this call only: greenlets, which share their thread's modes, may run before and after.
    with torch.inference_mode():
        output = model(**inputs)
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]  # a tuple without `return_dict`
    return logits


def _takes_ready_masks(model: Callable[..., Any]) -> bool:
    """Whether this is an XLM-RoBERTa of Transformers 5, which passes a mask with four dimensions on unchanged."""
    return (
        int(transformers.__version__.split(".")[0]) >= 5
        and type(model) is transformers.XLMRobertaForSequenceClassification
        and model.config._attn_implementation == "sdpa"
    )


def _ready_mask(mask: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
    """Return the mask that Transformers would make of `mask`, (windows, longest): (windows, 1, longest, longest), bool,
    or None without padding. Transformers reads values of `mask` for that, and so waits for the GPU once per batch."""
    if min(lengths) == max(lengths):
        return None
    return mask[:, None, None, :].bool().expand(-1, 1, max(lengths), -1)
