"""`score`: the right logit for each pair, whatever the batches, and clear errors before anything runs."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import QUERY, WORDS, KeywordModel, make_model, plain_score, random_documents

from reranker_helpers import before_each_batch, rerank, score, tokenising


@pytest.mark.parametrize(("seed", "batch_tokens"), [(0, None), (1, 1), (2, 64), (3, 1000), (4, 100_000)])
def test_batches_give_the_scores_of_a_plain_loop(tiny, seed, batch_tokens):
    documents = random_documents(seed)
    queries = [QUERY, "bread oven", "law"]
    pairs = [(queries[i % 3], document) for i, document in enumerate(documents)]
    expected = [plain_score(*pair, tiny.model, tiny.tokenizer) for pair in pairs]
    logits = score(pairs, *tiny, batch_tokens=batch_tokens)
    assert logits == pytest.approx(expected, abs=1e-4)
    assert sorted(range(40), key=logits.__getitem__) == sorted(range(40), key=expected.__getitem__)


@pytest.mark.parametrize("chunk", [7, 256])
def test_neither_chunks_nor_the_order_of_the_input_change_a_score(tiny, monkeypatch, chunk):
    """The order not by a single bit. Chunks make other batches, and these round differently."""
    pairs = [(QUERY, document) for document in random_documents(9)]
    expected = score(pairs, *tiny)
    monkeypatch.setattr(tokenising, "CHUNK", chunk)
    chunked = score(pairs, *tiny)
    assert chunked == pytest.approx(expected, abs=1e-5)
    by_pair = dict(zip(pairs, chunked, strict=True))
    shuffled = random.Random(6).sample(pairs, len(pairs))
    assert score(shuffled, *tiny) == [by_pair[pair] for pair in shuffled]


def test_an_error_in_the_thread_that_tokenises_is_raised(tiny, monkeypatch):
    monkeypatch.setattr(tokenising, "CHUNK", 7)
    monkeypatch.setattr(tokenising, "_windows", lambda *_: 1 / 0)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        score([(QUERY, text) for text in random_documents(10)], *tiny)
    assert threading.active_count() == threads


def test_batches_stay_within_the_budget_and_longest_come_first(tiny):
    model = KeywordModel(wanted=5).tried(tiny.tokenizer)
    score([(QUERY, document) for document in random_documents(7)], model, tiny.tokenizer, "cpu", batch_tokens=200)
    sizes = [batch.numel() for batch in model.batches]
    widths = [batch.shape[1] for batch in model.batches]
    assert all(size <= 200 or len(batch) == 1 for size, batch in zip(sizes, model.batches, strict=True))
    assert widths == sorted(widths, reverse=True)
    assert len(model.batches) < 40


def test_equal_pairs_are_scored_once_and_tie_exactly(tiny):
    model = KeywordModel(wanted=5).tried(tiny.tokenizer)
    logits = score([(QUERY, "panda"), (QUERY, "the bear"), (QUERY, "panda")], model, tiny.tokenizer, "cpu")
    assert logits[0] == logits[2]
    assert sum(len(batch) for batch in model.batches) == 2


def test_no_pairs_give_no_scores(tiny):
    assert score([], *tiny) == []
    assert score(iter([]), *tiny) == []


def test_max_length_beyond_the_models_limit(tiny):
    """Its configuration says 8194 positions, but two of them can't be used: 8193 tokens would crash inside."""
    tiny.tokenizer.model_max_length = 100_000
    with pytest.raises(ValueError, match="max_length is 8193, but the model reads at most 8192 tokens"):
        score([(QUERY, "panda")], *tiny, max_length=8193)
    tiny.tokenizer.model_max_length = 256
    with pytest.raises(ValueError, match="at most 256 tokens"):
        score([(QUERY, "panda")], *tiny)


def test_query_too_long_for_max_length(tiny):
    pairs = [(QUERY, "panda"), ("panda " * 30, "bear")]
    with pytest.raises(ValueError, match=r"pairs\[1\]\[0\] has 30 tokens.*4 special tokens.*max_length=34"):
        score(pairs, *tiny, max_length=34)
    expected = plain_score(*pairs[1], tiny.model, tiny.tokenizer, max_length=35)
    assert score(pairs, *tiny, max_length=35)[1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("control", ["</s>", "<s>", "<mask>", "<pad>", "＜/s＞"])
def test_special_tokens_in_a_text_are_text(tiny, control):
    """Peers read a `</s>` in a document as the end of the document: its author can steer the score with it."""
    model = KeywordModel(wanted=5)
    score([(f"bear {control} x", f"panda {control} panda")], model, tiny.tokenizer, "cpu")
    (batch,) = model.batches
    special = set(tiny.tokenizer.all_special_ids) - {tiny.tokenizer.unk_token_id}
    assert sum(token in special for token in batch[0].tolist()) == 4  # <s> query </s></s> document </s>


def test_an_unknown_word_costs_nothing_else(tiny):
    """Making control tokens unknown must not touch the rest of the text."""
    model = KeywordModel(wanted=5)
    score([("bear", "panda </s> bread")], model, tiny.tokenizer, "cpu")
    assert tiny.tokenizer.decode(model.batches[0][0]) == tiny.tokenizer.decode(
        tiny.tokenizer(["bear"], ["panda <unk> bread"])["input_ids"][0]
    )


def test_sixteen_threads_with_different_limits(tiny):
    """A fast tokenizer keeps its truncation settings inside: without a lock, calls break or take each other's."""
    document = " ".join(random.Random(9).choices(WORDS, k=400))
    limits = [20 + 7 * i for i in range(48)]
    expected = [plain_score(QUERY, document, tiny.model, tiny.tokenizer, limit) for limit in limits]
    with ThreadPoolExecutor(16) as pool:
        logits = list(pool.map(lambda limit: score([(QUERY, document)], *tiny, max_length=limit)[0], limits))
    assert logits == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_an_error_that_names_the_pair(tiny, value):
    """Sorting with NaN gives a scrambled order without a word."""

    class Broken(KeywordModel):
        def __call__(self, input_ids, attention_mask):
            output = super().__call__(input_ids, attention_mask)
            output.logits[(input_ids == self.wanted).any(1)] = value
            return output

    wanted = tiny.tokenizer("bread", add_special_tokens=False)["input_ids"][0]
    pairs = [(QUERY, text) for text in ("panda", "bear", "bread", "oven", "bread")]
    with pytest.raises(ArithmeticError, match=rf"{value} for pairs\[2\]"):
        score(pairs, Broken(wanted), tiny.tokenizer, "cpu")


def test_out_of_memory_halves_the_batch_and_goes_on(tiny, caplog):
    """Only running out of memory is survived, and only as long as there is a batch to cut."""

    class SmallGpu(KeywordModel):
        def __call__(self, input_ids, attention_mask):
            if len(input_ids) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().__call__(input_ids, attention_mask)

    wanted = tiny.tokenizer("panda", add_special_tokens=False)["input_ids"][0]
    pairs = [("bear", "panda " * count) for count in range(1, 20)]
    logits = score(pairs, SmallGpu(wanted), tiny.tokenizer, "cpu", batch_tokens=1000)
    assert logits == list(range(1, 20))
    assert "going on with batch_tokens=" in caplog.text

    class NoGpu(KeywordModel):
        def __call__(self, input_ids, attention_mask):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        score(pairs, NoGpu(wanted), tiny.tokenizer, "cpu")


def test_progress_is_shown_in_documents_and_only_when_asked_for(tiny, capsys):
    pairs = [(QUERY, document) for document in [*random_documents(10), "panda", "panda"]]
    score(pairs, *tiny)
    assert capsys.readouterr() == ("", "")
    score(pairs, *tiny, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "42/42" in err
    assert "document" in err


AFTER_MAIN = """
import atexit, sys, threading, time
sys.path[:0] = sys.argv[1:3]
from tiny import make_model, make_tokenizer
from reranker_helpers import rerank

tokenizer = make_tokenizer()
reranker = make_model(len(tokenizer)), tokenizer, "cpu"
documents = ["bread " * (1 + i % 50) for i in range(600)] + ["panda"]  # several chunks, so that one is tokenised ahead

def work(name):
    print(name, len(rerank("panda", documents, *reranker)), flush=True)

def late():
    threading.main_thread().join()
    work("thread")

threading.Thread(target=late).start()
atexit.register(work, "exit")
"""


def test_threads_and_exit_handlers_that_outlive_the_main_thread_can_rerank(request):
    """They got "cannot schedule new futures after interpreter shutdown"."""
    here = request.path.parent
    command = [sys.executable, "-c", AFTER_MAIN, str(here), str(here.parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.stdout.split(), run.stderr) == (["thread", "601", "exit", "601"], "")


def test_no_mode_of_torch_is_on_while_tokens_are_waited_for(tiny, monkeypatch):
    """Greenlets share their thread's modes: when one waited in inference mode, and another went on, the process
    crashed."""
    modes = []

    def tokenise(*arguments):
        modes.append(torch.is_inference_mode_enabled())
        return true(*arguments)

    class NoThread(threading.Thread):
        def start(self):
            self.run()

    true = tokenising.tokenise
    monkeypatch.setattr(tokenising, "tokenise", tokenise)
    monkeypatch.setattr(tokenising, "CHUNK", 7)
    monkeypatch.setattr(threading, "Thread", NoThread)
    score([(QUERY, document) for document in random_documents(11)], *tiny)
    assert len(modes) > 3
    assert not any(modes)


def test_special_tokens_in_a_query_are_told_about(tiny, caplog):
    """Rerankers whose prompt holds some, such as Qwen3's, silently got other scores than in Transformers."""
    tokenising._warn_once.cache_clear()
    pair = ("what </s> is a panda", "bear </s> bread")
    replaced, plain = score([pair, ("what <unk> is a panda", "bear <unk> bread")], *tiny)
    assert replaced == plain
    score([pair] * 3, *tiny)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "special token </s>, which counts as <unk>" in warning
    assert "pass keep_special_tokens=True" in warning


def test_special_tokens_can_be_kept(tiny, caplog):
    pair = ("what </s> is a panda", "bear </s> bread")
    expected = plain_score(*pair, tiny.model, tiny.tokenizer)
    assert score([pair], *tiny, keep_special_tokens=True) == pytest.approx([expected], abs=1e-5)
    (result,) = rerank(pair[0], [pair[1]], *tiny, keep_special_tokens=True)
    assert result.score == pytest.approx(expected, abs=1e-5)
    assert score([pair], *tiny) != pytest.approx([expected], abs=1e-3)


@pytest.mark.parametrize("change", [torch.nn.Module.train, lambda model: model.classifier.dropout.train()])
def test_dropout_that_is_switched_on_is_refused(tiny, change):
    """Of one part, too: each call gave another score."""
    change(tiny.model)
    with pytest.raises(ValueError, match=r"in training mode, where dropout makes scores random: call model\.eval\(\)"):
        score([(QUERY, "panda")], *tiny)


def test_models_that_are_no_rerankers(tiny):
    two_labels = make_model(len(tiny.tokenizer), num_labels=2)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 2\)"):
        score([(QUERY, "panda")], two_labels, tiny.tokenizer, "cpu")
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        score([(QUERY, "panda")], tiny.model.train(), tiny.tokenizer, "cpu")


def test_the_models_device_is_not_the_one_named(tiny):
    with pytest.raises(ValueError, match="device is 'cpu', but the model is on 'meta'"):
        score([(QUERY, "panda")], tiny.model.to("meta"), tiny.tokenizer, "cpu")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("panda", r"pairs is str, expected a list of \(query, document\) tuples"),
        (None, "pairs is NoneType"),
        ([(QUERY, "a"), QUERY], r"pairs\[1\] is str, expected a \(query, document\) tuple"),
        ([(QUERY, "a", "b")], r"pairs\[0\] is tuple, expected a \(query, document\) tuple"),
        ([(QUERY, "a"), (QUERY, None)], r"pairs\[1\]\[1\] is NoneType, expected str"),
        ([(3, "a")], r"pairs\[0\]\[0\] is int, expected str"),
    ],
)
def test_bad_pairs(tiny, pairs, message):
    with pytest.raises(TypeError, match=message):
        score(pairs, *tiny)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length is 0, expected at least 1"),
        ({"max_length": "512"}, TypeError, "max_length is str, expected a whole number"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0, expected at least 1"),
        ({"batch_tokens": True}, TypeError, "batch_tokens is bool, expected a whole number"),
        ({"batch_size": 8}, TypeError, "batch_size"),
    ],
)
def test_bad_options(tiny, options, error, message):
    with pytest.raises(error, match=message):
        score([(QUERY, "panda")], *tiny, **options)


def test_invalid_unicode(tiny):
    with pytest.raises(ValueError, match=r"pairs\[0\]\[1\] is no valid Unicode: lone surrogate at character 2"):
        score([(QUERY, "ab\ud800")], *tiny)


def test_a_tokenizer_that_is_not_fast(tiny):
    class Slow:
        is_fast = False
        model_max_length = 512

    with pytest.raises(TypeError, match="tokenizer is Slow, expected a fast one"):
        score([(QUERY, "panda")], tiny.model, Slow(), "cpu")


def test_swapped_arguments(tiny):
    model, tokenizer, device = tiny
    with pytest.raises(TypeError, match=r"and tokenizer is XLMRobertaForSequenceClassification: they are swapped"):
        score([(QUERY, "panda")], tokenizer, model, device)
    with pytest.raises(TypeError, match="model is str, expected one from load_reranker"):
        score([(QUERY, "panda")], "BAAI/bge-reranker-v2-m3", tokenizer, device)
    with pytest.raises(TypeError, match="tokenizer is str, expected a fast one"):
        score([(QUERY, "panda")], model, "BAAI/bge-reranker-v2-m3", device)


def test_a_table_of_pairs(tiny, installed):
    pandas = installed("pandas")
    with pytest.raises(TypeError, match="pairs is DataFrame, a table"):
        score(pandas.DataFrame({"query": [QUERY], "document": ["panda"]}), *tiny)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_tokenises(tiny):
    """Servers fork their workers. The child inherited the lock closed, and waited for ever."""
    with tokenising._lock:
        child = os.fork()
        if not child:
            os._exit(tokenising.count_tokens([QUERY], tiny.tokenizer) != [4])
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


LONG_TEXTS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell switches it off for what runs in the background
sys.path[:0] = sys.argv[1:3]
from tiny import KeywordModel, make_tokenizer
from reranker_helpers import before_each_batch, rerank, score, tokenising

def megabytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1000

tokenizer, model = make_tokenizer(), KeywordModel(5)
texts = [("word %d " % i * 40_000)[:200_000] for i in range(int(sys.argv[3]))]
before = megabytes("VmRSS")
print("scoring", flush=True)
score([("panda", text) for text in texts], model, tokenizer, "cpu", max_length=64)
print(megabytes("VmHWM") - before)
"""


def long_texts(request, count):
    here = request.path.parent
    command = [sys.executable, "-c", LONG_TEXTS, str(here), str(here.parent), str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "scoring\n"
    return process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_length_of_256_documents(request):
    """Texts were tokenised 256 at a time, however long: 256 of 200 kB took 2.6 GB."""
    out, _ = long_texts(request, 16).communicate()
    assert float(out) < 300


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_is_answered_soon(request):
    """It waited until 512 documents were tokenised: half a minute for long ones."""
    process = long_texts(request, 200)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = process.communicate()
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - begin < 10  # well under a second on a quiet machine


def test_a_long_call_can_be_stopped_between_batches(tiny, monkeypatch):
    """Another thread's call goes on, no thread is left, and the next call is as ever."""
    monkeypatch.setattr(tokenising, "CHUNK", 7)
    pairs = [(QUERY, document) for document in random_documents(3)]
    expected, threads, batches = score(pairs, *tiny), threading.active_count(), []

    def stop_at_the_third():
        batches.append(len(batches))
        if len(batches) == 3:
            raise TimeoutError("enough")

    with ThreadPoolExecutor(1) as pool, before_each_batch(stop_at_the_third):
        other = pool.submit(score, pairs, *tiny)
        for call in (lambda: score(pairs, *tiny), lambda: rerank(QUERY, random_documents(3), *tiny)):
            batches.clear()
            with pytest.raises(TimeoutError, match="enough"):
                call()
            assert len(batches) == 3
        assert other.result() == expected
    assert threading.active_count() == threads
    assert score(pairs, *tiny) == expected
