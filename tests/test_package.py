"""The package as others get it: built, installed where nothing else of this repository is, and used from elsewhere."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import reranker_helpers

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys, importlib.metadata, reranker_helpers
from reranker_helpers import load_reranker, rerank

reranker = load_reranker(sys.argv[1], device="cpu")
print(reranker_helpers.__file__)
print(importlib.metadata.version("reranker_helpers"))
print(rerank("what is a panda?", ["Hi!", "The panda is a bear."], *reranker)[0].document)
"""


def test_the_wheel_reranks_from_another_folder(tmp_path):
    source, environment, elsewhere = tmp_path / "source", tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A copy, because a build leaves folders behind.
    shutil.copytree(ROOT / "reranker_helpers", source / "reranker_helpers")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Without isolation nothing is downloaded: setuptools is there, since torch needs it.
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(environment, symlinks=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel], check=True)
    (packages / "torch_and_transformers.pth").write_text(sysconfig.get_path("purelib"))
    python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"
    run = subprocess.run(
        [python, "-I", "-c", CODE, ROOT / "tests/stand_in_model"],
        cwd=elsewhere,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    file, version, best = run.stdout.splitlines()
    assert Path(file) == packages / "reranker_helpers/__init__.py"
    assert version == reranker_helpers.__version__
    assert best == "The panda is a bear."
    assert (packages / "reranker_helpers/py.typed").exists()


def test_what_is_imported_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    sources = [path.read_text() for path in (ROOT / "reranker_helpers").glob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    used = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert used == {requirement.partition(">=")[0] for requirement in declared}
