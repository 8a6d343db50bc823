"""The benchmark's own arithmetic, and that what it says is what it measured."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from tiny import make_tokenizer
from transformers import XLMRobertaConfig

from benchmarks import ablation, accuracy, compare, report
from benchmarks.compare import gflop, kendall_tau
from benchmarks.variants import top_n_in_float32
from benchmarks.workload import stretches, texts
from reranker_helpers import scoring

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_results(path):
    assert path.with_suffix(".md").read_text() == report.render(json.loads(path.read_text()), path.stem)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_no_place(path):
    """They are public: no folder, user or host of whoever ran them."""
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", path.read_text())


def test_the_processors_flags_include_amx(monkeypatch, tmp_path):
    """They decide which dtype is the fastest."""
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Xeon\nflags\t\t: fpu sse avx avx2 avx512_fp16 amx_bf16 amx_tile amx_int8 amx_fp16\n")
    monkeypatch.setattr(compare, "Path", lambda _: file)
    found = compare.machine("cpu")["instructions"]
    assert found == ["avx2", "avx512_fp16", "amx_bf16", "amx_tile", "amx_int8", "amx_fp16"]


def test_kendall_tau():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_needed_arithmetic_counts_real_tokens():
    """One layer more costs a document of n tokens 2 * 12 * 1024 ** 2 * n, and what attention takes."""
    two, three = (
        XLMRobertaConfig(num_hidden_layers=layers, hidden_size=1024, intermediate_size=4096) for layers in (2, 3)
    )
    more = gflop([100], three) - gflop([100], two)
    assert more * 1e9 == pytest.approx(2 * 12 * 1024**2 * 100 + 4 * 1024 * 100**2)
    assert gflop([100, 100], two) == pytest.approx(2 * gflop([100], two))


def test_the_workload_is_real_text_of_the_lengths_asked_for():
    tokenizer = make_tokenizer()
    assert [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in stretches(tokenizer, [30, 200])] == [
        pytest.approx(30, abs=3),
        pytest.approx(200, abs=3),
    ]
    assert texts(tokenizer, 20) == texts(tokenizer, 20)
    assert len(set(texts(tokenizer, 20))) == 20


def options_for(monkeypatch, tiny_folder, tmp_path, *arguments: str):
    given = ["--model", str(tiny_folder), "--documents", "4", "--rounds", "1", "--out", str(tmp_path / "tiny")]
    monkeypatch.setattr(sys, "argv", ["", *given, *arguments])
    return compare.parse()


def test_a_comparison(monkeypatch, tiny_folder, tmp_path):
    """One variant that works, beside plain, and one whose environment is broken."""
    arguments = "--backends", "false", "--variants", "plain", "rerank", "OpenVINO"
    compare.main(options_for(monkeypatch, tiny_folder, tmp_path, *arguments))
    text = (tmp_path / "tiny.json").read_text()
    result = json.loads(text)
    assert result["variants"]["rerank"]["largest_difference"] < 1e-4
    assert result["variants"]["rerank"]["kendall_tau"] == 1
    assert result["variants"]["plain"]["peak_mb"] > 50 or sys.platform != "linux"
    assert len(result["variants"]["plain"]["seconds"]) == 1
    assert str(tmp_path) not in text
    table = (tmp_path / "tiny.md").read_text()
    assert table == report.render(result, "tiny")
    assert "| rerank | " in table
    assert "- OpenVINO could not be run: exit status 1" in table
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_an_ablation(monkeypatch, tiny_folder, tmp_path):
    """Its changes are made to names inside the packed path, and must all be undone."""
    budgets = dict(scoring.BATCH_TOKENS)
    ablation.main(options_for(monkeypatch, tiny_folder, tmp_path))
    table = (tmp_path / "ablation.md").read_text()
    times = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", table, re.M))
    assert times["the packed path"] == "1.00"
    assert {"the last layer for all tokens", "padded, budget 256", "oneDNN's with prepacked weights"} <= set(times)
    assert budgets == scoring.BATCH_TOKENS


def test_the_accuracy_of_a_model_against_itself(tiny):
    queries = accuracy.handwritten()
    row = accuracy.row("itself", queries, tiny, tiny, 512)
    assert "| +0.0000 (+0.0000 to +0.0000) | 1.000 | 0.00 |" in row
    assert row.endswith(f"| 0% | {len(queries)} of {len(queries)} |")


def test_candidates_of_the_faq_hold_the_answers_that_bm25_finds():
    queries = accuracy.python_faq()
    assert {len(set(documents)) for _, documents, _ in queries} == {50}
    assert sum(bool(relevant & set(documents)) for _, documents, relevant in queries) > 0.8 * len(queries)


def test_the_top_of_float32_from_int8():
    generator = random.Random(0)
    exact = [generator.gauss(0, 1) for _ in range(100)]
    near = [logit + generator.uniform(-0.2, 0.2) for logit in exact]
    scored = []

    def score_exactly(places):
        scored.extend(places)
        return [exact[place] for place in places]

    mixed = top_n_in_float32(list(range(100)), 10, lambda _: near.copy(), score_exactly)
    assert accuracy.best(mixed) == accuracy.best(exact)
    assert len(set(scored)) == len(scored) < 50
    assert [mixed[place] for place in scored] == [exact[place] for place in scored]
