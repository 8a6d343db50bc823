"""The contrast set: nothing but the one thing that differs tells which of two documents answers."""

import json
import re
from collections import Counter
from pathlib import Path

PATH = Path(__file__).resolve().parent / "data/contrast/queries.jsonl"
ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


def test_each_question_has_two_documents_of_which_one_answers():
    assert len(ROWS) == 72
    assert all(len(row["documents"]) == 2 and row["relevant"] in ([0], [1]) for row in ROWS)
    texts = [text for row in ROWS for text in (row["query"], *row["documents"])]
    assert len(set(texts)) == len(texts)


def test_kinds_languages_and_halves_have_the_same_size():
    assert set(Counter(row["kind"] for row in ROWS).values()) == {9}
    languages = Counter(row["language"] for row in ROWS)
    assert languages == {"en": 16, "de": 16, "fr": 16, "es": 16, "it": 2, "pt": 2, "ru": 2, "zh": 2}
    large = Counter((row["kind"], row["language"], row["kept"]) for row in ROWS if languages[row["language"]] > 2)
    assert set(large.values()) == {1}
    assert sum(row["kept"] for row in ROWS) == 36


def test_neither_place_nor_length_nor_the_questions_words_give_the_answer_away():
    assert sum(row["relevant"] == [0] for row in ROWS) == 36
    longer, shared = [], []
    for row in ROWS:
        (right,) = row["relevant"]
        documents = row["documents"][right], row["documents"][1 - right]
        longer.append(len(documents[0]) - len(documents[1]))
        counts = [len({*words(row["query"])} & {*words(text)}) for text in documents]
        shared.append(counts[0] - counts[1])
    for differences in (longer, shared):
        assert abs(sum(x > 0 for x in differences) - sum(x < 0 for x in differences)) <= 6
