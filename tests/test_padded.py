"""Models of other kinds: the same score alone and in a batch, and lengths up to their real limit."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import QUERY, make_tokenizer, random_documents
from transformers import AutoModelForSequenceClassification

from reranker_helpers import load_reranker, rerank, score
from reranker_helpers.checks import COUNT_FROM_PAD

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "num_labels": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 100_000
    return tokenizer


def make(model_type, tokenizer, **values):
    """A tiny model of any architecture, with weights wide enough for scores to differ clearly."""
    torch.manual_seed(0)
    values = SIZES | {"vocab_size": len(tokenizer)} | values
    if model_type == "longformer":
        values["attention_window"] = [8, 8]
    config = transformers.CONFIG_MAPPING[model_type](**values)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model


def alone_and_together(model, tokenizer, **options):
    pairs = [(QUERY, text) for text in [*random_documents(1, 12), "panda", "bear"]]
    options = {"max_length": 60, "batch_tokens": 1000} | options
    return [score([pair], model, tokenizer, "cpu", **options)[0] for pair in pairs], score(
        pairs, model, tokenizer, "cpu", **options
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "model_type", ["bert", "distilbert", "mpnet", "electra", "modernbert", "gpt2", "llama", "qwen2"]
)
def test_a_score_does_not_depend_on_the_batch(tokenizer, model_type, side):
    """With a tokenizer that pads on the left, as decoders' do, a BERT counted positions from the padding."""
    tokenizer.padding_side = side
    alone, together = alone_and_together(make(model_type, tokenizer), tokenizer)
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 0.1


@pytest.mark.parametrize("model_type", ["mobilebert", "convbert", "nystromformer", "yoso"])
def test_models_that_padding_disturbs(tokenizer, caplog, model_type):
    """They mix neighbouring tokens in spite of the attention mask, so that scores were wrong by up to 1."""
    model = make(model_type, tokenizer)
    alone, together = alone_and_together(model, tokenizer)
    assert together == pytest.approx(alone, abs=1e-4)
    alone_and_together(model, tokenizer)
    assert caplog.text.count("so only texts of equal length are scored together") == 1


def test_a_model_that_reads_the_last_position(tokenizer, caplog):
    """What is called like a classifier may have been made for a tokenizer that pads on the left."""
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    values = torch.randn(len(tokenizer))

    def model(input_ids, attention_mask):
        return SimpleNamespace(logits=values[input_ids[:, -2:]].sum(1, keepdim=True))

    alone, together = alone_and_together(model, tokenizer)
    assert together == alone
    assert "Padding changes the scores of function" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_disturbance(tokenizer, caplog, dtype):
    alone_and_together(make("bert", tokenizer).to(dtype), tokenizer)
    assert not caplog.records


def test_without_a_pad_token(tokenizer, caplog):
    """It was an error about NoneType, and only when lengths differed."""
    expected = alone_and_together(make("llama", tokenizer), tokenizer)[0]
    tokenizer.pad_token = None
    model = make("llama", tokenizer, pad_token_id=None)
    alone, together = alone_and_together(model, tokenizer)
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(expected, abs=1e-4)
    assert caplog.text.count("set tokenizer.pad_token and model.config.pad_token_id") == 1
    caplog.clear()
    model.config.pad_token_id = 1  # the model's own serves as well
    assert alone_and_together(model, tokenizer)[1] == pytest.approx(expected, abs=1e-4)
    assert not caplog.records


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "mpnet"])
def test_without_the_pad_token_that_positions_are_counted_from(tokenizer, tmp_path, model_type):
    """Such a model loads. Scoring it was an error about adding NoneType and int, and loading it in int8 one about bool
    and cumsum."""
    model = make(model_type, tokenizer, pad_token_id=None)
    message = rf"pad_token_id is None, but {model_type} counts positions from it.* \(the tokenizer has 1\), and load"
    with pytest.raises(ValueError, match=message):
        score([(QUERY, "panda")], model, tokenizer, "cpu", max_length=60)
    if model_type == "xlm-roberta":
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_reranker(tmp_path, device="cpu", dtype="int8")


def test_a_special_token_in_a_text_without_an_unknown_or_pad_token(tokenizer):
    """As with Llama 3's tokenizer: it was torch's error about the dtype of NoneType."""
    tokenizer.unk_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"a text spells out a special token.*: set tokenizer\.pad_token"):
        score([(QUERY, "panda </s>")], make("llama", tokenizer, pad_token_id=None), tokenizer, "cpu", max_length=60)


def test_two_pad_tokens_that_differ(tokenizer):
    """A decoder looks for the end of a text by its own pad token: scores were wrong by up to 2.4 in batches."""
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token_id is 1, but model\.config\.pad_token_id is 2"):
        score([(QUERY, "panda")], make("llama", tokenizer, pad_token_id=2), tokenizer, "cpu")


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "xlm-roberta"])
def test_a_config_without_return_dict(tokenizer, tmp_path, model_type):
    """The model then returns a tuple, and within Transformers' ModernBERT that even fails."""
    model = make(model_type, tokenizer)
    pairs = [(QUERY, "panda"), (QUERY, "the bear")]
    expected = score(pairs, model, tokenizer, "cpu", max_length=60)
    model.config.return_dict = False
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert score(pairs, *load_reranker(tmp_path, device="cpu"), max_length=60) == pytest.approx(expected, abs=1e-5)
    if model_type == "bert":
        assert score(pairs, model, tokenizer, "cpu", max_length=60) == expected


# Those that need a picture, a page or a language beside the text are left out.
TEXT_ONLY = sorted(COUNT_FROM_PAD - {"layoutlmv3", "markuplm", "lilt", "xmod"})


@pytest.mark.parametrize(
    "model_type", [*TEXT_ONLY, "bert", "distilbert", "electra", "modernbert", "gpt2", "deberta-v2"]
)
def test_the_limit_is_the_models(tokenizer, model_type):
    """CamemBERT accepted 514 tokens and crashed; on CUDA such an index ends the process."""
    model = make(model_type, tokenizer)
    limit = 64 if model_type in COUNT_FROM_PAD else 66
    with pytest.raises(ValueError, match=f"the model reads at most {limit} tokens"):
        score([(QUERY, "panda")], model, tokenizer, "cpu", max_length=limit + 1)
    (result,) = rerank(QUERY, ["panda " * 100], model, tokenizer, "cpu", max_length=limit)
    assert result.tokens == limit


def test_a_model_of_unlimited_length(tokenizer):
    """XLNet's config says -1 positions: every call was refused, because "the model reads at most -1 tokens"."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_head": 8, "d_inner": 64}
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, **sizes)
    alone, together = alone_and_together(transformers.XLNetForSequenceClassification(config).eval(), tokenizer)
    assert together == pytest.approx(alone, abs=1e-4)


def test_all_architectures_that_count_positions_from_the_padding_are_known():
    """Read off the installed Transformers: which of the classifiers make position numbers from token ids."""
    from pathlib import Path

    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    models = Path(transformers.__file__).parent / "models"
    found = set()
    for model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        file = models / module / f"modeling_{module}.py"
        if file.exists() and "create_position_ids_from_input_ids" in file.read_text():
            found.add(model_type)
    assert "camembert" in found
    assert found <= COUNT_FROM_PAD
