"""Find out within seconds whether the Hugging Face Hub can be reached: its own client retries for half a minute."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session, get_token_to_send

SECONDS = 5.0
"""How long to wait for the hub's answer, unless HF_HUB_ETAG_TIMEOUT is set."""


class Answer(NamedTuple):
    """What the hub says about a model."""

    status: int | None
    """The HTTP status; None if there was no answer."""
    trouble: str | None
    """Why the model can't be downloaded, in one line; None if it can."""


def ask_hub(model_name: str, revision: str | None = None) -> Answer:
    """Ask for a model's config.json, once, with the session, token and endpoint of huggingface_hub.

    With HF_HUB_OFFLINE=1 the hub is not asked. The answer takes at most 5 seconds, or HF_HUB_ETAG_TIMEOUT.

    Args:
        model_name: a name on the hub, such as "BAAI/bge-reranker-v2-m3".
        revision: branch, tag or commit. Default: main.

    Raises:
        ValueError: no model on the hub can have that name.
    """
    url = hf_hub_url(model_name, "config.json", revision=revision)
    if constants.HF_HUB_OFFLINE:
        return Answer(None, "HF_HUB_OFFLINE is set")
    seconds = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else SECONDS
    token = get_token_to_send(None)  # not in the thread: Google Colab may ask the user for it
    answers = [Answer(None, f"no answer within {seconds:g} seconds")]

    def ask() -> None:
        try:
            headers = build_hf_headers(token=token)  # in the thread, because huggingface_hub 2 asks the hub for a part
            # Not `head`, which follows redirects in httpx, but not in requests. The wait below always ends first.
            response = get_session().request("HEAD", url, headers=headers, timeout=seconds + 1)
        except Exception as raised:  # whatever this version's session raises, or the user's own
            error: BaseException = raised
            while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
                error = inner  # the first cause says it best: requests wraps it three times
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "Bearer" in words:  # must not be shown: it quotes the token
                words = "the token in HF_TOKEN has characters that do not belong there"
            answers.append(Answer(None, words))
        else:
            status = response.status_code
            said = [f"the hub answered {status}", response.headers.get("X-Error-Message")]
            answers.append(Answer(status, ": ".join(filter(None, said)) if status >= 400 else None))

    # In a thread, because the timeout does not cover the lookup of the host's name, which can take a minute.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def choose_model(model_name: str, *, otherwise: str | os.PathLike[str]) -> str:
    """Return what to pass to `load_reranker`.

    That is the environment variable RERANKER_MODEL if it is set and not blank; else `model_name`, if its weights are in
    the hub's cache or the hub offers them; else `otherwise`, the path of a folder.
    """
    chosen = os.environ.get("RERANKER_MODEL", "")
    if chosen.strip():
        return chosen
    if in_cache(model_name) or ask_hub(model_name).trouble is None:
        return model_name
    return str(Path(otherwise))


def in_cache(model_name: str, revision: str | None = None) -> bool:
    """Whether the hub's cache holds the model's weights. Of weights in several files only the index is looked for."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(model_name, file, revision=revision), str) for file in files)
