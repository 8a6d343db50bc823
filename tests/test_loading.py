"""`load_reranker`: the defaults, what it refuses, and what it says when weights can't be had."""

import doctest
import importlib
import inspect
import json
import logging
import pkgutil
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

import reranker_helpers
from reranker_helpers import Reranker, load_reranker, products, quantised_linear, rerank, score


def test_a_folder_loads_ready_to_rerank(tiny_folder, caplog):
    caplog.set_level(logging.INFO, "reranker_helpers")
    reranker = load_reranker(tiny_folder)
    model, tokenizer, device = reranker
    assert isinstance(reranker, Reranker)
    assert not model.training
    assert next(model.parameters()).device == torch.empty(0, device=device).device
    assert model.dtype == (torch.float16 if device.type == "cuda" else torch.float32)
    assert len(rerank("panda", ["bear", "bread"], model, tokenizer, device)) == 2
    (record,) = caplog.records
    assert str(device) in record.getMessage()
    assert "the default on" in record.getMessage()


@pytest.mark.parametrize(
    ("instructions", "levels", "named"),
    [
        (None, None, "(asked for)"),
        (None, 127, "; faster here, but less exact: dtype='int8')"),
        ("_is_avx512_bf16_supported", 255, "; faster here, but less exact: dtype='bfloat16' or 'int8')"),
        ("_is_amx_tile_supported", None, "; faster here, but less exact: dtype='bfloat16')"),
    ],
)
def test_the_log_names_what_is_faster_than_float32_on_this_processor(
    tiny_folder, monkeypatch, caplog, instructions, levels, named
):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions, raising=False)
    monkeypatch.setattr(quantised_linear, "_exact_levels", lambda *_: levels)
    monkeypatch.setattr(products, "_found", {})
    caplog.set_level(logging.INFO, "reranker_helpers")
    load_reranker(tiny_folder, device="cpu", dtype="float32")
    load_reranker(tiny_folder, device="cpu", dtype="bfloat16")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].endswith(named)
    assert messages[1].endswith("in torch.bfloat16 (asked for)")


@pytest.mark.parametrize("function", [rerank, score])
def test_its_methods_are_the_functions(tiny, monkeypatch, function):
    """Users of other rerankers write `reranker.rerank(...)`, and got an AttributeError."""
    method, wanted = getattr(tiny, function.__name__), inspect.signature(function)
    parameters = [p for p in wanted.parameters.values() if p.name not in ("model", "tokenizer", "device")]
    assert inspect.signature(method) == wanted.replace(parameters=parameters)
    passed = {p.name: object() for p in parameters}
    monkeypatch.setattr(
        f"reranker_helpers.reranker.{function.__name__}", lambda *args, **kwargs: wanted.bind(*args, **kwargs).arguments
    )
    assert method(**passed) == passed | tiny._asdict()


def test_it_shows_itself_in_one_line(tiny, tiny_folder):
    """Notebooks printed the tree of all modules."""
    for dtype in ("bfloat16", "int8"):
        shown = f"Reranker({tiny_folder}, {dtype} on cpu, reads at most 8192 tokens)"
        assert repr(load_reranker(tiny_folder, device="cpu", dtype=dtype)) == shown
    assert repr(tiny).startswith("Reranker(XLMRobertaForSequenceClassification, float32 on cpu")
    assert repr(Reranker(print, tiny.tokenizer, tiny.device)).startswith("Reranker(builtin_function_or_method, ")


def test_without_cuda_the_default_is_the_cpu(tiny_folder, monkeypatch):
    """Never MPS by itself, even where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert load_reranker(tiny_folder).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_as_string_or_torch_dtype(tiny_folder, dtype):
    assert load_reranker(str(tiny_folder), device="cpu", dtype=dtype).model.dtype == torch.bfloat16


def test_weights_stored_in_float8(tiny_folder, tmp_path):
    """As the stand-in's are. Transformers 4 did not convert them, and torch adds no numbers in float8."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tiny_folder / "model.safetensors")
    save_file(
        {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}, tmp_path / "model.safetensors"
    )
    reranker = load_reranker(tmp_path, device="cpu")
    assert {weight.dtype for weight in reranker.model.parameters()} == {torch.float32}
    assert len(rerank("panda", ["bear", "bread"], *reranker)) == 2


@pytest.mark.parametrize("dtype", ["float31", "nn", torch.int16, 16, "float8_e4m3fn", torch.float8_e4m3fn])
def test_bad_dtype(tiny_folder, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*, expected 'float32', 'float16', 'bfloat16'"):
        load_reranker(tiny_folder, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_cuda(tiny_folder, device):
    with pytest.raises(RuntimeError, match=r"sees 0 CUDA devices: .* or pass device='cpu'"):
        load_reranker(tiny_folder, device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_mps_without_mps(tiny_folder):
    with pytest.raises(RuntimeError, match="finds no Apple GPU: pass device='cpu'"):
        load_reranker(tiny_folder, device="mps")


def test_a_model_with_two_labels_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(len(tokenizer), num_labels=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # 2.3 GB must not be fetched only to be refused
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        load_reranker(tmp_path)


def test_an_incomplete_folder(tiny_folder, tmp_path):
    with pytest.raises(OSError, match=r"holds no complete model: it needs config\.json, model\.safetensors"):
        load_reranker(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(OSError, match="holds no complete model"):
        load_reranker(tmp_path)


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, {}),
        ({"model_type": "pegasus", "auto_map": {"AutoModelForSequenceClassification": "mine.Model"}}, {}),
        ({"model_type": "doge"}, {"tokenizer_class": None, "auto_map": {"AutoTokenizer": [None, "mine.Tokenizer"]}}),
    ],
    ids=["config", "model", "tokenizer"],
)
def test_code_of_the_models_own(tiny_folder, tmp_path, monkeypatch, config, tokenizer):
    """Transformers asked on the terminal, for 15 seconds, whether to run it."""
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 1}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokenizer))
    with pytest.raises(OSError, match=r"needs code of its own, .* yourself with trust_remote_code=True, and pass them"):
        load_reranker(folder)


def test_nothing_but_torch_and_transformers_is_imported():
    """People copy the package into their own project. tqdm, tokenizers and numpy come with transformers."""
    code = (
        "import sys, torch, transformers, tokenizers, tqdm.auto; from transformers import AutoConfig, AutoTokenizer, "
        "AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase; before = set(sys.modules); "
        "import reranker_helpers; new = set(sys.modules) - before; "
        "print(sorted(m for m in new if m.partition('.')[0] not in ('reranker_helpers', 'transformers', 'torch')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_importing_takes_no_longer_than_torch_and_transformers():
    """Transformers loads its models' code when it is first asked for, which takes longer than all the rest."""
    code = (
        "import sys, torch, transformers; before = set(sys.modules); import reranker_helpers; "
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('transformers.')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_examples_in_docstrings_are_true(monkeypatch):
    """Of the whole package. What `load_reranker` loads by default is the stand-in here."""
    monkeypatch.setattr(load_reranker, "__defaults__", (Path(__file__).with_name("stand_in_model"),))
    names = [module.name for module in pkgutil.iter_modules(reranker_helpers.__path__, "reranker_helpers.")]
    results = [
        doctest.testmod(
            importlib.import_module(name), extraglobs={"score": score, "reranker": load_reranker(device="cpu")}
        )
        for name in ["reranker_helpers", *names]
    ]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 20
