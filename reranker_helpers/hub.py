"""Find out quickly whether there is a way to the Hugging Face Hub: libraries retry for half a minute."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, try_to_load_from_cache


def hub_status(model_name: str, revision: str | None = None, *, seconds: float = 5.0) -> int | None:
    """Return the HTTP status with which the hub answers for a model's config.json, or None if it does not.

    Args:
        model_name: a name on the hub.
        revision: branch, tag or commit. Default: main.
        seconds: how long to wait. In a thread of its own, because where a firewall swallows packets, looking up the
            hub's name alone can take a minute.

    The environment variable HF_HUB_OFFLINE is respected: then nobody is asked.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    url = f"{constants.ENDPOINT}/{model_name}/resolve/{revision or 'main'}/config.json"
    answers = []

    def ask() -> None:
        try:
            answers.append(urlopen(Request(url, method="HEAD"), timeout=seconds).status)
        except HTTPError as error:
            answers.append(error.code)
        except (OSError, ValueError):  # refused, timed out, no such host, no address
            pass

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def choose_model(model_name: str, *, otherwise: str | os.PathLike[str]) -> str:
    """Return the model to load: what RERANKER_MODEL names, else `model_name`, else `otherwise`, a folder.

    `model_name` is taken if its weights are in the hub's cache, or the hub is ready to send them.
    """
    if "RERANKER_MODEL" in os.environ:
        return os.environ["RERANKER_MODEL"]
    if in_cache(model_name) or hub_status(model_name) == 200:
        return model_name
    return str(Path(otherwise))


def in_cache(model_name: str) -> bool:
    """Whether the weights of a model, in one file, are in the hub's cache."""
    return isinstance(try_to_load_from_cache(model_name, "model.safetensors"), str)
