"""Load the model that the deployment names, for both scoring scripts."""

import os
from pathlib import Path

from reranker_helpers import Reranker, load_reranker, score

WARM_UP = [("what is a panda?", text) for text in ("a panda is a bear", "law", "bread is baked in an oven, " * 9)]


def load_model() -> tuple[Reranker, str]:
    """Load the model from the folder in AZUREML_MODEL_DIR, and score once, so that the first request isn't slow.

    RERANKER_DEVICE may name a device, RERANKER_MODEL_NAME the model.

    Returns:
        The reranker, and what answers call the model.

    Raises:
        RuntimeError: the weights are missing or incomplete, then the message lists the folder; or the device is not
            there; or the model gives the same logit for everything.
        ArithmeticError: the model returns NaN or an infinity.
    """
    folder = find_model(os.environ.get("AZUREML_MODEL_DIR", ""))
    try:
        # A folder's path, so nothing is looked up on the hub. A deployment that pays for a GPU says "cuda", so that a
        # missing driver fails here and now, not as a slow endpoint.
        reranker = load_reranker(folder, device=os.environ.get("RERANKER_DEVICE"))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{error}. {_listing(folder)}") from error
    logits = score(WARM_UP, *reranker)
    if len(set(logits)) == 1:
        # Such as weights of zeros, where an upload or a copy left a hole in the file.
        raise RuntimeError(
            f"the model gives the logit {logits[0]} to every text: check the weights. {_listing(folder)}"
        )
    return reranker, os.environ.get("RERANKER_MODEL_NAME", folder.name)


def find_model(model_dir: str) -> Path:
    """Return the one folder with a config.json at or below `model_dir`: how deep Azure puts it depends on the upload.

    Raises RuntimeError, with a listing of what is there, when there is none or more than one.
    """
    root = Path(model_dir).absolute()
    if not model_dir or not root.is_dir():
        raise RuntimeError(f"AZUREML_MODEL_DIR is {model_dir!r}, which is no folder: does the deployment have a model?")
    folders = [file.parent for file in sorted(root.rglob("config.json"))]
    if len(folders) != 1:
        raise RuntimeError(f"{len(folders)} folders with a config.json, expected one model. {_listing(root)}")
    return folders[0]


def _listing(root: Path) -> str:
    # Sizes, because a file may be there and yet be the text of a pointer to it.
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    lines = [f"  {file.relative_to(root)}  {file.stat().st_size:,} bytes" for file in files[:100]]
    return "\n".join([f"The model folder {root} holds {len(files)} files:", *lines])
