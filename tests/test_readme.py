"""README.md promises: its code runs and prints what it says, its links and tables fit the files."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import refresh_notebooks

import reranker_helpers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", *sorted(ROOT.glob("tests/*/**/README.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_python_prints_what_it_says():
    (code,), (output,) = blocks("python"), blocks("text")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == output


def test_ci_runs_the_same_test_command():
    command = blocks("bash")[1].strip().split(" && ")[-1]
    assert command == "../reranker-venv/bin/pytest"
    assert '"$venv/bin/pytest"' in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            file, _, heading = link.partition("#")
            target = document.parent / file if file else document
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (
                link
            )


def test_the_table_lists_the_notebooks():
    assert re.findall(r"^\| \[(\w+\.ipynb)\]\(\1\)", README, re.M) == sorted(p.name for p in ROOT.glob("*.ipynb"))[::-1]


def test_the_picture_is_the_notebooks_plot():
    notebook = nbformat.read(ROOT / "BGE_Reranker_Local.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.id == "retrieval-plot"]
    assert refresh_notebooks.PICTURE.read_bytes() == refresh_notebooks.picture(cell)


@pytest.mark.parametrize("name", ["load_reranker", "rerank", "score"])
def test_signatures(name):
    parameters = inspect.signature(getattr(reranker_helpers, name)).parameters.values()
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        default = parameter.default
        shown.append(
            parameter.name if default is parameter.empty else f"{parameter.name}={default!r}".replace("'", '"')
        )
    assert f"| `{name}({', '.join(shown)})`" in README


HELPERS = sorted((ROOT / "reranker_helpers").glob("*.py"))


@pytest.mark.parametrize("path", HELPERS, ids=lambda path: path.stem)
def test_each_error_message_has_its_remedy(path):
    troubleshooting = README.partition("## Troubleshooting")[2].partition("## ")[0]
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    for call in [node for node in raised if isinstance(node, ast.Call) and node.args]:
        texts = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
        clauses = [clause.strip() for text in texts for clause in re.split("[:,]", text)]
        assert not texts or any(len(clause) >= 12 and clause in troubleshooting for clause in clauses), clauses


def test_numbers_are_the_codes():
    cpu, packed, cuda = (reranker_helpers.BATCH_TOKENS[name] for name in ("cpu", "packed", "cuda"))
    assert f"default {packed} on a CPU ({cpu} for other models than XLM-RoBERTa), {cuda:,} on CUDA" in README


def test_requirements_are_what_is_imported():
    """A package that nothing imports is a download for nothing; one that is missing breaks on a new machine."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].replace("-", "_").lower() for line in lines if line and line[0] not in "#"}
    assert all("==" in line for line in lines if line and line[0] not in "#")
    sources = [path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for path in ROOT.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        sources += [cell.source for cell in cells if cell.cell_type == "code"]
    imported = set()
    for source in sources:
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M))
    commands, dotted = {"jupyter", "nbval", "pytest_xdist", "ruff"}, {"azure_ai_ml", "azure_identity"}
    assert not pinned - commands - dotted - imported
