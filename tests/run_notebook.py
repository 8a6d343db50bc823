"""Run a notebook, show how far it is, and write it as HTML: `python tests/run_notebook.py [NOTEBOOK] [--full-size]`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from refresh_notebooks import ROOT, execute

LOCAL = ROOT / "BGE_Reranker_Local.ipynb"
LAYERS = 24


def main(arguments: list[str]) -> int:
    """Write the page beside the notebook, whether all cells ran or not. Return 0 or, after printing the error, 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("notebook", nargs="?", type=Path, default=LOCAL, help=f"default: {LOCAL.name}")
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="with random weights of the real model's size, to see what time and memory it takes on this machine: "
        "no download, but 2.3 GB of temporary files",
    )
    options = parser.parse_args(arguments)
    path = options.notebook.resolve()
    page = path.with_suffix(".html")
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        choose_model(path, Path(folder) if options.full_size else None)
        try:
            execute(notebook, path.parent)
        except (CellExecutionError, DeadKernelError) as error:
            print(f"\n\n{error}")
            return 1
        finally:
            html, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
            page.write_text(html, encoding="utf-8")
            print(f"written: {page}")
    return 0


def choose_model(path: Path, full_size: Path | None) -> None:
    """Make a model of the full size in a folder; else choose the Local notebook's, and download it here, in sight."""
    sys.path.insert(0, str(ROOT))
    if full_size:
        from benchmarks.workload import save_random_model

        print("making random weights", flush=True)
        save_random_model(full_size, LAYERS)
        os.environ["RERANKER_MODEL"] = str(full_size)
    elif path == LOCAL:
        from huggingface_hub import hf_hub_download

        from reranker_helpers import MODEL_NAME, hub

        name = hub.choose_model(MODEL_NAME, otherwise=ROOT / "tests/stand_in_model")
        print(f"model: {name}", flush=True)
        os.environ["RERANKER_MODEL"] = name
        if name == MODEL_NAME and not hub.in_cache(name):
            hf_hub_download(name, "model.safetensors")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
