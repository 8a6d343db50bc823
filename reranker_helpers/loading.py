"""Load a reranker: choose device and dtype, and refuse a model that cannot rerank or is not complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import transformers

from .completeness import cached_folder, check_complete, unreadable_files
from .hub import Answer, ask_hub, in_cache
from .packed import can_pack
from .products import multiplies_in
from .quantised_linear import levels_for
from .quantising import quantise, refuse_int8
from .reranker import Reranker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_NAME = "BAAI/bge-reranker-v2-m3"
"""The default model, on the Hugging Face Hub."""

logger = logging.getLogger(__name__)


def load_reranker(
    model_name: str | os.PathLike[str] = MODEL_NAME,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Reranker:
    """Load a cross-encoder and its tokenizer, ready to score.

    Args:
        model_name: a name on the Hugging Face Hub, or a folder with config, weights and tokenizer. The first call with
            the default downloads 2.3 GB.
        device: "cpu", "cuda", "cuda:1", "mps" or a `torch.device`. Default: CUDA if available, else the CPU. MPS is
            never chosen by default: users report hangs and memory leaks with this model on it.
        dtype: "float32", "float16", "bfloat16", "float64" or the `torch.dtype`. Default: float16 on CUDA, float32
            elsewhere. "int8" is for XLM-RoBERTa on a CPU: the weights are quantised while loading, and scores differ
            from float32 (see `quantising.py`). After float32 on a CPU the log names those that are faster there.
        revision: branch, tag or commit on the hub. Default: main.

    Returns:
        A named tuple `(model, tokenizer, device)`, with the model in evaluation mode and on the device.

    Raises:
        OSError: config, tokenizer or weights are in no folder, nor in the cache, and cannot be downloaded; a file is
            damaged; weights are missing, or belong to layers that the model does not have; the tokenizer is not the
            model's; or the model needs code of its own, which is never run. The message says which.
        TypeError: the tokenizer is not a fast one.
        ValueError: the model does not have exactly one label, or `dtype` is unknown, or is int8 where that cannot run.
        RuntimeError: the device does not exist.
    """
    model_name = os.fspath(model_name)
    device, device_reason = _choose_device(device)
    int8 = dtype in ("int8", torch.int8)  # loaded in float32, then quantised layer by layer
    dtype, dtype_reason = _choose_dtype("float32" if int8 else dtype, device)
    try:
        hub = None if os.path.isdir(model_name) else ask_hub(model_name, revision)
    except ValueError as error:
        raise OSError(
            f"{model_name!r} is no folder here, and cannot be a model's name on the hub: check the path"
        ) from error
    # Where the hub does not answer, Transformers would retry for half a minute; where it is busy, for one or two.
    local = hub is None or hub.status is None
    if hub and hub.status and (hub.status == 429 or hub.status >= 500) and in_cache(model_name, revision):
        logger.warning("%s: loading the cached copy of %s, without looking for a newer one", hub.trouble, model_name)
        local = True
    source = {
        "revision": revision,
        "local_files_only": local,
        "trust_remote_code": False,  # by default Transformers asks on stdin, for 15 seconds
    }
    # The config first: a model that cannot rerank is refused before its weights are downloaded.
    with _explained(model_name, revision, hub):
        config = transformers.AutoConfig.from_pretrained(model_name, **source)
    if config.num_labels != 1:
        raise ValueError(
            f"{model_name} has {config.num_labels} labels, expected 1: it is no reranker with one logit a pair, as "
            f"{MODEL_NAME} is"
        )
    if int8 and (refused := refuse_int8(config, device)):
        raise ValueError(refused)
    with _explained(model_name, revision, hub):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, **source)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            model_name,
            **source,
            dtype=dtype,
            return_dict=True,  # whatever the config says: some models of Transformers fail without it
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    check_complete(model_name, model, tokenizer, report)
    if not getattr(config, "quantization_config", None):
        for weight in model.parameters():
            if weight.is_floating_point() and weight.element_size() == 1:
                weight.data = weight.to(dtype)  # Transformers 4 leaves weights that are stored in float8 as they are
    if int8:
        quantise(model.eval(), tokenizer, _folder(model_name, revision))
    elif device.type == "cpu" and dtype == torch.float32 and logger.isEnabledFor(logging.INFO):
        dtype_reason += _faster_dtypes(model, device)
    logger.info("%s on %s (%s) in %s (%s)", model_name, device, device_reason, "int8" if int8 else dtype, dtype_reason)
    return Reranker(model.eval().to(device), tokenizer, device)


def _choose_device(device: str | torch.device | None) -> tuple[torch.device, str]:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda"), "CUDA is available"
        return torch.device("cpu"), "no CUDA device"
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device is {str(device)!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices: "
            "check the driver with nvidia-smi, install a CUDA build of torch, or pass device='cpu'"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError(f"device is 'mps', but torch {torch.__version__} finds no Apple GPU: pass device='cpu'")
    return device, "asked for"


def _choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    if dtype is None:
        if device.type == "cuda":
            return torch.float16, "the default on CUDA: half the memory, and faster"
        return torch.float32, f"the default on {device.type}: exact"
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype is {dtype!r}, expected 'float32', 'float16', 'bfloat16', 'float64' or 'int8'")
    return chosen, "asked for"


def _faster_dtypes(model: PreTrainedModel, device: torch.device) -> str:
    """Return what the log says of dtypes in which this processor multiplies faster than in float32."""
    names = ["'bfloat16'"] if multiplies_in(torch.bfloat16) else []
    width = model.config.hidden_size if can_pack(model, device) else None  # int8 is for the packed path's models only
    if width and levels_for(width, width):
        names.append("'int8'")
    return f"; faster here, but less exact: dtype={' or '.join(names)}" if names else ""


def _folder(model_name: str, revision: str | None) -> str | None:
    """Return where the model's files are: the folder of that name, or one in the hub's cache, or None."""
    return model_name if os.path.isdir(model_name) else cached_folder(model_name, revision)


@contextmanager
def _explained(model_name: str, revision: str | None, hub: Answer | None) -> Iterator[None]:
    """Turn what goes wrong in loading into an OSError that says what to do. `hub` is None for a folder."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # each format has its own: SafetensorError, UnpicklingError, KeyError, EOFError ...
        raise OSError(_how_to_get(model_name, revision, hub, error)) from error


def _how_to_get(model_name: str, revision: str | None, hub: Answer | None, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{model_name} needs code of its own, which load_reranker never runs. If you trust that code, load model "
            "and tokenizer yourself with trust_remote_code=True, and pass them on: rerank(query, documents, model, "
            "tokenizer, device)"
        )
    lines = str(error).strip().replace(":\n", ": ").splitlines()
    reason = (
        lines[0] if isinstance(error, OSError | ValueError) and lines else ": ".join([type(error).__name__, *lines[:1]])
    )
    folder = _folder(model_name, revision)
    faults = unreadable_files(folder) if folder else []
    if hub is None:
        return (
            f"the folder {model_name} holds no complete model: it needs config.json, model.safetensors and the "
            f"tokenizer's files ({'; '.join(faults) or reason})"
        )
    if faults:
        return (
            f"the copy of {model_name} in the cache is damaged: {'; '.join(faults)}. Delete {folder} to fetch it again"
        )
    if hub.status in (401, 403):
        return (
            f"{model_name} could not be downloaded ({hub.trouble}). Check the name, and renew the token (HF_TOKEN, or "
            "hf auth login): a public model needs none, a gated or private one a token with access to it. "
            "HF_HUB_OFFLINE=1 loads a copy that is in the cache"
        )
    return (
        f"{model_name} is no folder here, not complete in the local cache, and could not be downloaded "
        f"({'; '.join(filter(None, [hub.trouble, reason]))}). "
        "Check the name, the token (HF_TOKEN) and the network (proxy: HTTPS_PROXY; mirror: HF_ENDPOINT; "
        "HF_HUB_OFFLINE=1 forbids downloads), or pass the path of a folder with the weights. Without any network, try "
        "this tutorial's tests/stand_in_model"
    )
