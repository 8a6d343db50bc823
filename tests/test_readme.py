"""What README.md and TROUBLESHOOTING.md promise: code prints what they say, tables, links and messages are true."""

import ast
import functools
import inspect
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import refresh_notebooks

import reranker_helpers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (ROOT / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", *sorted(ROOT.glob("tests/*/**/README.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": "tests/noise", "RERANKER_NOISE": "1"}])
def test_python_prints_what_it_says(settled, environment):
    (code,), (output,) = blocks("python"), blocks("text")
    environment = os.environ | environment
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert settled(run.stdout, output) == output


def test_the_service_answers_as_shown(tmp_path):
    """The two commands as they stand there, the first in a terminal of its own."""
    serve, ask = [
        block.replace("../reranker-venv/bin/", f"{Path(sys.executable).parent}/") for block in blocks("bash")[-2:]
    ]
    (answer,) = blocks("json")
    with socket.socket() as port:
        if port.connect_ex(("127.0.0.1", 5001)) == 0:
            pytest.skip("another program uses port 5001")
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(["bash", "-c", serve], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        run = subprocess.run(
            ["bash", "-c", ask.replace("curl", "curl --silent --retry 60 --retry-delay 1 --retry-connrefused")],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    found, shown = json.loads(run.stdout), json.loads(answer)
    for result, expected in zip(found["results"], shown["results"], strict=True):
        assert result == {name: pytest.approx(value, abs=0.002) for name, value in expected.items()}
    assert found | {"results": 0} == shown | {"results": 0}


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
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    for call in [node for node in raised if isinstance(node, ast.Call) and node.args]:
        texts = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
        clauses = [clause.strip() for text in texts for clause in re.split("[:,]", text)]
        assert not texts or any(len(clause) >= 12 and clause in TROUBLESHOOTING for clause in clauses), clauses


ANY = "\0"
"""What a string has for a value that is filled in, and a message for `...`."""


def strings(path: Path) -> list[str]:
    """The strings of a module, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            found.append(re.sub(r"%(s|d|\.\df)", ANY, node.value))
    return found


def can_say(string: str, message: str) -> bool:
    """Whether the message is a part of what the string becomes when values without spaces are filled in."""

    @functools.cache
    def own(i: int, j: int) -> float:
        """Of the ways to say message[i:] by string[j:], the most characters that were not filled in."""
        if i == len(message):
            return 0
        if j == len(string):
            return -math.inf
        if ANY in (message[i], string[j]):
            return max(own(i, j + 1), own(i + 1, j) if message[i] != " " else -math.inf)
        return 1 + own(i + 1, j + 1) if message[i] == string[j] else -math.inf

    return max(map(own, [0] * len(string), range(len(string))), default=0) >= min(12, len(message))


AZURES = [
    "ImageBuildFailure",
    "KeyBasedAuthenticationNotPermitted",
    "Liveness probe failed",
    "MissingSubscriptionRegistration",
    "OutOfQuota",
]
"""What only Azure itself says: learn.microsoft.com/azure/machine-learning/how-to-troubleshoot-online-endpoints."""


@pytest.fixture(scope="module")
def sources() -> list[str]:
    files = [*ROOT.glob("reranker_helpers/*.py"), *ROOT.glob("azureml*/*.py"), *ROOT.glob("tests/fake_azure/*.py")]
    found = [string for path in [*files, ROOT / "tests/refresh_notebooks.py"] for string in strings(path)]
    for path in ROOT.glob("*.ipynb"):
        found += [line for cell in nbformat.read(path, as_version=4).cells for line in cell.source.splitlines()]
    return [*found, *AZURES]


def symptoms(document: str) -> list[str]:
    """The messages in the left column of the tables of symptoms."""
    tables = re.findall(r"^\| symptom \| remedy \|\n\|---\|---\|\n((?:\|.*\n)+)", document, re.M)
    left = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return [message for cell in left for message in re.findall("`(.+?)`", cell)]


@pytest.mark.parametrize("message", sorted({*symptoms(README), *symptoms(TROUBLESHOOTING)}))
def test_messages_are_the_codes(message, sources):
    message = message.replace("...", ANY).strip(ANY)
    pieces = [message[i : i + 5] for i in range(max(1, len(message) - 4))]
    likely = [string for string in sources if any(piece in string for piece in pieces)]
    assert any(can_say(string, message) for string in likely)


def test_the_commonest_troubles_are_told_alike():
    rows = re.findall(r"^\| .+ \|$", README.partition("## Troubleshooting")[2].partition("## ")[0], re.M)
    assert len(rows) == 10 + 1
    assert {*rows} <= {*TROUBLESHOOTING.splitlines()}


def results(name: str) -> dict[str, dict]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["variants"]


def times_as_fast(variants: dict[str, dict], fast: str, slow: str) -> str:
    seconds = [statistics.median(variants[name]["seconds"]) for name in (slow, fast)]
    return f"{seconds[0] / seconds[1]:.1f}"


def test_the_table_of_speeds_is_what_was_measured():
    header = "| | numbers | documents/s | times as fast as CrossEncoder | peak memory |\n|---|---|---|---|---|\n"
    before, rows = README.split(header)
    variants = results(re.findall(r"benchmarks/results/([\w-]+)\.md", before)[-1])
    rows = rows.partition("\n\n")[0].splitlines()
    assert len(rows) == 7
    for row in rows:
        name, numbers = re.match(r"\| ([\w ]+) \| (\w+) \|", row).groups()
        name += f" {numbers}" * (numbers != "float32")
        speed, memory = variants[name]["documents_per_second"], variants[name]["peak_mb"] / 1000
        ratio = times_as_fast(variants, name, "CrossEncoder")
        assert row.endswith(f"| {numbers} | {speed:.2f} | {ratio} | {memory:.1f} GB |")


def test_claims_of_speed_are_what_was_measured():
    text = " ".join(README.split())
    here, older = results("full-cpu-avx512"), {name: results(f"full-cpu-{name}") for name in ("avx-vnni", "avx2")}
    exact = [name for name in here if not name.endswith(("int8", "bfloat16", "auto", "int8 then float32"))]
    assert (len(here), len(exact)) == (15, 7)
    assert "lists all fifteen variants" in text
    assert "Of all variants `rerank` in int8 was the fastest, and of the seven in float32 `rerank`" in text
    for name, others in [("rerank int8", list(here)), ("rerank", exact)]:
        assert name == max(others, key=lambda other: here[other]["documents_per_second"])
    assert here["rerank"]["largest_difference"] < 1e-4
    moved = [f"{here[name]['largest_difference']:.2f}" for name in ("rerank bfloat16", "rerank int8", "OpenVINO int8")]
    assert f"bfloat16 moved logits by up to {moved[0]}, `rerank`'s int8 by up to {moved[1]} and OpenVINO's" in text
    assert f"and OpenVINO's by up to {moved[2]}:" in text
    assert f"`rerank` was {times_as_fast(here, 'rerank', 'plain')} times as fast as plain Transformers here" in text
    for name, variants in older.items():
        ratio = times_as_fast(variants, "rerank", "plain")
        assert re.search(rf" {ratio} times on [^.;]*\(\[full-cpu-{name}\.md\]", text)


def test_claims_about_int8_are_what_was_measured():
    text = " ".join(README.split())
    here = results("full-cpu-avx512")
    ratios = [times_as_fast(here, "rerank int8", name) for name in ("rerank", "OpenVINO int8")]
    assert f"{ratios[0]} times as fast as `rerank` in float32 and {ratios[1]} times as fast as OpenVINO's int8" in text
    recipe = times_as_fast(here, "rerank int8 then float32", "rerank")
    assert f"scoring most documents in int8 only: {recipe} times as fast" in text
    rows = (ROOT / "benchmarks/results/int8-accuracy.md").read_text().splitlines()
    hand, faq = (
        next(row.split(" | ") for row in rows if row.startswith(name)) for name in ("| hand-written", "| Python FAQ")
    )
    lost = [[float(number) for number in re.findall(r"[+-][\d.]+", row[4])] for row in (hand, faq)]
    assert f"{lost[0][0]:.3f} on the hand-written set and {lost[1][0]:.3f} on the FAQ" in text
    assert all(low <= 0 <= high for _, low, high in lost)
    assert f"{faq[-2].replace('%', ' %')} of the FAQ's candidates had to be scored again" in text
    assert f"and int8 moved logits by up to {max(float(hand[6]), float(faq[6])):.1f}" in text


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == reranker_helpers.__version__


def test_numbers_are_the_codes():
    cpu, packed, cuda = (reranker_helpers.BATCH_TOKENS[name] for name in ("cpu", "packed", "cuda"))
    assert f"default {packed} on a CPU ({cpu} for models other than XLM-RoBERTa), {cuda:,} on CUDA" in README


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
    commands = {"jupyter", "mypy", "nbval", "pytest_xdist", "ruff", "types_tqdm"}
    dotted = {"azure_ai_ml", "azure_identity"}
    guidance = {name for name in pinned if "opentelemetry" in name}  # for pip's resolver
    assert not pinned - commands - dotted - guidance - imported


def test_the_helpers_tests_need_little():
    """CI runs them on the lowest versions too, without matplotlib, the Azure SDK and the rest of requirements.txt."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    command = re.search(r"pip install -r \.github/\${{ matrix\.versions }}\.txt\n +- run: pytest (.*)", workflow)[1]
    sources = [(ROOT / name).read_text(encoding="utf-8") for name in [*command.split(), "tests/tiny.py"]]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    used = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    brought_along = {"tokenizers", "safetensors"}  # by transformers
    installed = {*re.findall(r"^(\w+)", (ROOT / ".github/lowest.txt").read_text(), re.M)} | brought_along
    assert used - {"reranker_helpers", "tiny"} <= installed
