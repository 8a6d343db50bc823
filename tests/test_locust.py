"""tests/load/locustfile.py against Azure's inference server on this machine: how many answers come how soon.

test_azure_load.py checks what they say. `LOAD_SECONDS=30 pytest -n0 -s tests/test_locust.py` shows a curve worth
reading, and draws it into load.png.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_azure import InferenceServer

ROOT = Path(__file__).parent.parent
SECONDS = os.environ.get("LOAD_SECONDS")

# Not imported here: it replaces the sockets of the whole process.
pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed")


def load(steps: str, log: Path, plot: Path, **environment: str) -> tuple[list[tuple[str, ...]], int]:
    """Return the rows of the table, and the exit status."""
    model = Path(os.environ["RERANKER_MODEL"])
    with InferenceServer(ROOT, ROOT / "azureml" / "score.py", model, environment, log) as server:
        command = [sys.executable, "-m", "locust", "-f", "tests/load/locustfile.py", "--headless", "--only-summary"]
        command += ["--host", server.url.removesuffix("/score"), "--steps", steps, "--seconds", SECONDS or "4"]
        command += ["--documents", "3", "--curve", str(plot)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(run.stdout[run.stdout.rindex("\nusers") :])
    return re.findall(r"^ +(\d+) +([\d.]+) +(nan|\d+) +(nan|\d+) +(\d+)%$", run.stdout, re.M), run.returncode


def test_more_users_wait_longer(tmp_path):
    plot = Path("load.png" if SECONDS else tmp_path / "load.png").resolve()
    rows, status = load("1,2,4,8" if SECONDS else "1,4", tmp_path / "log.txt", plot)
    assert status == 0
    assert [users for users, *_ in rows] == (["1", "2", "4", "8"] if SECONDS else ["1", "4"])
    assert all(float(rate) > 0 and failed == "0" for _, rate, _, _, failed in rows)
    assert int(rows[0][2]) < int(rows[-1][2]), "the server answers one request at a time"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_refused_requests_are_no_throughput(tmp_path):
    rows, status = load("2", tmp_path / "log.txt", tmp_path / "load.png", RERANKER_MAX_DOCUMENTS="2")
    assert rows == [("2", "0.00", "nan", "nan", "100")]
    assert status == 1
