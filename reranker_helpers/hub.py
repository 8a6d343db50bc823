"""Find out within seconds whether the Hugging Face Hub can be reached: its own client retries for half a minute."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from huggingface_hub import constants, try_to_load_from_cache

SECONDS = 5.0
"""How long to wait for the hub's answer, unless the environment variable HF_HUB_ETAG_TIMEOUT says otherwise."""


class Answer(NamedTuple):
    """What the hub answered."""

    status: int | None
    """The HTTP status, or None without an answer."""
    reason: str
    """Why there was no answer, in one line, or ""."""

    @property
    def refuses(self) -> bool:
        """Whether it wants another token, or none at all."""
        return self.status in (401, 403)

    @property
    def is_busy(self) -> bool:
        """Whether it may answer otherwise later."""
        return self.status is not None and (self.status == 429 or self.status >= 500)


def ask_hub(model_name: str, revision: str | None = None) -> Answer:
    """Ask the hub for a model's config.json, with the hub's own client: its proxies, certificates and token.

    The hub is the one that HF_ENDPOINT names. With HF_HUB_OFFLINE=1 it is not asked.

    Args:
        model_name: a name on the hub, such as "BAAI/bge-reranker-v2-m3".
        revision: branch, tag or commit. Default: main.
    """
    if constants.HF_HUB_OFFLINE:
        return Answer(None, "HF_HUB_OFFLINE is set")
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

    seconds = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else SECONDS
    answers = []

    def ask() -> None:
        try:
            validate_repo_id(model_name)
            url = hf_hub_url(model_name, "config.json", revision=revision)
            # `request`, since `head` of older clients follows no redirects
            response = get_session().request("HEAD", url, headers=build_hf_headers(), timeout=seconds)
            answers.append(Answer(response.status_code, ""))
        except Exception as error:  # of whichever client the user has chosen
            answers.append(Answer(None, " ".join(f"{type(error).__name__}: {error}".split())[:300]))

    # In a thread, because the timeout does not cover the lookup of the host's name, which can take a minute.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else Answer(None, f"no answer within {seconds:g} s")


def choose_model(model_name: str, *, otherwise: str | os.PathLike[str]) -> str:
    """Return what to pass to `load_reranker`.

    That is the environment variable RERANKER_MODEL if it is set and not empty; else `model_name`, if its weights are in
    the hub's cache or the hub offers them; else `otherwise`, the path of a folder.
    """
    chosen = os.environ.get("RERANKER_MODEL", "").strip()
    if chosen:
        return chosen
    if in_cache(model_name) or ask_hub(model_name).status == 200:
        return model_name
    return str(Path(otherwise))


def in_cache(model_name: str) -> bool:
    """Whether the hub's cache holds the model's model.safetensors. Weights in several files are not recognised."""
    return isinstance(try_to_load_from_cache(model_name, "model.safetensors"), str)
