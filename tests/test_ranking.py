"""`rerank`: the order, what each result carries, long documents, and errors that name the document."""

import copy
from dataclasses import FrozenInstanceError, dataclass
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny import QUERY, WORDS, Column, KeywordModel, plain_score

from reranker_helpers import rerank

DOCUMENTS = ["the bear lives in forests of china", "bread", "", "panda", "it eats bamboo and bread", "moon"]


def counting(tiny, word: str) -> KeywordModel:
    """A model whose logit says how often the word stands in the pair."""
    (token,) = tiny.tokenizer(word, add_special_tokens=False)["input_ids"]
    return KeywordModel(token)


def test_best_first_as_in_a_plain_loop(tiny):
    expected = {document: plain_score(QUERY, document, tiny.model, tiny.tokenizer) for document in DOCUMENTS}
    ranking = rerank(QUERY, DOCUMENTS, *tiny)
    assert [result.document for result in ranking] == sorted(DOCUMENTS, key=expected.__getitem__, reverse=True)
    for document, score in ranking:
        assert score == pytest.approx(expected[document], abs=1e-4)


def test_the_tutorials_call(tiny):
    model, tokenizer, device = tiny
    ((document, score),) = rerank(QUERY, ["panda"], model, tokenizer, device, 3)
    assert (document, type(score)) == ("panda", float)


def test_a_result_says_where_it_comes_from(tiny):
    for result in rerank(QUERY, DOCUMENTS, *tiny):
        assert result.document is DOCUMENTS[result.index]
        assert not result.truncated
        assert result.document[slice(*result.passage)] == result.document
        assert result.probability == torch.tensor(result.score).sigmoid().item()


def test_results_cannot_be_changed(tiny):
    (result,) = rerank(QUERY, ["panda"], *tiny)
    with pytest.raises(FrozenInstanceError):
        result.score = 1.0


def test_ties_keep_the_input_order(tiny):
    documents = ["bear", "panda bread", "oven", "panda moon", "panda", "bear"]
    ranking = rerank("law", documents, counting(tiny, "panda"), tiny.tokenizer, "cpu")
    assert [result.index for result in ranking] == [1, 3, 4, 0, 2, 5]


def test_duplicates_all_come_back_side_by_side(tiny):
    ranking = rerank(QUERY, ["panda", "bread", "panda", "panda"], *tiny)
    places = [result.index for result in ranking if result.document == "panda"]
    assert places == [0, 2, 3]
    assert len({result.score for result in ranking}) == 2


@pytest.mark.parametrize(("top_n", "count"), [(None, 6), (1, 1), (4, 4), (6, 6), (99, 6)])
def test_top_n(tiny, top_n, count):
    assert rerank(QUERY, DOCUMENTS, *tiny, top_n=top_n) == rerank(QUERY, DOCUMENTS, *tiny)[:count]


@pytest.mark.parametrize("top_n", [0, -1])
def test_top_n_below_one_is_an_error(tiny, top_n):
    """0 means "none" to Python, "all" to some servers, and a slice up to -1 would drop the last document."""
    with pytest.raises(ValueError, match=f"top_n is {top_n}, expected at least 1"):
        rerank(QUERY, DOCUMENTS, *tiny, top_n=top_n)


def test_none_one_and_empty_documents(tiny):
    assert rerank(QUERY, [], *tiny) == []
    (result,) = rerank(QUERY, [""], *tiny)
    assert result.score == pytest.approx(plain_score(QUERY, "", tiny.model, tiny.tokenizer), abs=1e-4)
    assert (result.passage, result.truncated) == ((0, 0), False)


@dataclass
class Page:
    title: str
    text: str


def test_key_takes_the_text_and_the_object_comes_back(tiny):
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    pages = [Page("page", text) for text in DOCUMENTS]
    before = copy.deepcopy((rows, pages))
    expected = [result.index for result in rerank(QUERY, DOCUMENTS, *tiny)]
    ranked_rows = rerank(QUERY, rows, *tiny, key=lambda row: row["text"])
    ranked_pages = rerank(QUERY, pages, *tiny, key=lambda page: page.text)
    assert [result.document["id"] for result in ranked_rows] == expected
    assert [result.document for result in ranked_pages] == [pages[i] for i in expected]
    assert all(result.document is pages[result.index] for result in ranked_pages)
    assert (rows, pages) == before


def test_truncation_is_reported_only_where_it_happens(tiny):
    def words(count: int) -> str:
        return " ".join((WORDS * 20)[:count])

    tokens = len(tiny.tokenizer(words(20), add_special_tokens=False)["input_ids"])
    query_tokens = len(tiny.tokenizer(QUERY, add_special_tokens=False)["input_ids"])
    exact_fit = tokens + query_tokens + 4
    documents = [words(10), words(20), words(200)]
    fits = {r.index: r for r in rerank(QUERY, documents, *tiny, max_length=exact_fit)}
    assert [fits[i].truncated for i in range(3)] == [False, False, True]
    assert documents[2][slice(*fits[2].passage)] == words(20)
    assert fits[1].tokens == fits[2].tokens == exact_fit
    assert fits[0].tokens < exact_fit
    one_less = {r.index: r for r in rerank(QUERY, documents, *tiny, max_length=exact_fit - 1)}
    assert [one_less[i].truncated for i in range(3)] == [False, True, True]


def test_maxp_finds_an_answer_at_the_end(tiny):
    """Truncation cannot see it; that a ranking "made no sense" because of it is a frequent complaint."""
    model = counting(tiny, "panda")
    long = "bread oven flour " * 200 + "moon panda star"
    documents = ["the panda", long, "bread"]
    cut = rerank("law", documents, model, tiny.tokenizer, "cpu", max_length=64)
    assert [result.index for result in cut] == [0, 1, 2]
    assert [result.truncated for result in cut] == [False, True, False]
    best = rerank("law", [*documents, long + " panda"], model, tiny.tokenizer, "cpu", max_length=64, stride=16)
    assert [result.index for result in best] == [3, 0, 1, 2]
    assert best[0].score == 2
    assert not any(result.truncated for result in best)
    assert all("panda" in result.document[slice(*result.passage)] for result in best[:3])
    assert best[2].passage[1] == len(long)
    read = {result.index: result.tokens for result in best}
    assert read[2] == len(tiny.tokenizer("law", "bread")["input_ids"])
    assert read[1] > len(tiny.tokenizer("law", long)["input_ids"])  # the query and the overlaps again in each window


ACCENTS = "cafe\u0301 pan\u0303da n\u0303u "
EMOJI = "bread 👩🏽‍🍳 moon 🐼 ﬁsh "


@pytest.mark.parametrize("filler", ["river moon star ", ACCENTS + EMOJI + "熊猫 吃竹子 "])
@pytest.mark.parametrize("stride", [0, 5, 20])
def test_windows_cover_every_token_and_spans_are_exact(tiny, filler, stride):
    """Spans count characters of the text as it was passed in, also where the tokenizer normalises it. tokenizers 0.23.1
    and 0.23.2 lose most of the windows that they cut themselves (huggingface/tokenizers#2091)."""
    before, after = filler * 30, filler * 30
    text = before + "panda guitar" + after
    model = counting(tiny, "guitar").tried(tiny.tokenizer)
    (result,) = rerank("law", [text], model, tiny.tokenizer, "cpu", max_length=40, stride=stride)
    passage = text[slice(*result.passage)]
    assert "guitar" in passage
    assert len(passage) < len(text) / 2

    tokens = tiny.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    query = tiny.tokenizer("law", add_special_tokens=False)["input_ids"]
    longest_first = [row[row != 1].tolist() for batch in model.batches for row in batch]
    windows = [row[len(query) + 3 : -1] for row in longest_first]
    room = 40 - 4 - len(query)
    step = room - stride
    starts = range(0, max(1, len(tokens) - stride), step)
    assert sorted(windows) == sorted(tokens[start : start + room] for start in starts)
    assert starts[-1] + room >= len(tokens)


def test_a_tokenizer_that_cuts_unasked_is_noticed(tiny):
    """Whatever the next fault of a tokenizer is, it must not become a wrong ranking."""

    class Cutting(type(tiny.tokenizer)):
        def __call__(self, *texts, **options):
            encoded = super().__call__(*texts, **options)
            for encoding in encoded.encodings:
                encoding.truncate(8)
            return encoded

    tiny.tokenizer.__class__ = Cutting
    for stride in (None, 2):
        with pytest.raises(RuntimeError, match="the tokenizer lost a part of a document"):
            rerank("law", ["bread oven river moon " * 10], *tiny, max_length=20, stride=stride)


def test_stride_does_not_change_documents_that_fit(tiny):
    plain, windows = rerank(QUERY, DOCUMENTS, *tiny), rerank(QUERY, DOCUMENTS, *tiny, max_length=100, stride=10)
    assert [(r.index, r.passage) for r in plain] == [(r.index, r.passage) for r in windows]


def test_stride_must_leave_progress(tiny):
    """The tokenizer would panic with an exception that `except Exception` does not catch."""
    with pytest.raises(ValueError, match="stride is 12, but beside the query a window holds 12 tokens"):
        rerank(QUERY, DOCUMENTS, *tiny, max_length=20, stride=12)
    with pytest.raises(ValueError, match="stride is -1, expected at least 0"):
        rerank(QUERY, DOCUMENTS, *tiny, stride=-1)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["a", "b", "c", None], r"documents\[3\] is NoneType, expected str"),
        (["a", 7], r"documents\[1\] is int, expected str, or pass key="),
        ([{"text": "a"}], r"documents\[0\] is dict, expected str, or pass key="),
        ("panda", "documents is str, expected a list"),
        (b"panda", "documents is bytes, expected a list"),
        ({"a": "panda"}, "documents is dict, expected a list"),
        (None, "documents is NoneType, expected a list"),
    ],
)
def test_bad_documents(tiny, documents, message):
    with pytest.raises(TypeError, match=message):
        rerank(QUERY, documents, *tiny)


def test_bad_text_from_key(tiny):
    with pytest.raises(TypeError, match=r"key\(documents\[1\]\) is NoneType, expected str"):
        rerank(QUERY, [{"text": "a"}, {}], *tiny, key=lambda row: row.get("text"))


@pytest.mark.parametrize("query", [None, 3, ["panda"]])
def test_bad_query(tiny, query):
    with pytest.raises(TypeError, match=f"query is {type(query).__name__}, expected str"):
        rerank(query, DOCUMENTS, *tiny)


def test_errors_speak_of_documents(tiny):
    """`rerank` must not complain of "pairs", which its user never made."""
    with pytest.raises(ValueError, match=r"documents\[1\] is no valid Unicode"):
        rerank(QUERY, ["a", "\udfff"], *tiny)
    with pytest.raises(ValueError, match="query has 40 tokens"):
        rerank("panda " * 40, DOCUMENTS, *tiny, max_length=40)

    def broken(input_ids, attention_mask):
        return SimpleNamespace(logits=torch.full((len(input_ids), 1), float("nan")))

    with pytest.raises(ArithmeticError, match=r"nan for documents\[0\]"):
        rerank(QUERY, DOCUMENTS, broken, tiny.tokenizer, "cpu")


def test_a_table_is_refused(tiny, installed):
    """Iterating over a DataFrame gives the names of its columns: they were ranked, and the rows never read."""
    pandas = installed("pandas")
    table = pandas.DataFrame({"title": ["panda", "bread"], "text": ["the bear", "the oven"]})
    with pytest.raises(TypeError, match=r"documents is DataFrame, a table, .*pass one column, such as table\['text'\]"):
        rerank(QUERY, table, *tiny)
    ranking = rerank(QUERY, table["text"], *tiny)
    assert sorted(result.document for result in ranking) == ["the bear", "the oven"]
    rows = rerank(QUERY, table.to_dict("records"), *tiny, key=lambda row: row["text"])
    assert [row["title"] for row, _ in rows] == [table["title"][result.index] for result in ranking]


@pytest.mark.parametrize("wrap", [tuple, iter, Column, lambda texts: (text for text in texts), numpy.array])
def test_columns_arrays_and_generators(tiny, wrap):
    assert [(r.document, r.score) for r in rerank(QUERY, wrap(DOCUMENTS), *tiny)] == [
        (r.document, r.score) for r in rerank(QUERY, DOCUMENTS, *tiny)
    ]


@pytest.mark.parametrize("query", ["", "  ", "\u200b"])
def test_a_query_without_a_single_token(tiny, query):
    with pytest.raises(ValueError, match="query is empty, or has only characters that the tokenizer drops"):
        rerank(query, DOCUMENTS, *tiny)
