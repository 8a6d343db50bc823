"""Run the notebooks top to bottom and store what they print: `python tests/refresh_notebooks.py [NOTEBOOK ...]`.

The plot for README.md is stored, too. They run on the stand-in model, or on the one that RERANKER_MODEL names. Nothing
is stored that another processor would print differently, as far as `check` can tell.
"""

import base64
import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

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
    execute(notebook, path.parent, timeout=600, record_timing=False, store_widget_state=False)
    notebook.metadata = nbformat.from_dict(METADATA)
    new = path.with_suffix(".new.ipynb")  # beside it, because it looks for the repository from where it is
    try:
        nbformat.write(notebook, new)
        check(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    for cell in notebook.cells:
        if cell.id == "retrieval-plot":
            PICTURE.write_bytes(picture(cell))


def check(path: Path) -> None:
    """Compare a notebook's outputs, as nbval does in CI, with those of a run on one thread with noise on each logit.

    Raises SystemExit, after nbval has shown the cells that print something else: they need an example with a margin, or
    should print less.
    """
    noisy = {"PYTHONPATH": str(ROOT / "tests" / "noise"), "RERANKER_NOISE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", path]
    if subprocess.run(command, cwd=ROOT, env=os.environ | noisy, check=False).returncode:
        raise SystemExit("not stored: the cells above print something else when logits change by 0.0001")


def execute(notebook: nbformat.NotebookNode, folder: Path, **settings) -> None:
    """Execute a notebook in `folder`, in place, and print a line for each chapter with a dot for each cell.

    `settings` are NotebookClient's. Raises its CellExecutionError or DeadKernelError; cells that were not reached then
    have no outputs.
    """
    heading, cells = "Start", []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cells.append((heading, index))
            cell.outputs, cell.execution_count = [], None
        elif cell.source.startswith("## "):
            heading = cell.source.splitlines()[0].removeprefix("## ")
    client = NotebookClient(
        notebook,
        coalesce_streams=True,  # leaves only the last state of a progress bar
        extra_arguments=["--log-level=ERROR"],  # the kernel warns of its own way to talk to this process
        resources={"metadata": {"path": str(folder)}},
        **settings,
    )
    start, done = time.perf_counter(), 0
    with client.setup_kernel():
        for heading, chapter in groupby(cells, key=lambda cell: cell[0]):
            print(f"[{done + 1}/{len(cells)}] {heading} ", end="", flush=True)
            chapter_start = time.perf_counter()
            for _, index in chapter:
                done += 1
                try:
                    client.execute_cell(notebook.cells[index], index, execution_count=done)
                except DeadKernelError as error:
                    message = "The kernel died, perhaps for lack of memory, in this cell:"
                    raise DeadKernelError(f"{message}\n\n{notebook.cells[index].source}") from error
                print(".", end="", flush=True)
            now = time.perf_counter()
            print(f" {now - chapter_start:.1f} s ({now - start:.0f} s since the start)", flush=True)
        status = Path(f"/proc/{client.km.provisioner.pid}/status")
        if status.exists():  # Linux
            peak = next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
            print(f"peak memory: {peak / 1e6:.2f} GB; the model's file counts once for each copy loaded")
        client.set_widgets_metadata()


def picture(cell: nbformat.NotebookNode) -> bytes:
    """Return the PNG that a cell shows."""
    return base64.b64decode(next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})))


if __name__ == "__main__":
    if not os.environ.get("RERANKER_MODEL", "").strip():
        os.environ["RERANKER_MODEL"] = str(ROOT / "tests" / "stand_in_model")
    for notebook_path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(ROOT.glob("*.ipynb")):
        print(notebook_path.name)
        refresh(notebook_path)
