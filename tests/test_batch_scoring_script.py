"""azureml_batch/batch_score.py without an engine: every line gets its rows, whatever is in it and around it."""

import gzip
import json

import pandas
import pytest
import torch
from azure_scripts import ROOT, batch_score, load_script, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import QUERY, texts

from reranker_helpers import rerank, score

OPTIONS = [{}, {"top_n": 2}, {"max_length": 40}, {"max_length": 40, "stride": 8}, {"return_documents": True}]


@pytest.fixture
def run(tiny, tmp_path):
    """Score lines, objects or bytes, and return their rows. They have passed through JSON as on Azure."""

    def run(*lines, end: bytes = b"\n", **limits) -> list[dict]:
        file = tmp_path / "shard.jsonl"
        file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + end for x in lines))
        rows = batch_score.score_files([str(file)], tiny, wire.Limits(**limits))
        return [json.loads(json.dumps(row, allow_nan=False)) for row in rows]

    return run


def line(id_, **fields) -> dict:
    return {"id": id_, "query": QUERY, "documents": ["panda", "bear"], **fields}


def of(rows: list[dict], id_) -> list[dict]:
    return [row for row in rows if row["id"] == id_]


def test_the_rows_of_a_line_are_what_rerank_returns(run, tiny):
    """All lines in one file: their options differ, and none changes another's rows."""
    documents = [texts(seed, 8) for seed in range(len(OPTIONS))]
    queries = [f"{QUERY} {text}" for text in texts(99, len(OPTIONS), 3)]
    lines = [{"id": i, "query": queries[i], "documents": documents[i], **option} for i, option in enumerate(OPTIONS)]
    rows = run(*lines)
    for i, option in enumerate(OPTIONS):
        parameters = {name: value for name, value in option.items() if name != "return_documents"}
        expected = [
            {
                "id": i,
                "index": result.index,
                "logit": pytest.approx(result.score, abs=1e-5),
                "relevance_score": pytest.approx(result.probability, abs=1e-6),
                "rank": rank,
                "truncated": result.truncated,
                **({"document": {"text": result.document}} if "return_documents" in option else {}),
            }
            for rank, result in enumerate(rerank(queries[i], documents[i], *tiny, **parameters), start=1)
        ]
        assert of(rows, i) == expected


def test_max_tokens_per_doc(run, tiny):
    """Each line has its own query, so the limit of the pair differs from line to line."""
    documents = texts(7, 6)
    rows = run(*[line(query, query=query, documents=documents, max_tokens_per_doc=20) for query in ("panda", QUERY)])
    for query in ("panda", QUERY):
        frame = len(tiny.tokenizer(query, "panda")["input_ids"]) - 1
        expected = rerank(query, documents, *tiny, max_length=frame + 20)
        assert [(row["index"], row["truncated"]) for row in of(rows, query)] == [
            (r.index, r.truncated) for r in expected
        ]


def test_pairs_are_ranked_for_each_query(run, tiny):
    """Each query of the pairs has its own ranking; `index` is the place among all pairs."""
    pairs = [["panda", "bear"], ["law", "contract"], ["panda", "law"], ["law", {"text": "oven"}], ["panda", "panda"]]
    rows = run({"id": "a", "pairs": pairs})
    expected = score([(query, document if isinstance(document, str) else "oven") for query, document in pairs], *tiny)
    assert [row["logit"] for row in sorted(rows, key=lambda row: row["index"])] == pytest.approx(expected, abs=1e-5)
    for query in ("panda", "law"):
        group = sorted((row for row in rows if pairs[row["index"]][0] == query), key=lambda row: row["rank"])
        assert [row["rank"] for row in group] == list(range(1, len(group) + 1))
        assert [row["logit"] for row in group] == sorted((row["logit"] for row in group), reverse=True)
    assert len(run({"id": "a", "pairs": pairs, "top_n": 1})) == 2, "one for each query"


def test_all_lines_go_through_one_pass(run, monkeypatch):
    """Throughput: pairs of all lines are sorted by length together, once for each pair of max_length and stride."""
    passes = []

    def spy(pairs, *arguments, **options):
        passes.append((len(pairs), options["max_length"], options["stride"]))
        return score_pairs(pairs, *arguments, **options)

    score_pairs = batch_score.score_pairs
    monkeypatch.setattr(batch_score, "score_pairs", spy)
    lines = [line(i, top_n=1 + i % 2) for i in range(10)] + [line(i, max_length=40) for i in range(10, 15)]
    run(*lines, {"id": "p", "pairs": [["a", "b"]]})
    assert passes == [(21, 512, None), (10, 40, None)]


BAD = [
    (b"{", "InvalidJson", "column 2"),
    (b'{"id": "bad", "query": "\xff"}', "InvalidJson", "the line is no UTF-8: see byte 24"),
    (b"[]", "WrongType", "the line is a list"),
    ({"query": QUERY, "documents": ["a"]}, "MissingId", "id is missing"),
    (line(None), "MissingId", "id is missing"),
    (line(True), "MissingId", "no string and no whole number"),
    (line(1.5), "MissingId", "no string and no whole number"),
    (line(["bad"]), "MissingId", "no string and no whole number"),
    (line("good"), "RepeatedId", "the id is that of line 1"),
    (line("bad", documents=None), "MissingField", "documents is missing"),
    (b'{"id": 1, "id": 2, "query": "a", "documents": ["b"]}', "RepeatedField", "two fields 'id'"),
    ({"id": "bad", "pairs": [["a", "b"], ["\u200b", "b"]]}, "OutOfRange", "pairs[1][0] is empty, or has only"),
    (line("bad", top_k=3), "UnknownField", "unknown field 'top_k': send top_n"),
    ({"id": "bad", "pairs": [["a", "b"]], "max_tokens_per_doc": 5}, "UnknownField", "'max_tokens_per_doc': the fields"),
    (line("bad", pairs=[["a", "b"]]), "UnknownField", "unknown field 'query': the fields are pairs, top_n"),
    ({"id": "bad", "pairs": None}, "MissingField", "query is missing"),
    ({"id": "bad", "pairs": "ab"}, "WrongType", "pairs is a string, expected a list"),
    (
        line("bad", query=None, documents=None, pairs=[["a", "b"]], answer=None),
        "UnknownField",
        "unknown field 'answer'",
    ),
    ({"id": "bad", "pairs": ["ab"]}, "WrongType", "pairs[0] is no list of two"),
    ({"id": "bad", "pairs": [["a", "b"], ["a"]]}, "WrongType", "pairs[1] is no list of two"),
    ({"id": "bad", "pairs": [["a", "b"], [" ", "b"]]}, "OutOfRange", "pairs[1][0] is empty"),
    ({"id": "bad", "pairs": [["a", 1]]}, "WrongType", "pairs[0][1] is a number"),
    (line("bad", documents=["a"] * 1001), "TooManyDocuments", "1,001 entries"),
    (line("bad", documents=["a " * 2**23]), "BodyTooLarge", "the line has more than"),
    (line("bad", documents=["panda " * 500], max_length=12, stride=3), "TooManyTokens", "tokens"),
    ({"id": "bad", "pairs": [["a", "b"], ["panda " * 600, "b"]]}, "OutOfRange", "pairs[1][0] has 600 tokens"),
]


@pytest.mark.parametrize(("bad", "code", "message"), BAD)
def test_a_bad_line_has_a_row_that_names_it_and_takes_no_other_down(run, tmp_path, bad, code, message):
    limits = {"tokens": 2000} if code == "TooManyTokens" else {}
    rows = run(line("good"), b"", bad, line("later"), **limits)
    assert [row["rank"] for row in of(rows, "good") if "error" not in row] == [1, 2]
    assert [row["rank"] for row in of(rows, "later")] == [1, 2]
    (error,) = [row for row in rows if "error" in row]
    assert (error["file"], error["line"]) == (str(tmp_path / "shard.jsonl"), 3)
    assert error["error"]["code"] == code
    assert message in error["error"]["message"]
    known = isinstance(bad, dict) and isinstance(bad.get("id"), str)
    assert error["id"] == (bad["id"] if known else None)


def test_lines_may_end_as_on_windows(run):
    lines = [line("good"), b"", b"{", line("bad", top_k=3), line("later")]
    assert run(*lines, end=b"\r\n") == run(*lines)


def test_many_poisoned_lines(run):
    """Each pass that fails is halved until the lines at fault are alone: the others are all scored."""
    poisoned = {3, 4, 17, 40, 63}
    rows = run(*[line(i, query="panda " * 600 if i in poisoned else QUERY) for i in range(64)])
    assert {row["id"] for row in rows if "error" in row} == poisoned
    assert sorted(row["id"] for row in rows if "error" not in row) == sorted([*({*range(64)} - poisoned)] * 2)


def test_a_logit_that_is_nan(run, tiny):
    """One text drives the model to NaN, as an overflow in float16 does."""
    poison = tiny.tokenizer.convert_tokens_to_ids(tiny.tokenizer.tokenize("oven"))[-1]
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[poison] = float("nan")
    rows = run(line(1), line(2, documents=["bear", "the oven"]), line(3))
    assert [(row["id"], row.get("rank")) for row in rows] == [(1, 1), (1, 2), (2, None), (3, 1), (3, 2)]
    assert "the model returned nan for documents[1]" in rows[2]["error"]["message"]


def test_a_machine_that_fails_raises_so_that_another_one_tries(run, tiny):
    """Even if it has scored some lines before: their rows come from the other one."""
    calls = []

    def hook(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("CUDA error: device-side assert")

    tiny.model.classifier.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(line(1), b"{", line(2, max_length=40))


def test_a_line_that_the_machine_cannot_take_is_no_reason_to_try_again(run, tiny):
    """Such as a document for which the GPU's memory does not suffice, and another try's wouldn't."""

    def hook(module, arguments, inputs):
        if inputs["input_ids"].shape[1] > 200:
            raise RuntimeError("out of memory")

    tiny.model.register_forward_pre_hook(hook, with_kwargs=True)
    rows = run(line(1), line(2, documents=["panda " * 300]), line(3))
    assert [row["error"]["message"] for row in of(rows, 2)] == ["out of memory"]
    assert len(of(rows, 1)) == len(of(rows, 3)) == 2


def test_a_file_that_cannot_be_read_raises_so_that_it_is_tried_again(tiny, tmp_path):
    with pytest.raises(FileNotFoundError):
        batch_score.score_files([str(tmp_path / "gone.jsonl")], tiny, wire.Limits())


def test_no_documents(run):
    nothing = dict.fromkeys(("index", "logit", "relevance_score", "rank", "truncated"))
    rows = run(line("none", documents=[]), line(2), {"id": "no pairs", "pairs": []})
    assert of(rows, "none") == [{"id": "none", **nothing}]
    assert of(rows, "no pairs") == [{"id": "no pairs", **nothing}]
    assert run(line("alone", documents=[])) == [{"id": "alone", **nothing}]


def test_an_empty_file_has_a_row(run):
    """The engine would take no rows for a failure."""
    for content in ((), (b"", b"  ")):
        ((row),) = run(*content)
        assert row["error"]["code"] == "EmptyFile"


def test_lines_as_pandas_writes_them(run):
    """Requests and pairs in one DataFrame: each line has all columns, null where there is nothing, and a column of
    whole numbers with a gap is one of floats."""
    frame = pandas.DataFrame(
        [
            {"id": 1, "query": QUERY, "documents": ["panda", "bear"], "top_n": 1},
            {"id": 2, "pairs": [["law", "contract"], ["law", "oven"]]},
            {"id": None},
        ]
    )
    written = frame.to_json(orient="records", lines=True)
    assert '"id":1.0' in written
    assert '"top_n":1.0' in written
    assert '"pairs":null' in written
    rows = run(*written.encode().splitlines())
    assert [(row["id"], row.get("rank")) for row in rows if "error" not in row] == [(1, 1), (2, 1), (2, 2)]
    assert isinstance(of(rows, 1)[0]["id"], int)
    assert of(rows, None)[0]["error"]["code"] == "MissingId"


def test_the_id_1_and_the_id_1_point_0_are_one(run):
    assert [
        row["error"]["code"] for row in run(b'{"id": 1, "query": "a", "documents": []}', line(1.0)) if "error" in row
    ]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"PK\x03\x04\x14\x00" + bytes(range(256)) * 20, "BinaryFile"),
        ('{"id": 1, "query": "a", "documents": ["b"]}\n'.encode("utf-16"), "BinaryFile"),
        (gzip.compress(b'{"id": 1}\n' * 1000, mtime=0)[:-20], "DamagedFile"),
        (gzip.compress(b"\0\n" * 1000, mtime=0), "BinaryFile"),
    ],
    ids=["zip", "utf-16", "cut-off gzip", "binary in gzip"],
)
def test_a_file_that_is_no_text_has_one_row(tiny, tmp_path, content, code):
    """And not one for each 0x0A in it. The other files of the mini-batch are scored."""
    strange, good = tmp_path / "strange", tmp_path / "good.jsonl"
    strange.write_bytes(content)
    good.write_text(json.dumps(line(1)))
    rows = batch_score.score_files([str(strange), str(good)], tiny, wire.Limits())
    (error,) = [row for row in rows if "error" in row]
    assert (error["file"], error["error"]["code"]) == (str(strange), code)
    assert len(of(rows, 1)) == 2


def test_files_may_be_packed_with_gzip(tiny, tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("".join(json.dumps(line(id_)) + "\n" for id_ in range(3)))
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    limits = wire.Limits()
    assert batch_score.score_files([str(packed)], tiny, limits) == batch_score.score_files([str(plain)], tiny, limits)


def test_a_byte_order_mark_and_no_newline_at_the_end(run):
    rows = run(b"\xef\xbb\xbf" + json.dumps(line(1)).encode() + b"\n" + json.dumps(line(2)).encode(), end=b"")
    assert [row["id"] for row in rows] == [1, 1, 2, 2]


IDS = ["a,b", 'say "hi"', "two\nlines", " space ", "\u2028", "'", "", "😀", "\\n", "1", 1, -7, 10**20, "\ud800"]


def test_any_id_comes_back_from_a_file_of_lines(tiny_folder, tmp_path, monkeypatch):
    """Through init() and run(), and through the file that the engine writes from the rows."""
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tiny_folder))
    script = load_script("azureml_batch/batch_score.py")
    script.init()
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for file, ids in zip(files, (IDS[::2], IDS[1::2]), strict=True):
        file.write_text("".join(json.dumps(line(id_)) + "\n" for id_ in ids))
    rows = script.run([str(file) for file in files])
    written = "".join(f"{row}\n" for row in rows)
    back = [json.loads(row)["id"] for row in written.split("\n")[:-1]]
    assert sorted(back, key=repr) == sorted([*IDS, *IDS], key=repr)
    assert written.splitlines() == rows


@given(
    st.lists(
        # Without what makes a whole file binary, or gzip
        st.binary(max_size=30).map(lambda data: data.translate(None, b"\n\0\x1f"))
        | st.fixed_dictionaries(
            {"id": st.sampled_from(["a", "b", 1, None, 1.5]), "query": st.sampled_from(["panda", "", 1])},
            optional={
                "documents": st.lists(st.sampled_from(["bear", "", "law " * 80, None]), max_size=3),
                "pairs": st.just([["a", "b"]]),
                "max_length": st.sampled_from([5, 20, 512, 0]),
                "stride": st.sampled_from([0, 12, None]),
            },
        ),
        max_size=8,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_line_is_lost_or_doubled(run, lines):
    """Every line that isn't empty has one error row, or the rows of all its documents."""
    rows = run(*lines)
    expected = []
    for number, content in enumerate(lines, start=1):
        if isinstance(content, bytes) and not content.strip():
            continue
        if any(row.get("line") == number for row in rows):
            expected.append((None, number))
        else:
            expected += [(content["id"], index) for index in range(len(content["documents"]))] or [
                (content["id"], None)
            ]
    if not expected:
        expected = [(None, 1)]
    actual = [(None, row["line"]) if "error" in row else (row["id"], row["index"]) for row in rows]
    assert sorted(map(repr, actual)) == sorted(map(repr, expected))


def test_the_script_needs_no_inference_server():
    """The batch engine's container need not have it."""
    for name in ("azureml_batch/batch_score.py", "azureml/wire.py", "azureml/weights.py"):
        assert "azureml_inference_server_http" not in (ROOT / name).read_text()
