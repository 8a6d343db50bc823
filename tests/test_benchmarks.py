"""The benchmark's own arithmetic, and that what it says is what it measured."""

import json
import re
from pathlib import Path

import pytest
from tiny import make_tokenizer

from benchmarks import report
from benchmarks.compare import gflop, kendall_tau
from benchmarks.variants import ON_A_GPU, VARIANTS
from benchmarks.workload import stretches, texts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_results(path):
    assert path.with_suffix(".md").read_text() == report.render(json.loads(path.read_text()), path.stem)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_no_place(path):
    """They are public: no folder, user or host of whoever ran them."""
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", path.read_text())


def test_kendall_tau():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_needed_arithmetic_counts_real_tokens():
    """One layer more costs a document of n tokens 2 * 12 * 1024 ** 2 * n, and what attention takes."""
    tokenizer = make_tokenizer()
    n = len(tokenizer("x", "panda bear")["input_ids"])
    more = gflop(tokenizer, ["panda bear"], 3) - gflop(tokenizer, ["panda bear"], 2)
    assert more * 1e9 > 2 * 12 * 1024**2 * n
    assert gflop(tokenizer, ["panda bear"] * 2, 2) == pytest.approx(2 * gflop(tokenizer, ["panda bear"], 2))


def test_the_workload_is_real_text_of_the_lengths_asked_for():
    tokenizer = make_tokenizer()
    assert [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in stretches(tokenizer, [30, 200])] == [
        pytest.approx(30, abs=3),
        pytest.approx(200, abs=3),
    ]
    assert texts(tokenizer, 20) == texts(tokenizer, 20)
    assert len(set(texts(tokenizer, 20))) == 20


def test_every_variant_says_what_it_is():
    assert set(ON_A_GPU) <= set(VARIANTS)
    assert all(load.__doc__ for load, _, _ in VARIANTS.values())
