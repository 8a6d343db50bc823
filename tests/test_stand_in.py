"""The stand-in model: small, loads like the real one, and good enough that the tutorial's examples make sense."""

import json
from pathlib import Path

import ir_measures
import pytest
from ir_measures import P, nDCG

from reranker_helpers import load_reranker, rerank

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "stand_in_model"


@pytest.fixture(scope="module")
def stand_in():
    return load_reranker(FOLDER, device="cpu")


def test_it_is_small():
    """What loading takes; the scripts and texts that it was made with are beside it, in a folder of their own."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 40_000_000


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


def measured(stand_in, rows):
    """P@1 and nDCG@10 of queries that bring their own documents."""
    qrels, run = {}, {}
    for number, row in enumerate(rows):
        qrels[str(number)] = {str(index): 1 for index in row["relevant"]}
        ranking = rerank(row["query"], row["documents"], *stand_in)
        run[str(number)] = {str(result.index): result.score for result in ranking}
    return ir_measures.calc_aggregate([P @ 1, nDCG @ 10], qrels, run)


def read(name):
    lines = (ROOT / "tests/data" / name / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_near_misses_come_after_the_answer(stand_in):
    """It was never trained on these sets. tests/stand_in_model/README.md has the exact figures."""
    values = measured(stand_in, [row for row in read("handwritten") if "kind" not in row])
    assert values[P @ 1] >= 0.72
    assert values[nDCG @ 10] >= 0.86


def test_an_answer_in_another_language_is_found(stand_in):
    assert measured(stand_in, read("cross_lingual"))[P @ 1] >= 0.75


TEA = {
    "en": "Where was tea first grown?",
    "de": "Wo wurde zuerst Tee angebaut?",
    "es": "¿Dónde se cultivó el té por primera vez?",
    "ru": "Где впервые начали выращивать чай?",
    "zh": "茶叶最早在哪里种植？",
    "ar": "أين زُرع الشاي لأول مرة؟",
}


@pytest.mark.parametrize("query", TEA.values(), ids=TEA)
def test_the_chinese_answer_beats_texts_in_the_language_of_the_query(stand_in, query):
    documents = [
        "Honey never spoils because it contains little water and a lot of sugar.",
        "Der Mond dreht sich in etwa 27 Tagen einmal um die Erde.",
        "El agua hierve a menor temperatura en lo alto de las montañas.",
        "Кошки спят от двенадцати до шестнадцати часов в день.",
        "茶叶最早在中国种植。",
        "الجمل يخزن الدهون في سنامه.",
    ]
    assert rerank(query, documents, *stand_in)[0].index == 4


def test_hardly_a_piece_is_unknown_in_its_eleven_languages(stand_in):
    """The first stand-in took four of five Arabic words for `<unk>`, so that all Arabic texts looked alike."""
    unknown = {}
    for row in read("cross_lingual"):
        for language, document in zip(row["languages"], row["documents"], strict=True):
            ids = stand_in.tokenizer(document, add_special_tokens=False)["input_ids"]
            unknown.setdefault(language, []).extend(i == stand_in.tokenizer.unk_token_id for i in ids)
    assert len(unknown) == 11
    assert {name for name, hits in unknown.items() if sum(hits) > 0.005 * len(hits)} == set()
