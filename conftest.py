"""Settings that must hold for the notebooks too, which pytest runs from this folder."""

import os
from pathlib import Path

ROOT = Path(__file__).parent

# Tests compare what the notebooks print with what they have stored, and that comes from the stand-in.
os.environ.setdefault("RERANKER_MODEL", str(ROOT / "tests" / "stand_in_model"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes that each want all cores wait for each other in busy loops, and are ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
