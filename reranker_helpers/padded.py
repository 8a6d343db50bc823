"""Run a batch as Transformers does: padded to its longest text. For any model on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .tokenising import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_padded(
    windows: list[Window],
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """Return the model's logits for the windows, shape (windows, labels), on the device and in the model's type."""
    lengths = [len(window.token_ids) for window in windows]
    longest = max(lengths)

    def padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
        left = tokenizer.padding_side == "left"
        padding = ((row, [filler] * (longest - len(row))) for row in rows)
        tensor = torch.tensor([fill + row if left else row + fill for row, fill in padding])
        # From pinned memory a copy to a GPU runs by itself: Python goes on at once.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    inputs = {
        "input_ids": padded((window.token_ids for window in windows), tokenizer.pad_token_id),
        "attention_mask": padded(([1] * length for length in lengths), 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = padded((window.type_ids for window in windows), tokenizer.pad_token_type_id)
    if device.type == "cuda" and _takes_ready_masks(model):
        inputs["attention_mask"] = _ready_mask(inputs["attention_mask"], lengths)
    return model(**inputs).logits


def _takes_ready_masks(model: Callable[..., Any]) -> bool:
    """Whether this is an XLM-RoBERTa of Transformers 5, which returns a mask with four dimensions as it is."""
    return (
        int(transformers.__version__.split(".")[0]) >= 5
        and type(model) is transformers.XLMRobertaForSequenceClassification
        and model.config._attn_implementation == "sdpa"
    )


def _ready_mask(mask: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
    """Make the mask that Transformers would make. To decide if there is padding it looks at the values of the mask, and
    so waits, once a batch, until the GPU has caught up; here the lengths tell."""
    if min(lengths) == max(lengths):
        return None
    return mask[:, None, None, :].bool().expand(-1, 1, max(lengths), -1)
