"""Load the model that the deployment names, for both scoring scripts."""

import os
from pathlib import Path

from reranker_helpers import Reranker, load_reranker, score

# Related and unrelated, short and long: a model that gives all of them the same logit ranks nothing.
WARM_UP = [("what is a panda?", text) for text in ("a panda is a bear", "law", "bread is baked in an oven, " * 9)]


def load_model() -> tuple[Reranker, str]:
    """Load the model from the folder in AZUREML_MODEL_DIR, and score once, so that the first request is not slow.

    The environment variables RERANKER_DEVICE and RERANKER_DTYPE set device and dtype (default: those of
    `load_reranker`), and RERANKER_MODEL_NAME the model's name in answers (default: the name of the folder). An empty
    one counts as not set.

    Returns:
        The reranker, and the model's name.

    Raises:
        RuntimeError: the weights are missing, incomplete, or give every text the same logit (the message lists the
            folder), or the device does not exist, or the dtype is unknown or does not fit device and model.
        ArithmeticError: the model returns NaN or an infinity.
    """
    folder = find_model(os.environ.get("AZUREML_MODEL_DIR", ""))
    try:
        # With a folder, the hub is not asked. A deployment that pays for a GPU sets "cuda", so that a missing driver
        # fails here and does not make a slow endpoint.
        reranker = load_reranker(folder, device=_setting("RERANKER_DEVICE"), dtype=_setting("RERANKER_DTYPE"))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{error}. {_listing(folder)}") from error
    logits = score(WARM_UP, *reranker)
    if len(set(logits)) == 1:
        # Such as weights that are all zero, because an upload or a copy left a hole in the file.
        raise RuntimeError(
            f"the model gives the logit {logits[0]} to every text: check the weights. {_listing(folder)}"
        )
    return reranker, _setting("RERANKER_MODEL_NAME") or folder.name


def _setting(variable: str) -> str | None:
    return os.environ.get(variable, "").strip() or None


def find_model(model_dir: str) -> Path:
    """Return the one folder with a config.json in or below `model_dir`: how deep it lies depends on the upload.

    Raises RuntimeError if there is none or more than one. The message lists the files.
    """
    root = Path(model_dir).absolute()
    if not model_dir or not root.is_dir():
        raise RuntimeError(f"AZUREML_MODEL_DIR is {model_dir!r}, which is no folder: does the deployment have a model?")
    folders = [file.parent for file in sorted(root.rglob("config.json"))]
    if len(folders) != 1:
        raise RuntimeError(f"{len(folders)} folders with a config.json, expected one model. {_listing(root)}")
    return folders[0]


def _listing(root: Path) -> str:
    # With sizes, because a file may be a Git LFS pointer of 130 bytes.
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    lines = [f"  {file.relative_to(root)}  {file.stat().st_size:,} bytes" for file in files[:100]]
    return "\n".join([f"The model folder {root} holds {len(files)} files:", *lines])
