"""int8 on a CPU: the ranking of float32 at less cost, and an error or float32 wherever that cannot be had."""

import copy
import logging
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from tiny import QUERY, make_model, make_tokenizer, random_documents

from reranker_helpers import load_reranker, packed, products, quantised_linear, quantising, score, scoring
from reranker_helpers.quantised_linear import Grid, QuantisedLinear

CPU = torch.device("cpu")
PAIRS = [(QUERY, text) for text in random_documents(0)]


@pytest.fixture(autouse=True)
def found_out_anew():
    products._found.clear()
    yield
    products._found.clear()


@pytest.fixture(params=[255, 127, None], ids=["8 bits", "7 bits", "widened"])
def levels(request, monkeypatch):
    """What is found on processors with VNNI, on older ones, and where int8 is of no use."""
    monkeypatch.setattr(quantised_linear, "_exact_levels", lambda *_: request.param)
    return request.param


def linears(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantisedLinear)}


def in_one_order(ours, theirs):
    """Return the share of pairs of documents that both put in the same order."""
    i, j = torch.combinations(torch.arange(len(ours))).T
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    return ((ours[i] > ours[j]) == (theirs[i] > theirs[j])).float().mean()


def test_scores_are_near_those_of_float32(tiny, tiny_folder, levels):
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    exact, near = score(PAIRS, *tiny), score(PAIRS, *reranker)
    tolerance = 0.3 if levels == 127 else 0.15
    assert near == pytest.approx(exact, abs=tolerance * torch.tensor(exact).std().item())
    assert in_one_order(near, exact) > 0.95
    assert exact != near
    assert len(linears(reranker.model)) == 6 + 2  # of the last layer keys and values
    assert {part.grid.levels for part in linears(reranker.model).values()} == {levels}


def test_the_packed_path_and_the_models_own_agree(tiny_folder, levels, monkeypatch):
    """Someone's hook sends the model its own way: the layers are the same."""
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    assert packed.can_pack(reranker.model, CPU)
    near = score(PAIRS, *reranker)
    monkeypatch.setattr(scoring, "can_pack", lambda *_: False)
    assert score(PAIRS, *reranker) == pytest.approx(near, abs=0.02)


def test_a_score_depends_neither_on_the_batch_nor_on_the_order(tiny_folder):
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    together = dict(zip(PAIRS, score(PAIRS, *reranker), strict=True))
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    assert score(shuffled, *reranker) == [together[pair] for pair in shuffled]
    for budget in (1, 100, 100_000):
        again = score(PAIRS, *reranker, batch_tokens=budget)
        assert again == pytest.approx(list(together.values()), abs=1e-4)


def test_threads_get_the_scores_of_one(tiny_folder):
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    expected = score(PAIRS, *reranker)
    with ThreadPoolExecutor(8) as pool:
        assert all(logits == expected for logits in pool.map(lambda _: score(PAIRS, *reranker), range(8)))


SCORE = """
import sys
sys.path.insert(0, sys.argv[1])
from reranker_helpers import load_reranker, score
texts = ["Hi!", "The giant panda is a bear species endemic to China.", "The library pandas reads tables in Python."]
reranker = load_reranker(sys.argv[1] + "/tests/stand_in_model", device="cpu", dtype="int8")
print(*score([("what is a panda?", text) for text in texts], *reranker))
"""


def test_the_same_scores_whatever_else_runs():
    """A clock decided, once per process, whether int8 was fast enough for a shape. Processes that started at the same
    time, as the workers of a server do, decided differently, and the same pair got -2.55, -2.71 and -2.99."""
    command = [sys.executable, "-c", SCORE, str(Path(__file__).parent.parent)]
    running = [
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True)
        for threads in (1, 2, 1, 3)
    ]
    first, *others = [[float(logit) for logit in process.communicate()[0].split()] for process in running]
    assert len(first) == 3
    assert others == [pytest.approx(first, abs=1e-5)] * 3


def test_loading_twice_gives_the_same_and_leaves_the_folder_alone(tiny_folder):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny_folder.iterdir()}
    first, second = (score(PAIRS, *load_reranker(tiny_folder, device="cpu", dtype="int8")) for _ in range(2))
    assert first == second
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny_folder.iterdir()}


def test_int8_is_never_the_default(tiny_folder):
    assert not linears(load_reranker(tiny_folder, device="cpu").model)


def random_layer(inputs=256, outputs=128):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs).requires_grad_(False)


def error_of(part, source, rows):
    return quantising._error(part(rows), source(rows))


def test_inputs_far_from_zero_and_inputs_much_larger_than_others_cost_little():
    """XLM-RoBERTa's hidden states have both: without moving and stretching them int8 ranks the first stand-in at
    random (Kendall's tau .18 against float32)."""
    source, rows = random_layer(), torch.randn(300, 256)
    rows[:, 3] += 100
    rows[:, 7] *= 50
    plain = QuantisedLinear(source, Grid(torch.zeros(256), torch.ones(256), 255, False))
    (ours,) = quantising._quantised([source], rows, [source(rows)], one_sided=False)
    assert error_of(plain, source, rows) > 0.05
    assert error_of(ours, source, rows) < 0.02


def test_what_reads_first_tokens_only_stays_in_float32(tiny_folder):
    """It takes next to no time, and its errors reach the logit undiluted: half of int8's error on the stand-in."""
    model = load_reranker(tiny_folder, device="cpu", dtype="int8").model
    last = model.roberta.encoder.layer[-1]
    kept = [last.attention.self.query, last.attention.output.dense, last.intermediate.dense, last.output.dense]
    assert {type(part) for part in kept} == {torch.nn.Linear}


def test_a_layer_that_errs_too_much_stays_as_it_is(tmp_path, caplog):
    """Its outputs differ by what two large inputs, each different for each token, leave of one another."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    with torch.no_grad():
        values = model.roberta.encoder.layer[0].attention.self.value
        values.weight[:] = 1000 * torch.ones(32) + 1e-3 * torch.randn(32, 32)  # layer norm's outputs sum to a constant
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "reranker_helpers")
    reranker = load_reranker(tmp_path, device="cpu", dtype="int8")
    kept = reranker.model.roberta.encoder.layer[0].attention.self.value
    assert type(kept) is torch.nn.Linear
    assert torch.equal(kept.weight, values.weight)
    names = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    names = ", ".join(["layer.0.attention.self.value", *(f"layer.1.{name}" for name in names)])
    assert f"in float32 stay embeddings, layer norms, the head, {names};" in caplog.text
    assert isinstance(reranker.model.roberta.encoder.layer[0].attention.self.query, QuantisedLinear)


def test_products_that_overflow_are_never_used(monkeypatch):
    """AVX2 without VNNI adds pairs of products in 16 bits. What counts is the result."""
    true = quantised_linear._int8_linear

    def saturated(rows, weight, scale, zeros, bias):
        result = true(rows, weight, scale, zeros, bias)
        return result.clamp(max=1e6) if rows.max() > 127 else result

    monkeypatch.setattr(quantised_linear, "_int8_linear", saturated)
    assert quantised_linear._exact_levels(128, 256) == 127
    monkeypatch.setattr(quantised_linear, "_int8_linear", lambda *arguments: true(*arguments) * 1.001)
    assert quantised_linear._exact_levels(128, 256) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_where_int8_cannot_be_fast_one_warning_names_a_better_dtype(tiny_folder, monkeypatch, caplog, dtype):
    """It was silent: weights rounded to 8 bits, widened at each use, and slower than float32."""
    monkeypatch.setattr(quantised_linear, "_int8_linear", lambda *_: torch.ops.no.such_op())
    monkeypatch.setattr(quantising, "multiplies_in", lambda _: dtype == "bfloat16")
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith(f"so int8 only saves memory: dtype='{dtype}' is faster")
    assert len(score(PAIRS, *reranker)) == len(PAIRS)


def test_seven_bits_are_exact_on_any_processor():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, 128, (40, 1024), generator=generator).to(torch.uint8)
    weight = torch.randint(-127, 128, (64, 1024), generator=generator).to(torch.int8)
    weight[:32] = 127
    ready = torch.ops.onednn.qlinear_prepack(weight, None)
    found = quantised_linear._int8_linear(rows, ready, torch.ones(64), torch.zeros(64, dtype=torch.int32), None)
    assert torch.equal(found.long(), rows.long() @ weight.long().T)  # below 2 ** 24, so exact in float32 too


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_rounded_away(bad, levels):
    layer = QuantisedLinear(random_layer(), Grid(torch.zeros(256), torch.ones(256), levels, False))
    rows = torch.randn(3, 256)
    rows[1, 5] = bad
    finite = layer(rows).isfinite().all(1).tolist()
    assert finite == [True, False, True]


def test_rows_of_zeros(levels):
    source = random_layer()
    for one_sided in (False, True):
        layer = QuantisedLinear(source, Grid(torch.zeros(256), torch.ones(256), levels, one_sided))
        assert layer(torch.zeros(2, 256)) == pytest.approx(source.bias.expand(2, -1), abs=1e-6)


def test_on_a_gpu_it_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="dtype is 'int8', which is for the CPU, and device is 'cuda': pass another"):
        load_reranker(tiny_folder, device="cuda", dtype="int8")


def test_another_architecture_is_refused_before_its_weights_are_loaded(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="dtype is 'int8', which is for XLM-RoBERTa, and this model is of the type 'be"
    ):
        load_reranker(tmp_path, device="cpu", dtype="int8")


@pytest.mark.parametrize(
    "part", ["", "roberta", "roberta.encoder.layer.1", "roberta.encoder.layer.0.attention.self.key"]
)
@pytest.mark.parametrize("change", [lambda part: part.half(), lambda part: part.to("meta"), torch.nn.Module.double])
def test_a_change_of_type_or_device_is_refused_before_anything_changes(tiny_folder, part, change):
    """The embeddings had been converted by the time that a layer refused, and after `.float()` scores were others."""
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    expected = score(PAIRS, *reranker)
    with pytest.raises(TypeError, match="an int8 model stays on the CPU: load it again"):
        change(reranker.model.get_submodule(part))
    assert reranker.model.float().to("cpu") is reranker.model
    assert score(PAIRS, *reranker) == expected


def test_saving_is_refused(tiny_folder, tmp_path):
    """Not a folder without most of its weights."""
    model = load_reranker(tiny_folder, device="cpu", dtype="int8").model
    refused = "made when it is loaded and cannot be saved, nor sent .*: save the one it was made from"
    for save in (model.save_pretrained, lambda path: torch.save(model, path / "model"), lambda _: pickle.dumps(model)):
        with pytest.raises(TypeError, match=refused):
            save(tmp_path)


def test_a_copy_scores_like_the_original(tiny_folder):
    """It failed with "Cannot access storage of OpaqueTensorImpl"."""
    reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
    copied = copy.deepcopy(reranker)
    assert score(PAIRS, *copied) == score(PAIRS, *reranker)
    assert copied.model.half.__self__ is copied.model
    with pytest.raises(TypeError, match="an int8 model stays on the CPU"):
        copied.model.half()


def test_a_plain_call_needs_no_mode_of_torch(tiny_folder):
    model, tokenizer, _ = load_reranker(tiny_folder, device="cpu", dtype="int8")
    ids = tokenizer([QUERY], ["panda"], return_tensors="pt")
    expected = score([(QUERY, "panda")], model, tokenizer, CPU)
    assert model(**ids).logits.flatten().tolist() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(tiny_folder, default):
    """Loading failed with "an int8 model stays on the CPU", and in that process once and for all."""
    expected = score(PAIRS, *load_reranker(tiny_folder, device="cpu", dtype="int8"))
    products._found.clear()
    torch.set_default_dtype(default)
    try:
        reranker = load_reranker(tiny_folder, device="cpu", dtype="int8")
        assert score(PAIRS, *reranker) == pytest.approx(expected, abs=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_quantising_twice_is_refused(tiny):
    """The second time destroyed the model."""
    quantising.quantise(tiny.model, tiny.tokenizer)
    expected = score(PAIRS, *tiny)
    with pytest.raises(ValueError, match="the model is in int8 already"):
        quantising.quantise(tiny.model, tiny.tokenizer)
    assert score(PAIRS, *tiny) == expected


@pytest.mark.parametrize("layers", [0, 3])
def test_after_ctrl_c_the_model_is_as_it_was_or_says_that_it_is_not(tiny, monkeypatch, layers):
    """It was left half converted, and failed later with "_Pending has no forward"."""
    expected = score(PAIRS, *tiny)
    results = iter([quantising._quantised] * layers)

    def interrupted(*arguments):
        for work in results:
            return work(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(quantising, "_quantised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantising.quantise(tiny.model, tiny.tokenizer)
    if layers:
        with pytest.raises(RuntimeError, match=r"quantising this model was interrupted.*: load it again"):
            score(PAIRS, *tiny)
    else:
        assert score(PAIRS, *tiny) == expected


def test_without_a_safetensors_file_embeddings_stay_in_memory(tiny):
    exact = score(PAIRS, *tiny)
    quantising.quantise(tiny.model, tiny.tokenizer)
    assert in_one_order(score(PAIRS, *tiny), exact) > 0.95
    with pytest.raises(ValueError, match="int8 takes an unchanged XLM-RoBERTa in float32 on the CPU"):
        quantising.quantise(make_model(len(tiny.tokenizer)).half(), tiny.tokenizer)


def test_weights_are_held_once():
    """The float32 weights of a layer go as soon as it is quantised, and its int8 weights are there once only."""
    source = random_layer(1024, 1024)
    layer = QuantisedLinear(source, Grid(torch.zeros(1024), torch.ones(1024), 255, False))
    tensors = [value for part in layer.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.element_size() * tensor.numel() for tensor in tensors) < 1.05 * 1024 * 1024


MEASURE = """
import sys
sys.path[:0] = sys.argv[1:3]
import logging, torch, transformers
from tiny import make_tokenizer
from reranker_helpers import load_reranker, score

def of(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000

transformers.XLMRobertaForSequenceClassification  # importing it takes 130 MB
before = of("RssAnon")
reranker = load_reranker(sys.argv[3], device="cpu", dtype="int8")
score([("bear", "panda")], *reranker)
print(of("RssAnon") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_an_int8_model_takes_little_memory(request, tmp_path):
    """Four layers of full width and 50,000 positions: 410 MB in float32, 50 MB in int8 and with the table in its file.
    The rest of the limit is for what a first call of torch takes, and for gaps that loading leaves in the heap."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4}
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=50_002,
        type_vocab_size=1,
        num_labels=1,
        pad_token_id=1,
        **sizes,
    )
    transformers.XLMRobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    here = request.path.parent
    command = [sys.executable, "-c", MEASURE, str(here), str(here.parent), str(tmp_path)]
    added = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert added < 300
