"""What all variants are given: the model's architecture, a tokenizer of the real one's size, and realistic texts."""

import bisect
import contextlib
import json
import random
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from reranker_helpers import MODEL_NAME

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(__file__).parent / ".cache"
QUERY = "How do I share global variables across modules, and why does a local variable hide them?"
VOCABULARY = 250_002


def build_model(layers: int, other: Path | None = None) -> tuple[str, str]:
    """Return the folder of the model, and one line that says what it is."""
    if other:
        return str(other.resolve()), other.name
    if layers == 24:
        with contextlib.suppress(Exception):  # not in the cache, whatever the reason
            return snapshot_download(MODEL_NAME, local_files_only=True), "the real weights and tokenizer"
    folder = CACHE / f"layers-{layers}"
    note = (
        f"{layers} of 24 layers, all widths as in {MODEL_NAME}, random weights, and a tokenizer of the real one's kind "
        f"and size ({VOCABULARY} Unigram pieces, trained on the texts of tests/data) instead of the real one"
    )
    if not (folder / "model.safetensors").exists():
        save_random_model(folder, layers)
    return str(folder), note


def save_random_model(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(folder)
    config = XLMRobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=1,
        initializer_range=0.05,  # wide enough for scores that differ
    )
    torch.manual_seed(0)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    small = Tokenizer(models.Unigram())
    small.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    small.train_from_iterator(_sources(), trainer)
    vocabulary = [tuple(piece) for piece in json.loads(small.to_str())["model"]["vocab"]]
    # Filler pieces that no text holds, up to the real size.
    filler = [(f"▁filler{number}", -20.0) for number in range(VOCABULARY - len(vocabulary) - 1)]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, *filler, ("<mask>", 0.0)], unk_id=3))
    tokenizer.pre_tokenizer = small.pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = special | {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "model_max_length": 8192}
    settings |= {"tokenizer_class": "XLMRobertaTokenizer", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _sources() -> list[str]:
    lines = (ROOT / "tests/data/python_faq/documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def texts(tokenizer, count: int, seed: int = 0) -> list[str]:
    """Return different stretches of the Python FAQ: lengths log-normal, 20 to 480 tokens, about 150 on average."""
    generator = random.Random(seed)
    lengths = [min(480, max(20, round(generator.lognormvariate(4.75, 0.75)))) for _ in range(count)]
    return stretches(tokenizer, lengths, seed)


def stretches(tokenizer, lengths: list[int], seed: int = 0) -> list[str]:
    """Return texts of these lengths in tokens, each from another place in the Python FAQ."""
    text = "\n".join(_sources() * 2)  # twice for the longest, which would run over the end
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    generator = random.Random(seed)
    result = []
    for length in lengths:
        begin = generator.randrange(len(text) // 2)
        first = bisect.bisect_right(ends, begin)
        result.append(text[begin : ends[min(first + length, len(ends)) - 1]])
    return result
