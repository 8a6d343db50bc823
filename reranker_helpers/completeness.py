"""Tell a complete model from a broken one: Transformers fills missing weights with random numbers and carries on."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_UNUSED = (
    "position_ids",
    "token_type_ids",
    "inv_freq",
    "masked_bias",
    "attn.bias",
    "pooler.dense.weight",
    "pooler.dense.bias",
)
"""Endings of weight names that checkpoints hold and a sequence classifier recomputes or does not use."""


def check_complete(
    model_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]
) -> None:
    """Refuse a model whose scores would be random or wrong. Unused weights outside the encoder are only logged.

    Args:
        model_name: the name or folder that it was loaded from, for messages.
        model, tokenizer: as loaded.
        report: the second result of `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)`.

    Raises:
        OSError: weights are missing, have the wrong shape, or belong to layers that the model does not have; or the
            tokenizer is not the model's. The message names up to five of them.
        TypeError: the tokenizer is not a fast one.
    """
    where = f"the folder {model_name}" if Path(model_name).is_dir() else model_name
    if report["missing_keys"]:
        raise OSError(
            f"{where} holds no complete model: its weights lack {_some(report['missing_keys'])}, which Transformers "
            "fills with random numbers. Is it an encoder without a trained head, or is config.json for another model?"
        )
    if report["mismatched_keys"]:
        # Transformers 4 reports names only, 5 also the two shapes.
        sizes = [
            entry if isinstance(entry, str) else f"{entry[0]} (shape {tuple(entry[1])}, expected {tuple(entry[2])})"
            for entry in report["mismatched_keys"]
        ]
        raise OSError(f"{where} holds no complete model: config.json does not fit the weights: {_some(sizes)}")
    unused = [name for name in report["unexpected_keys"] if not name.endswith(_UNUSED)]
    inside = [name for name in unused if name.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise OSError(
            f"{where} holds weights that the model of its config.json has no place for, so scores would be wrong: "
            f"{_some(inside)}. Use the config.json that belongs to them"
        )
    if unused:
        logger.warning("%s holds weights that are not used: %s", where, _some(unused))
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}, expected a fast one: it knows each token's place")
    types = getattr(model.config, "type_vocab_size", None) or 0
    if types > 1 and "token_type_ids" not in tokenizer.model_input_names:
        # Not an error: BigBird is trained like this.
        logger.warning(
            "%s tells query and document apart by token types, but its tokenizer returns none, so every token counts "
            "as the query's. Unless the model was trained like this, add token_type_ids to model_input_names in "
            "tokenizer_config.json",
            where,
        )
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    # Without its files Transformers 5 makes a tokenizer of special tokens only, for which each word is unknown.
    if len(vocabulary) < rows / 2:
        faults = unreadable_files(model_name) or ["are the tokenizer's files missing, such as tokenizer.json?"]
        raise OSError(
            f"{where} holds no complete model: the tokenizer knows {len(vocabulary):,} tokens, the model {rows:,} "
            f"({'; '.join(faults)})"
        )
    if highest >= rows:
        raise OSError(
            f"{where} has a tokenizer with token ids up to {highest:,}, but the model has embeddings for {rows:,} "
            "tokens: use the tokenizer that the model was trained with"
        )


def unreadable_files(folder: str) -> list[str]:
    """Return a phrase for each damaged file, such as "config.json is empty"; [] if none is found, or no folder.

    Weights are not read, only their headers and sizes.
    """
    faults = []
    for file in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        if file.is_file() and file.suffix in (".safetensors", ".bin", ".json", ".model", ".txt"):
            fault = _fault(file)
            if fault:
                faults.append(f"{file.name} {fault}")
    return faults


def cached_folder(model_name: str, revision: str | None) -> str | None:
    """Return the folder in the hub's cache that holds a model's config.json, or None. `revision` None means main."""
    try:
        file = transformers.utils.cached_file(model_name, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if file is None else str(Path(file).parent)


def _fault(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        if not start:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the file itself: run git lfs pull"
        if file.suffix == ".safetensors":
            return _safetensors_fault(start, stream, size)
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_bytes())
        except ValueError:
            return "is not valid JSON, or is cut off"
        if file.name == "tokenizer.json" and "model" not in content:
            return "holds no tokenizer"
    if file.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return f"is cut off after {size:,} bytes"
    return None


def _safetensors_fault(start: bytes, stream: Any, size: int) -> str | None:
    # github.com/huggingface/safetensors, Format: the header's length in 8 bytes, the header in JSON, the tensors.
    header = int.from_bytes(start[:8], "little")
    try:
        stream.seek(8)
        tensors = json.loads(stream.read(header) if header < size else b"")
        end = 8 + header + max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"is not a safetensors file, or is cut off after {size:,} bytes"
    return None if end == size else f"has {size:,} bytes of {end:,}: it is cut off"


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
