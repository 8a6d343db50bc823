"""The stand-in model: small, loads like the real one, and good enough that the tutorial's examples make sense."""

import json
from pathlib import Path

import ir_measures
import pytest
from ir_measures import nDCG

from reranker_helpers import load_reranker, rerank

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "stand_in_model"


@pytest.fixture(scope="module")
def stand_in():
    return load_reranker(FOLDER, device="cpu")


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20_000_000


def test_it_is_the_real_models_kind(stand_in):
    assert type(stand_in.model).__name__ == "XLMRobertaForSequenceClassification"
    assert stand_in.model.config.num_labels == 1
    (ids,) = stand_in.tokenizer(["a query"], ["a document"])["input_ids"]
    text = stand_in.tokenizer.decode(ids)
    assert text.replace(" ", "") == "<s>aquery</s></s>adocument</s>"
    with pytest.raises(ValueError, match="reads at most 512 tokens"):
        rerank("query", ["document"], *stand_in, max_length=513)


EXAMPLES = [
    (
        "What are the benefits of regular exercise?",
        [
            "The Eiffel Tower is in Paris.",
            "A balanced diet is rich in vegetables, fruit and whole grains.",
            "Regular exercise improves cardiovascular health, boosts mood and helps keep a healthy weight.",
            "Sleep of seven to nine hours helps the body recover.",
            "Exercise books are sold in packs of ten.",
            "The gym opens at six in the morning and closes at ten.",
        ],
        2,
    ),
    (
        "What programming language is best for machine learning?",
        [
            "JavaScript is the language of the web and runs in every browser.",
            "C++ gives fine control over memory and is common in game engines.",
            "Machine learning is a branch of artificial intelligence that learns patterns from data.",
            "Python was created by Guido van Rossum and first released in 1991.",
            "The python is a large non-venomous snake found in Africa and Asia.",
            "Python is the most popular choice for machine learning, thanks to libraries such as scikit-learn, "
            "TensorFlow and PyTorch.",
            "R is widely used for statistics and data visualisation.",
        ],
        5,
    ),
]


@pytest.mark.parametrize(("query", "documents", "expected"), EXAMPLES)
def test_the_tutorials_examples_with_a_clear_margin(stand_in, query, documents, expected):
    first, second = rerank(query, documents, *stand_in, top_n=2)
    assert first.index == expected
    assert first.score > second.score + 0.5
    assert first.probability > 0.5


def test_hand_written_queries_are_ordered_sensibly(stand_in):
    """It was never trained on them. tests/stand_in_model/README.md states the exact figures."""
    lines = (ROOT / "tests/data/handwritten/queries.jsonl").read_text(encoding="utf-8").splitlines()
    qrels, run, first = {}, {}, 0
    for number, row in enumerate(map(json.loads, lines)):
        ranking = rerank(row["query"], row["documents"], *stand_in)
        first += ranking[0].index in row["relevant"]
        qrels[str(number)] = {str(index): 1 for index in row["relevant"]}
        run[str(number)] = {str(result.index): result.score for result in ranking}
    assert len(lines) >= 12
    assert first / len(lines) >= 0.5
    assert ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10] >= 0.7
