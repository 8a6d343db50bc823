"""azureml/score.py without a server: what goes in, what comes out, and that no request brings it down."""

import json
import logging
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from azure_scripts import load_script, score, weights, wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import QUERY, WORDS, texts

from reranker_helpers import rerank


@pytest.fixture
def ask(tiny):
    """Send a request, as an object or as bytes, to the tiny model."""

    def ask(request, **limits) -> tuple[int, dict]:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        return score.answer(body, tiny, "tiny", wire.Limits(**limits), "request-7")

    return ask


@pytest.mark.parametrize("options", [{}, {"top_n": 3}, {"max_length": 40}, {"max_length": 40, "stride": 8}])
def test_the_answer_is_what_rerank_returns(ask, tiny, options):
    documents = texts(0, 20, 100)
    status, answer = ask({"query": QUERY, "documents": documents, "return_documents": True, **options})
    assert status == 200
    assert answer["model"] == "tiny"
    expected = rerank(QUERY, documents, *tiny, **options)
    assert answer["results"] == [
        {
            "index": result.index,
            "relevance_score": result.probability,
            "logit": result.score,
            "truncated": result.truncated,
            "document": {"text": result.document},
        }
        for result in expected
    ]
    assert any(result.truncated for result in expected) == ("max_length" in options and "stride" not in options)


def test_documents_as_objects_and_not_returned_unless_asked_for(ask):
    status, answer = ask({"query": QUERY, "documents": [{"text": "panda", "title": "any"}, "bear"]})
    assert status == 200
    assert all("document" not in result for result in answer["results"])
    assert ask({"query": QUERY, "documents": ["panda", "bear"]}) == (200, answer)


def test_no_documents_and_null_options(ask):
    """Generated clients send null for what is not set, and the name of a model."""
    request = {"query": QUERY, "documents": [], "top_n": None, "stride": None, "max_length": None, "model": "other"}
    assert ask(request) == (200, {"model": "tiny", "results": [], "usage": {"total_tokens": 0}})


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m", "top_n": 2},
        {"model": "m", "top_n": 2, "return_documents": True},
        {"model": "m", "top_n": 10, "max_tokens_per_doc": 4096},
        {"model": "m", "top_n": 2, "max_tokens_per_doc": None},
        {"model": "m", "top_n": None},
        {"model": "m", "top_n": 2, "rank_fields": None, "max_chunks_per_doc": None},
    ],
    ids=[
        "cohere 5.21 and 7.3, langchain-community 0.4 JinaRerank",
        "litellm for cohere, jina_ai, hosted_vllm, azure_ai; dify",
        "cohere-haystack 11.0 CohereRanker",
        "langchain-cohere 0.6 CohereRerank",
        "jina-haystack 2.0 JinaRanker",
        "null where nothing is set",
    ],
)
def test_what_stock_clients_send_by_default(ask, fields):
    """Recorded from the packages themselves. The deployment for a CPU reads 1,024 tokens of a pair, not 4,096."""
    status, answer = ask({"query": QUERY, "documents": ["panda", "bear"]} | fields, length=1024)
    assert status == 200
    assert {"index", "relevance_score"} <= answer["results"][0].keys()
    assert ("document" in answer["results"][0]) == ("return_documents" in fields)


def test_max_tokens_per_doc_cuts_the_document_alone(ask, tiny):
    """Cohere's limit is one of the document, whatever the query's length. What it cuts is reported as ever."""
    documents = texts(5, 12, 60)
    status, answer = ask({"query": QUERY, "documents": documents, "max_tokens_per_doc": 20})
    frame = len(tiny.tokenizer(QUERY, "panda")["input_ids"]) - 1
    expected = rerank(QUERY, documents, *tiny, max_length=frame + 20)
    assert status == 200
    assert [(r["index"], r["logit"], r["truncated"]) for r in answer["results"]] == [
        (r.index, r.score, r.truncated) for r in expected
    ]
    lengths = [len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]
    assert [r.truncated for r in sorted(expected, key=lambda r: r.index)] == [length > 20 for length in lengths]
    assert answer["usage"]["total_tokens"] == sum(frame + min(length, 20) for length in lengths)


def test_max_tokens_per_doc_beyond_what_the_model_reads_is_lowered(ask, tiny):
    """Many tokenizers have no limit of their own. The model's was forgotten, and the answer was 422."""
    tiny.tokenizer.model_max_length = 10**30
    tiny.model.config.max_position_embeddings = 66  # of which it reads 64
    documents = texts(5, 12, 100)
    status, answer = ask({"query": QUERY, "documents": documents, "max_tokens_per_doc": 4096})
    assert status == 200
    expected = rerank(QUERY, documents, *tiny, max_length=64)
    assert [(r["index"], r["logit"], r["truncated"]) for r in answer["results"]] == [
        (r.index, r.score, r.truncated) for r in expected
    ]
    assert any(r.truncated for r in expected)


@pytest.mark.parametrize("options", [{}, {"max_length": 40}, {"max_length": 40, "stride": 8}])
def test_total_tokens_are_those_that_the_model_read(ask, tiny, options):
    documents = texts(1, 10, 100)
    status, answer = ask({"query": QUERY, "documents": [*documents, documents[0]], **options})
    encoded = tiny.tokenizer(
        [QUERY] * 10,
        documents,
        truncation="only_second",
        max_length=options.get("max_length", 512),
        stride=options.get("stride", 0),
        return_overflowing_tokens="stride" in options,
    )["input_ids"]
    assert status == 200
    assert answer["usage"]["total_tokens"] == sum(map(len, encoded))


def request_with(**fields) -> dict:
    return {"query": QUERY, "documents": ["panda"], **fields}


REFUSED = [
    (b"", 400, "InvalidJson", "column 1"),
    (b'{"query":\n}', 400, "InvalidJson", "line 2, column 1"),
    (b'{"query": "\xff"}', 400, "InvalidJson", "no UTF-8: see byte 11"),
    (b'{"query": NaN}', 400, "InvalidJson", "NaN"),
    (b'{"top_n": -Infinity}', 400, "InvalidJson", "Infinity"),
    (b'{"top_n": 1' + b"0" * 5000 + b"}", 400, "InvalidJson", "digits"),
    (b"[" * 100_000, 400, "InvalidJson", "nesting"),
    (b'{"query": "\\ud800", "documents": []}', 400, "InvalidUnicode", "query is no valid Unicode: lone surrogate"),
    (b'{"query": "a", "documents": ["b", "\\udc00"]}', 400, "InvalidUnicode", "documents[1]"),
    (b'{"query": "a", "documents": [], "model": "\\udc00"}', 400, "InvalidUnicode", "model"),
    ([], 400, "WrongType", "the body is a list, expected an object"),
    (None, 400, "WrongType", "the body is null, expected an object"),
    ({}, 400, "MissingField", "query is missing"),
    ({"query": QUERY}, 400, "MissingField", "documents is missing"),
    (request_with(query=None), 400, "MissingField", "query is missing"),
    (request_with(query=1), 400, "WrongType", "query is a number, expected a string"),
    (request_with(query=" \n"), 422, "OutOfRange", "query is empty"),
    (
        request_with(query="\u200b"),
        422,
        "OutOfRange",
        "query is empty, or has only characters that the tokenizer drops",
    ),
    (request_with(documents="panda"), 400, "WrongType", "documents is a string, expected a list"),
    (request_with(documents=["panda", None]), 400, "WrongType", "documents[1] is null, expected a string or"),
    (request_with(documents=[{"content": "panda"}]), 400, "WrongType", "documents[0] is an object, expected a string"),
    (request_with(documents=[{"text": 1.5}]), 400, "WrongType", "documents[0].text is a number with a fraction"),
    (request_with(docs=[]), 400, "UnknownField", "unknown field 'docs': the fields are query, documents, top_n"),
    (request_with(docs=None), 400, "UnknownField", "unknown field 'docs'"),
    (request_with(max_tokens_per_doc=0), 422, "OutOfRange", "max_tokens_per_doc must be at least 1"),
    (request_with(max_tokens_per_doc=9, stride=1), 422, "OutOfRange", "max_tokens_per_doc excludes max_length and"),
    # What clients of other services send, LiteLLM 1.x for Hugging Face's server and for NVIDIA's among them
    (request_with(top_k=3), 400, "UnknownField", "unknown field 'top_k': send top_n"),
    (request_with(rank_fields=["title"]), 400, "UnknownField", "'rank_fields': send one text for each document"),
    (
        request_with(max_chunks_per_doc=3),
        400,
        "UnknownField",
        "'max_chunks_per_doc': stride reads long documents whole",
    ),
    (
        {"query": QUERY, "texts": ["a"], "raw_scores": False},
        400,
        "UnknownField",
        "unknown field 'texts': send documents",
    ),
    ({"query": {"text": QUERY}, "passages": [{"text": "a"}]}, 400, "UnknownField", "field 'passages': send documents"),
    (request_with(top_n="3"), 400, "WrongType", "top_n is a string, expected a whole number"),
    (request_with(top_n=2.5), 400, "WrongType", "top_n is a number with a fraction, expected a whole number"),
    (request_with(max_length=1e300), 422, "OutOfRange", "max_length must be at most 8,192"),
    (request_with(top_n=True), 400, "WrongType", "top_n is true or false, expected a whole number"),
    (request_with(top_n=0), 422, "OutOfRange", "top_n must be at least 1"),
    (request_with(max_length=8193), 422, "OutOfRange", "max_length must be at most 8,192"),
    (request_with(max_length=0), 422, "OutOfRange", "max_length must be at least 1"),
    (request_with(max_length=5), 422, "OutOfRange", "query has 4 tokens, which with 4 special tokens leaves no room"),
    (request_with(stride=-1), 422, "OutOfRange", "stride must be at least 0"),
    (request_with(stride=10**30), 422, "OutOfRange", "stride is 1000000"),
    (request_with(stride=504), 422, "OutOfRange", "lower stride or raise max_length"),
    (request_with(return_documents=1), 400, "WrongType", "return_documents is a number, expected true or false"),
]


@pytest.mark.parametrize(("request_", "status", "code", "message"), REFUSED)
def test_what_is_refused_and_how(ask, caplog, request_, status, code, message):
    actual_status, answer = ask(request_)
    assert (actual_status, answer["error"]["code"]) == (status, code)
    assert message in answer["error"]["message"]
    assert answer.keys() == {"error"}
    assert not caplog.records


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"query": "a", "query": "b", "documents": ["c"]}', "query"),
        (b'{"query": "a", "documents": ["c"], "documents": ["d"]}', "documents"),
        (b'{"query": "a", "documents": [{"text": "c", "text": "d"}]}', "text"),
        (b'{"query": "a", "documents": [{"text": "c", "meta": {"x": 1, "x": 1}}]}', "x"),
    ],
)
def test_a_field_that_is_there_twice_is_refused(ask, body, field):
    """Python's json takes the last one, without a word: the ranking would be for another query than the client's."""
    status, answer = ask(body)
    assert (status, answer["error"]["code"]) == (400, "RepeatedField")
    assert f"two fields '{field}'" in answer["error"]["message"]


def test_a_million_fields_and_one_twice_are_refused_at_once(ask):
    body = b"{" + b",".join(b'"%d":0' % (number % 500_000) for number in range(500_001)) + b"}"
    started = time.perf_counter()
    assert ask(body)[1]["error"]["code"] == "RepeatedField"
    assert time.perf_counter() - started < 5


def test_whole_numbers_as_pandas_writes_them(ask):
    """A column of whole numbers with a gap is one of floats: to_json writes 2.0."""
    assert ask(request_with(documents=WORDS, top_n=2.0, max_length=40.0, stride=8.0)) == ask(
        request_with(documents=WORDS, top_n=2, max_length=40, stride=8)
    )


def test_a_byte_order_mark(ask):
    """PowerShell and other Windows tools begin UTF-8 with one."""
    body = json.dumps(request_with()).encode()
    assert ask(b"\xef\xbb\xbf" + body) == ask(body)


def test_a_number_too_large_for_a_float_is_no_whole_number(ask):
    status, answer = ask(b'{"query": "a", "documents": [], "top_n": 1e999}')
    assert (status, answer["error"]["code"]) == (400, "WrongType")


def test_a_ranking_that_nobody_waits_for_ends_at_its_next_batch(tiny):
    """And at once, before the request is read, if nobody waits when it begins."""
    batches, calls = [], []
    tiny.model.roberta.embeddings.register_forward_pre_hook(lambda *_: batches.append(1))

    def ask(last: int, body: bytes) -> tuple[int, dict]:
        batches.clear()
        calls.clear()

        def check():
            calls.append(1)
            if len(calls) > last:
                raise wire.Refused(408, "BudgetExceeded", "too late")

        return score.answer(body, tiny, "tiny", wire.Limits(), "request-7", check)

    body = json.dumps({"query": QUERY, "documents": texts(0, 300, 60)}).encode()
    late = (408, {"error": {"code": "BudgetExceeded", "message": "too late"}})
    assert ask(0, b"{") == late
    for _ in range(2):  # the first time, it tries whether the model bears padding
        assert ask(10**6, body)[0] == 200
    count = len(batches)
    assert count > 10
    assert ask(len(calls) - 9, body) == late
    assert len(batches) == count - 9
    long = json.dumps(
        {"query": QUERY, "documents": [f"{i}" + " panda" * 70_000 for i in range(3)], "stride": 0}
    ).encode()
    assert ask(10**6, long)[0] == 200
    assert ask(len(calls) - len(batches) - 3, long) == late, "while tokens are counted, too"
    assert not batches


def never_called(*args):
    raise AssertionError("the model ran")


def test_too_large_is_refused_before_the_model_runs(ask, tiny, monkeypatch):
    tiny.model.register_forward_pre_hook(never_called)
    long = {"query": QUERY, "documents": texts(2, 10, 100)}

    def refused(request, **limits) -> tuple[int, str]:
        status, answer = ask(request, **limits)
        return status, answer["error"]["code"]

    assert refused(long, body_bytes=100) == (413, "BodyTooLarge")
    assert refused(long, documents=9) == (413, "TooManyDocuments")
    assert refused(long, tokens=100) == (413, "TooManyTokens")
    narrow = {"query": "panda " * 500, "documents": [" ".join(WORDS * 400)], "max_length": 505, "stride": 0}
    assert refused(narrow) == (413, "TooManyTokens"), "gigabytes of windows that hold one token of the document each"
    monkeypatch.setattr(wire, "TOKENIZER_TOKENS", 5000)
    assert refused(narrow | {"stride": None}) == (413, "TooManyTokens"), "cut-off text is tokenised all the same"
    wide = {"query": "panda " * 400, "documents": [f"bear {number}" for number in range(20)]}
    assert refused(wide) == (413, "TooManyTokens"), "and the query again with each document"


def test_windows_are_no_tokens_of_the_tokenizer(ask, monkeypatch):
    """It reads a document once. Its windows are cut afterwards, so only the limit of the model's tokens is for them."""
    monkeypatch.setattr(wire, "TOKENIZER_TOKENS", 500)
    request = {"query": QUERY, "documents": [" ".join(WORDS * 7)], "max_length": 12, "stride": 2}
    status, answer = ask(request)
    assert status == 200
    assert answer["usage"]["total_tokens"] > 500


@given(
    documents=st.lists(st.text("abc ", max_size=60), min_size=1, max_size=5),
    max_length=st.integers(9, 30),
    stride=st.none() | st.integers(0, 10),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_limit_of_tokens_is_exact(ask, documents, max_length, stride):
    """What is counted before the model runs is what it would read, with windows and without."""
    request = {"query": "panda", "documents": documents, "max_length": max_length, "stride": stride}
    status, answer = ask(request)
    if status == 422:  # the windows would overlap by too much
        return
    tokens = answer["usage"]["total_tokens"]
    assert ask(request, tokens=tokens)[0] == 200
    assert ask(request, tokens=tokens - 1)[0] == 413


def test_default_requests_are_never_refused_for_their_tokens():
    limits = wire.Limits()
    assert limits.documents * wire.MAX_LENGTH <= limits.tokens


SECRET = "the panda's secret"


def fails_with(error: Exception):
    def hook(*args):
        raise error

    return hook


@pytest.mark.parametrize("error", [KeyError(SECRET), RuntimeError("CUDA out of memory"), ValueError(SECRET)])
def test_an_internal_failure_is_in_the_log_under_its_request_id(ask, tiny, caplog, error):
    tiny.model.classifier.register_forward_pre_hook(fails_with(error))
    status, answer = ask(request_with(documents=[SECRET]))
    assert (status, answer["error"]["code"]) == (500, "InternalError")
    assert "request-7" in answer["error"]["message"]
    assert f"request request-7 failed: {type(error).__name__}" in caplog.text
    assert "in fails_with" not in answer["error"]["message"]
    assert SECRET not in caplog.text + json.dumps(answer)
    assert ("CUDA out of memory" in caplog.text) == isinstance(error, RuntimeError)


def test_weights_that_give_nan(ask, tiny, caplog):
    with torch.no_grad():
        tiny.model.classifier.dense.bias.fill_(float("nan"))
    status, _ = ask(request_with())
    assert status == 500
    assert "the model returned nan for documents[0]" in caplog.text


# Any JSON value, among them those that look right
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 8192, 10**400])
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "</s>", "\x00", "panda", QUERY]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(["text", "", "a"]), children),
    max_leaves=8,
)


def valid_answer(request: bytes, status: int, answer: dict) -> bool:
    if status != 200:
        return status in (400, 413, 422) and set(answer["error"]) == {"code", "message"}
    documents = json.loads(request)["documents"]
    indexes = [result["index"] for result in answer["results"]]
    logits = [result["logit"] for result in answer["results"]]
    return len(set(indexes)) == len(indexes) <= len(documents) and logits == sorted(logits, reverse=True)


@given(st.dictionaries(st.sampled_from(wire.FIELDS), values), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_at_any_field(ask, fields, else_valid):
    body = json.dumps(request_with(**fields) if else_valid else fields).encode()
    status, answer = ask(body)
    assert valid_answer(body, status, answer)
    json.dumps(answer, allow_nan=False)


@given(st.binary() | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(ask, body):
    assert ask(body)[0] == 400


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the scoring script opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_init_finds_the_weights_where_azure_puts_them(tiny_folder, tmp_path, monkeypatch, caplog, no_network):
    caplog.set_level(logging.INFO, "azmlinfsrv.score")
    model_dir = tmp_path / "azureml-models" / "bge-reranker-v2-m3" / "1"
    model_dir.mkdir(parents=True)
    (model_dir / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(model_dir / "tiny"))
    script = load_script()
    script.init()
    (record,) = caplog.records
    for part in ("tiny", "ready on cpu", "float32", " s, ", "documents=1000"):
        assert part in record.getMessage()


def test_the_model_is_found_however_deep_it_lies(tiny_folder, tmp_path):
    copy = tmp_path / "bge" / "1" / "weights"
    copy.mkdir(parents=True)
    (copy / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert weights.find_model(str(tmp_path)) == copy


def test_init_without_a_model(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)
    with pytest.raises(RuntimeError, match="AZUREML_MODEL_DIR is '', which is no folder: does the deployment have a"):
        score.init()
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path))
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(RuntimeError, match=r"0 folders with a config\.json.*\n  readme\.txt  5 bytes"):
        score.init()
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match=r"(?s)needs config\.json, model\.safetensors.*readme\.txt  5 bytes"):
        score.init()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2271071852\n"),
        ("model.safetensors", b""),
        ("config.json", b"{"),
    ],
    ids=["pointer", "empty", "config"],
)
def test_init_with_a_file_that_is_not_what_its_name_says(tiny_folder, tmp_path, monkeypatch, name, content):
    """The container's log is all that one sees on Azure. It lists the folder, with sizes that tell a pointer."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "weights"))
    (folder / name).write_bytes(content)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(folder))
    with pytest.raises(RuntimeError) as raised:
        score.init()
    assert str(folder) in str(raised.value)
    assert f"\n  {name}  {len(content):,} bytes" in str(raised.value)


def test_init_with_weights_that_tell_no_text_from_another(tiny_folder, tmp_path, monkeypatch):
    """A file with holes: a right header, and zeros where an upload was cut off. It loads, and ranks nothing."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "weights"))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(folder))
    with pytest.raises(RuntimeError, match=r"(?s)the model gives the logit 0\.0 to every text: check.*safetensors  "):
        score.init()


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_limits_from_the_environment(monkeypatch, value):
    monkeypatch.setenv("RERANKER_MAX_TOKENS", "24000")
    assert wire.Limits.from_environment() == wire.Limits(tokens=24_000)
    monkeypatch.setenv("RERANKER_MAX_DOCUMENTS", value)
    with pytest.raises(ValueError, match=f"RERANKER_MAX_DOCUMENTS is '{value}', expected a positive whole number"):
        wire.Limits.from_environment()


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_counts_as_not_set(tiny_folder, monkeypatch, caplog, value):
    """Pipelines set one to "" where they have nothing to say. An empty device or limit ended `init`."""
    for name in ("DEVICE", "DTYPE", "MODEL_NAME", *(f"MAX_{field.upper()}" for field in wire.Limits._fields)):
        monkeypatch.setenv(f"RERANKER_{name}", value)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tiny_folder))
    caplog.set_level(logging.INFO, "azmlinfsrv.score")
    load_script().init()
    assert caplog.messages[0].startswith(f"{tiny_folder.name} ready on ")
    assert str(wire.Limits()) in caplog.messages[0]


def test_the_deployment_chooses_the_dtype(tiny_folder, monkeypatch):
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tiny_folder))
    monkeypatch.setenv("RERANKER_DTYPE", "bfloat16")
    reranker, _ = weights.load_model()
    assert reranker.model.dtype == torch.bfloat16
    monkeypatch.setenv("RERANKER_DTYPE", "int4")
    with pytest.raises(RuntimeError, match="dtype is 'int4', expected 'float32'"):
        weights.load_model()
