"""Incomplete and damaged models are refused, by name. Transformers fills what is missing with random numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from reranker_helpers import load_reranker

TYPES = "roberta.embeddings.token_type_embeddings.weight"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 2271071852\n"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny reranker's folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder, message):
    with pytest.raises(OSError, match=message) as caught:
        load_reranker(folder)
    assert str(folder) in str(caught.value)


def test_without_the_tokenizers_files(folder):
    """Transformers 5 made a tokenizer of five tokens: each word was unknown, and the ranking nonsense."""
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, "holds no complete model: .*tokenizer")


@pytest.mark.parametrize(
    "family", ["Bert", "DistilBert", "Roberta", "Camembert", "DebertaV2", "Qwen2", "GPT2", "Albert"]
)
def test_without_the_tokenizers_files_in_other_families(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(tmp_path)
    refused(tmp_path, "holds no complete model: .*tokenizer")


@pytest.mark.parametrize("count", [1, 100])
def test_a_tokenizer_of_another_model(folder, count):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(count)])
    tokenizer.save_pretrained(folder)
    rows = len(make_tokenizer())
    refused(folder, rf"token ids up to {rows + count - 1}, but the model has embeddings for {rows} tokens")


def test_a_tokenizer_with_fewer_tokens_is_fine(folder):
    """Embeddings are often rounded up to a multiple of 64."""
    make_model(128).save_pretrained(folder)
    assert load_reranker(folder)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda weights: {k: v for k, v in weights.items() if "classifier" not in k}, r"classifier\.dense\.bias"),
        (
            lambda weights: {k: v for k, v in weights.items() if "layer.1." not in k},
            r"encoder\.layer\.1\..* and 11 more",
        ),
        (lambda weights: {f"model.{k}": v for k, v in weights.items()}, r"classifier\.dense\.bias.* and 36 more"),
        (lambda weights: {k: v for k, v in weights.items() if k != "classifier.out_proj.bias"}, "out_proj.bias, which"),
    ],
    ids=["encoder only", "a layer", "a prefix", "a single vector"],
)
def test_missing_weights(folder, change, missing):
    """They were random numbers, others at each load."""
    change_weights(folder, change)
    refused(folder, f"its weights lack .*{missing}")


def test_more_layers_in_the_config_than_in_the_weights(folder):
    change_config(folder, num_hidden_layers=3)
    refused(folder, r"its weights lack roberta\.encoder\.layer\.2\.")


def test_fewer_layers_in_the_config_than_in_the_weights(folder):
    """The upper layers were left out without a word."""
    change_config(folder, num_hidden_layers=1)
    refused(folder, r"no place for, so scores would be wrong: roberta\.encoder\.layer\.1\.")


@pytest.mark.parametrize("values", [{"hidden_size": 64}, {"vocab_size": 200}])
def test_other_sizes_in_the_config_than_in_the_weights(folder, values):
    change_config(folder, **values)
    refused(folder, r"config\.json does not fit the weights: .*weight")


def test_weights_that_do_not_count_are_named(folder, caplog):
    extra = {"roberta.embeddings.position_ids": torch.arange(3), "lm_head.bias": torch.zeros(3)}
    change_weights(folder, lambda weights: weights | extra)
    assert load_reranker(folder)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("reranker_helpers")]
    assert message.endswith("holds weights that are not used: lm_head.bias")


def cut(file):
    file.write_bytes(file.read_bytes()[:-500])


def as_bin(folder, change):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    change(folder / "pytorch_model.bin")


def a_pointer(file):
    file.write_text(POINTER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: a_pointer(f / "model.safetensors"), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty"),
        (lambda f: cut(f / "model.safetensors"), r"model\.safetensors has [\d,]+ bytes of [\d,]+: it is cut off"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 9),
            r"model\.safetensors is not a safetensors file",
        ),
        (lambda f: as_bin(f, a_pointer), r"pytorch_model\.bin is a Git LFS pointer"),
        (lambda f: as_bin(f, lambda file: file.write_bytes(b"")), r"pytorch_model\.bin is empty"),
        (lambda f: as_bin(f, cut), r"pytorch_model\.bin is cut off after [\d,]+ bytes"),
        (lambda f: a_pointer(f / "config.json"), r"config\.json is a Git LFS pointer"),
        (lambda f: (f / "config.json").write_text('{"model_type":'), r"config\.json is not valid JSON"),
        (lambda f: a_pointer(f / "tokenizer.json"), r"tokenizer\.json is a Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json holds no tokenizer"),
        (lambda f: cut(f / "tokenizer.json"), r"tokenizer\.json is not valid JSON, or is cut off"),
    ],
)
def test_files_that_cannot_be_read(folder, damage, message):
    """Each format had an error of its own, of which one advised to switch off a safeguard, and none named the file."""
    damage(folder)
    refused(folder, message)


@pytest.mark.skipif(
    int(torch.__version__.split(".")[1]) < 6 and torch.__version__.startswith("2."),
    reason="Transformers reads no pickled weights with torch before 2.6",
)
def test_a_whole_pytorch_model_loads(folder):
    as_bin(folder, lambda file: None)
    assert load_reranker(folder)


def test_a_damaged_copy_in_the_hubs_cache(tiny_folder, tmp_path, monkeypatch):
    """A download that was broken off: the error names the folder to delete, not the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--someone--reranker"
    snapshot = Path(shutil.copytree(tiny_folder, cache / "snapshots" / commit))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    cut(snapshot / "model.safetensors")
    for module in (transformers.utils.hub, transformers.utils.hub.constants):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.setattr(module, name, str(tmp_path), raising=False)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"the copy of someone/reranker in the cache is damaged: model\.safetensors"
    ) as caught:
        load_reranker("someone/reranker")
    assert f"Delete {snapshot}" in str(caught.value)


def test_a_tokenizer_without_the_token_types_that_tell_query_and_document_apart(folder, caplog):
    """The stand-in ranked at random, without a word, once somebody had saved its tokenizer with another class."""
    change_weights(folder, lambda weights: weights | {TYPES: weights[TYPES].repeat(2, 1)})
    change_config(folder, type_vocab_size=2)
    load_reranker(folder)
    assert "add token_type_ids to model_input_names in tokenizer_config.json" in caplog.text
    caplog.clear()
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": names}))
    load_reranker(folder)
    assert "token_type_ids" not in caplog.text
