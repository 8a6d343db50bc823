"""Find out within seconds whether the Hugging Face Hub can be reached: its own client retries for half a minute."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, try_to_load_from_cache

SECONDS = 5.0
"""How long to wait for the hub's answer."""


def hub_status(model_name: str, revision: str | None = None) -> int | None:
    """Return the HTTP status of a request for a model's config.json, or None if the hub does not answer in time.

    The hub is the one that HF_ENDPOINT names. With HF_HUB_OFFLINE=1 it is not asked, and the result is None.

    Args:
        model_name: a name on the hub, such as "BAAI/bge-reranker-v2-m3".
        revision: branch, tag or commit. Default: main.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    url = f"{constants.ENDPOINT}/{model_name}/resolve/{revision or 'main'}/config.json"
    answers = []

    def ask() -> None:
        try:
            answers.append(urlopen(Request(url, method="HEAD"), timeout=SECONDS).status)
        except HTTPError as error:
            answers.append(error.code)
        except (OSError, ValueError):  # refused, timed out, no such host, no address
            pass

    # In a thread, because the timeout does not cover the lookup of the host's name, which can take a minute.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else None


def choose_model(model_name: str, *, otherwise: str | os.PathLike[str]) -> str:
    """Return what to pass to `load_reranker`.

    That is the environment variable RERANKER_MODEL if it is set; else `model_name`, if its weights are in the hub's
    cache or the hub offers them; else `otherwise`, the path of a folder.
    """
    if "RERANKER_MODEL" in os.environ:
        return os.environ["RERANKER_MODEL"]
    if in_cache(model_name) or hub_status(model_name) == 200:
        return model_name
    return str(Path(otherwise))


def in_cache(model_name: str) -> bool:
    """Whether the hub's cache holds the model's model.safetensors. Weights in several files are not recognised."""
    return isinstance(try_to_load_from_cache(model_name, "model.safetensors"), str)
