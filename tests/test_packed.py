"""The packed path: the scores of the plain loop, nothing changed, and the model's own way whenever in doubt."""

import json
import math
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import QUERY, WORDS, plain_score, random_documents

from reranker_helpers import load_reranker, packed, padded, products, score, scoring, tokenising

CPU = torch.device("cpu")
ROUTES = {"torch": F.linear, "onednn": products._onednn_linear}


@pytest.fixture
def packs(monkeypatch):
    """How many texts each batch had that took the packed path."""
    sizes = []

    def counted(windows, *reranker):
        sizes.append(len(windows))
        return packed.run_packed(windows, *reranker)

    monkeypatch.setattr(scoring, "run_packed", counted)
    return sizes


def plain(tiny, texts, **options):
    return [plain_score(QUERY, text, tiny.model, tiny.tokenizer, **options) for text in texts]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_plain_loop(tiny, packs, monkeypatch, route, seed):
    monkeypatch.setattr(products, "_route", lambda weight, bias: ROUTES[route])
    monkeypatch.setattr(packed, "SLICE", [1024, 100, 1][seed])
    texts = [*random_documents(seed), "", "panda"]
    logits = score([(QUERY, text) for text in texts], *tiny, batch_tokens=[512, 1, 100_000][seed])
    assert logits == pytest.approx(plain(tiny, texts), abs=1e-4)
    assert sum(packs) == len(set(texts))


def test_a_pair_of_8192_tokens_scores_as_in_the_plain_loop(tiny, packs):
    text = " ".join(random.Random(1).choices(WORDS, k=9000))
    expected = plain(tiny, [text], max_length=8192)
    assert score([(QUERY, text)], *tiny, max_length=8192) == pytest.approx(expected, abs=1e-4)
    assert packs == [1]


def test_a_pad_token_inside_a_text_gets_the_position_that_the_model_gives_it(tiny):
    ids = tiny.tokenizer(QUERY, "the panda bear")["input_ids"]
    ids[-3] = tiny.tokenizer.pad_token_id
    with torch.inference_mode():
        expected = tiny.model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        window = tokenising.Window((QUERY, ""), 0, 0, False, ids, [0] * len(ids))
        assert packed.run_packed([window], *tiny) == pytest.approx(expected, abs=1e-5)


def test_token_types_reach_the_model(tiny, packs):
    tiny.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tiny.model.config.type_vocab_size = 2
    torch.manual_seed(0)
    tiny.model.roberta.embeddings.token_type_embeddings = torch.nn.Embedding(2, 32)
    texts = random_documents(4)
    logits = score([(QUERY, text) for text in texts], *tiny)
    assert logits == pytest.approx(plain(tiny, texts), abs=1e-4)
    assert packs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [True, False])
def test_half_precision(tiny, packs, monkeypatch, dtype, has_instructions):
    """Weights in half precision: in the processor's own half arithmetic, or widened where it has none."""
    exact = plain(tiny, texts := random_documents(5))
    model = tiny.model.to(dtype)
    monkeypatch.setattr(packed, "multiplies_in", lambda dtype: has_instructions)
    logits = score([(QUERY, text) for text in texts], model, tiny.tokenizer, CPU)
    assert logits == pytest.approx(exact, abs=0.15)
    assert packs
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_threads_get_the_scores_of_one(tiny):
    """In a first call, too, when several threads find out the same things about the processor at the same time."""
    products._found.clear()
    texts = random_documents(6)
    expected = plain(tiny, texts)
    start = threading.Barrier(16)

    def work(_):
        start.wait()
        return score([(QUERY, text) for text in texts], *tiny)

    with ThreadPoolExecutor(16) as pool:
        assert all(logits == pytest.approx(expected, abs=1e-4) for logits in pool.map(work, range(16)))


def settings():
    return (
        torch.get_float32_matmul_precision(),
        getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None),  # not in older versions
        torch.backends.mkldnn.enabled,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.initial_seed(),
        torch.get_rng_state().tolist(),
    )


def test_no_setting_and_no_weight_is_changed(tiny):
    products._found.clear()
    before = settings()
    weights = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    modules = [(name, id(module), dict(vars(module))) for name, module in tiny.model.named_modules()]
    score([(QUERY, text) for text in random_documents(7)], *tiny)
    assert settings() == before
    assert all(torch.equal(weight, tiny.model.state_dict()[name]) for name, weight in weights.items())
    assert modules == [(name, id(module), dict(vars(module))) for name, module in tiny.model.named_modules()]


def test_no_setting_is_changed_by_an_error(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    before = settings()
    monkeypatch.setattr(packed, "_feed_forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        score([(QUERY, "panda")], *tiny)
    assert settings() == before


def rounded(dtype):
    """What a processor does that multiplies float32 in a narrower type."""
    return lambda rows, weight, bias: F.linear(rows.to(dtype).float(), weight.to(dtype).float(), bias)


@pytest.mark.parametrize("route", [rounded(torch.bfloat16), rounded(torch.float16), lambda *_: torch.ops.no.such_op()])
def test_a_route_that_rounds_or_fails_is_never_taken(monkeypatch, route):
    """Intel's AMX can multiply float32 as bfloat16; whatever decides about that, what counts is the result."""
    monkeypatch.setattr(products, "_onednn_linear", route)
    monkeypatch.setattr(products, "seconds", lambda *works: [1.0, 2.0])  # it looks twice as fast
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    assert products._faster_route(weight, torch.zeros(256)) is F.linear


def test_the_faster_of_two_exact_routes_is_taken(monkeypatch):
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(products, "seconds", lambda *works: [2.0, 1.0])
    assert products._faster_route(weight, torch.zeros(256)) is F.linear
    monkeypatch.setattr(products, "seconds", lambda *works: [1.0, 2.0])
    assert products._faster_route(weight, torch.zeros(256)) is products._onednn_linear
    with torch.backends.mkldnn.flags(enabled=False):
        assert products._faster_route(weight, torch.zeros(256)) is F.linear


def test_onednn_is_as_exact_as_float32_can_be():
    generator = torch.Generator().manual_seed(2)
    rows, weight, bias = (torch.randn(size, generator=generator) for size in [(64, 1024), (512, 1024), (512,)])
    exact = F.linear(rows.double(), weight.double(), bias.double())
    error = (products._onednn_linear(rows, weight, bias) - exact).abs().max() / exact.abs().max()
    assert error < 1e-5


def test_a_setting_of_the_user_is_asked_about_anew(tiny):
    score([(QUERY, "panda")], *tiny)
    count = len(products._found)
    torch.set_float32_matmul_precision("medium")
    try:
        score([(QUERY, "panda")], *tiny)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(products._found) > count


class Subclass(transformers.XLMRobertaForSequenceClassification):
    """Someone's own model."""


class Adapter(torch.nn.Linear):
    """Such as LoRA's."""


def change(model, how):
    dense = model.roberta.encoder.layer[1].output.dense
    if how == "hook":
        dense.register_forward_hook(lambda *_: None)
    elif how == "pre-hook":
        model.register_forward_pre_hook(lambda *_: None)
    elif how == "forward":
        dense.forward = torch.nn.Linear(64, 32).forward
    elif how == "adapter":
        model.roberta.encoder.layer[1].output.dense = Adapter(64, 32)
    elif how == "compiled":
        return torch.compile(model, backend="eager")
    elif how == "compiled in place":
        model.compile(backend="eager")
    elif how == "quantised":
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    elif how == "subclass":
        model.__class__ = Subclass
    elif how == "mixed":
        dense.double()
    elif how == "attention":
        model.config._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize(
    "how",
    [
        "hook",
        "pre-hook",
        "forward",
        "adapter",
        "compiled",
        "compiled in place",
        "quantised",
        "subclass",
        "mixed",
        "attention",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_was_changed_runs_its_own_way(tiny, how):
    assert packed.can_pack(tiny.model, CPU)
    assert not packed.can_pack(change(tiny.model, how), CPU)


def replace_by(make):
    def change(parent, name):
        setattr(parent, name, make(getattr(parent, name)))

    return change


def scaled(attention):
    attention.scaling = 3 * getattr(attention, "scaling", 0.1)  # older versions have no such attribute, and ignore it


LINEAR = [
    replace_by(lambda part: torch.nn.Sequential(part, torch.nn.Tanh())),
    replace_by(lambda part: torch.nn.Linear(part.in_features, part.out_features, bias=False)),
    replace_by(
        lambda part: torch.nn.Sequential(torch.nn.Linear(part.in_features, 3), torch.nn.Linear(3, part.out_features))
    ),
    replace_by(lambda part: torch.nn.utils.parametrizations.weight_norm(part)),
]
NORM = [
    replace_by(lambda part: torch.nn.RMSNorm(part.normalized_shape)),
    replace_by(lambda part: torch.nn.Identity()),
    replace_by(lambda part: torch.nn.LayerNorm(part.normalized_shape, elementwise_affine=False)),
    replace_by(lambda part: torch.nn.LayerNorm(part.normalized_shape, eps=0.5)),
]
CHANGES = {
    "classifier.dense": [*LINEAR, replace_by(lambda part: torch.nn.Identity())],
    "classifier.out_proj": LINEAR,
    "roberta.embeddings.LayerNorm": NORM,
    "roberta.embeddings.word_embeddings": [replace_by(lambda part: torch.nn.Sequential(part, torch.nn.Tanh()))],
    "roberta.encoder.layer.0": [lambda parent, name: scaled(parent[0].attention.self)],
    "roberta.encoder.layer.0.attention.self.query": LINEAR,
    "roberta.encoder.layer.1.attention.self.value": LINEAR,
    "roberta.encoder.layer.0.attention.output.dense": LINEAR,
    "roberta.encoder.layer.0.attention.output.LayerNorm": NORM,
    "roberta.encoder.layer.1.intermediate.dense": LINEAR,
    "roberta.encoder.layer.1.intermediate.intermediate_act_fn": [
        replace_by(lambda part: torch.nn.Softmax(dim=1)),
        replace_by(lambda part: torch.nn.ReLU()),
    ],
    "roberta.encoder.layer.1.output.dense": LINEAR,
    "roberta.encoder.layer.1.output.LayerNorm": NORM,
}


@pytest.mark.parametrize("seed", range(30))
def test_a_model_with_changed_parts_scores_as_in_transformers(tiny, seed):
    """Such as a compressed one. Parts that are modules of torch passed for unchanged: `attention.scaling` was ignored
    without an error, and a Sequential had "no attribute 'grid'"."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    for path in generator.sample(sorted(CHANGES), k=generator.randint(1, 3)):
        parent, _, name = path.rpartition(".")
        generator.choice(CHANGES[path])(tiny.model.get_submodule(parent), name)
    texts = random_documents(seed, count=6)
    tiny.model.eval()
    expected = plain(tiny, texts)
    assert all(map(math.isfinite, expected))
    assert score([(QUERY, text) for text in texts], *tiny) == pytest.approx(expected, abs=1e-4)


def test_a_hook_for_all_modules_is_called(tiny, packs):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        score([(QUERY, "panda")], *tiny)
    finally:
        handle.remove()
    assert seen
    assert not packs


def test_the_default_device_does_not_matter(tiny, packs):
    expected = plain(tiny, texts := random_documents(3))
    with torch.device("meta"):
        assert score([(QUERY, text) for text in texts], *tiny) == pytest.approx(expected, abs=1e-4)
    assert packs


def test_bfloat16_does_not_make_documents_tie():
    """With the head in bfloat16, too, 94 of 176 documents had the score of another one."""
    reranker = load_reranker(Path(__file__).with_name("stand_in_model"), device="cpu", dtype="bfloat16")
    lines = (Path(__file__).parent / "data/python_faq/documents.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:60]]
    assert len(set(score([("How do I copy a file?", text) for text in texts], *reranker))) == len(set(texts))


def test_hooks_are_called(tiny, packs):
    seen = []
    tiny.model.register_forward_hook(lambda *_: seen.append(1))
    assert score([(QUERY, "panda")], *tiny) == pytest.approx(plain(tiny, ["panda"]), abs=1e-4)
    assert seen
    assert not packs


def test_autocast_is_respected(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        assert not packed.can_pack(tiny.model, CPU)


def test_other_architectures_run_their_own_way(tiny, packs):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=1,
        pad_token_id=1,
    )
    bert = transformers.BertForSequenceClassification(config).eval()
    tiny.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = random_documents(8)
    expected = [plain_score(QUERY, text, bert, tiny.tokenizer) for text in texts]
    assert score([(QUERY, text) for text in texts], bert, tiny.tokenizer, CPU) == pytest.approx(expected, abs=1e-4)
    assert not packs


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older versions make their own masks")
def test_ready_masks_give_the_same_logits(tiny):
    """On a GPU the mask is given as Transformers would make it, so that it need not look at its values."""
    assert padded._takes_ready_masks(tiny.model)
    batch = tiny.tokenizer([QUERY] * 3, ["panda", "the panda bear", ""], padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1).tolist()
    mask = padded._ready_mask(batch["attention_mask"], lengths)
    with torch.inference_mode():
        ours = tiny.model(batch["input_ids"], attention_mask=mask).logits
        assert ours == pytest.approx(tiny.model(**batch).logits, abs=1e-6)
    assert padded._ready_mask(batch["attention_mask"], [7, 7, 7]) is None


MEASURE = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, transformers
from tiny import make_tokenizer
from reranker_helpers import score

tokenizer = make_tokenizer()
config = transformers.XLMRobertaConfig(
    vocab_size=len(tokenizer), hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096,
    max_position_embeddings=8194, type_vocab_size=1, num_labels=1, pad_token_id=1,
)
model = transformers.XLMRobertaForSequenceClassification(config).eval()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1000

def now():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000

texts = {"warm up": ["panda"], "documents": ["panda " * 600, f"bear {'panda ' * 500}"] +
         ["panda " * (60 + i) for i in range(90)] + ["panda " * (500 - i) for i in range(8)], "long": ["panda " * 9000],
         "cut": ["panda " * 20000]}
for name, documents in texts.items():
    query = "bear " * 500 if name == "cut" else "bear"
    open("/proc/self/clear_refs", "w").write("5")
    before = now()
    score([(query, document) for document in documents], model, tokenizer, "cpu",
          max_length=8192 if name == "long" else 512)
    print(name, peak() - before, sep=":")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_scoring_adds_little_memory(request):
    """What scoring adds to the loaded model, at full width. Layers add nothing: each frees what the one before took."""
    here = request.path.parent
    command = [sys.executable, "-c", MEASURE, str(here), str(here.parent)]
    limits = {"documents": 180, "long": 250, "cut": 150}  # megabytes; in ten runs: 98 to 160, 169, 12 to 28
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    added = {line.split(":")[0]: float(line.split(":")[1]) for line in output.splitlines()}
    # "cut": the tokenizer's own truncation makes 2,500 windows of that document, and takes 3 GB.
    assert {name: added[name] for name, limit in limits.items() if added[name] >= limit} == {}
