"""Run the notebooks top to bottom and store what they print: `python tests/refresh_notebooks.py [NOTEBOOK ...]`.

The plot for README.md is stored, too. They run on the stand-in model, or on the one that RERANKER_MODEL names.
"""

import base64
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / ".github" / "two_stage_retrieval.png"
"""The plot that README.md shows: it is the output of the Local notebook's cell `retrieval-plot`."""
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def refresh(path: Path) -> None:
    """Execute one notebook in its folder, and rewrite it without anything that differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    # coalesce_streams leaves only the last state of a progress bar.
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)
    for cell in notebook.cells:
        if cell.id == "retrieval-plot":
            PICTURE.write_bytes(picture(cell))


def picture(cell: nbformat.NotebookNode) -> bytes:
    """Return the PNG that a cell shows."""
    return base64.b64decode(next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})))


if __name__ == "__main__":
    os.environ.setdefault("RERANKER_MODEL", str(ROOT / "tests" / "stand_in_model"))
    for notebook_path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(ROOT.glob("*.ipynb")):
        print(notebook_path.name)
        refresh(notebook_path)
