"""What is said in several files is the same in all of them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


@pytest.mark.parametrize(
    "path",
    files("*.md", "*.ipynb", "benchmarks/*.txt", "benchmarks/*.md", ".devcontainer/*", "azureml/*.yml"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_torch_is_the_version_that_was_tested(path):
    assert set(re.findall(r"\btorch==([\d.]+)", path.read_text(encoding="utf-8"))) <= {PINS["torch"]}


def test_ci_tries_the_lowest_versions_that_are_allowed():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tried = (ROOT / ".github/lowest.txt").read_text().splitlines()
    for name, lowest in [requirement.split(">=") for requirement in allowed if ">=" in requirement]:
        assert f"{name}=={lowest}.0" in tried


@pytest.mark.parametrize(
    "path", files("*.md", "benchmarks/*.md", ".github/workflows/*.yml"), ids=lambda path: path.name
)
def test_files_that_commands_name_exist(path):
    for name in re.findall(
        r"\b(?:tests|benchmarks|azureml|reranker_helpers)/[\w/.-]+\w", path.read_text(encoding="utf-8")
    ):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_local_notebook_gives_the_gain_that_the_stand_ins_card_gives():
    card = (ROOT / "tests/stand_in_model/README.md").read_text(encoding="utf-8")
    gain = re.search(r"difference (\+\.\d+), 95 % interval (\+\.\d+ to \+\.\d+)", card)
    notebook = (ROOT / "BGE_Reranker_Local.ipynb").read_text(encoding="utf-8")
    assert f"gain after BM25 is {gain[1]}, 95 % interval {gain[2]}" in notebook
