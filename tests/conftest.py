"""A tiny XLM-RoBERTa with random weights and a tokenizer like the real one's, both made here in a second."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from reranker_helpers import Reranker

WORDS = """the of and a panda bear is an animal that lives in forests of china it eats bamboo what who how does python
language machine learning exercise health heart mood weight library model query document passage reranker score star
planet moon water river mountain bread flour oven music song guitar history king queen war peace law court contract""".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer whose vocabulary holds the special tokens as pieces, as XLM-RoBERTa's does."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(vocab_size: int, num_labels: int = 1) -> XLMRobertaForSequenceClassification:
    """The configuration of bge-reranker-v2-m3, narrower and with 2 of its 24 layers, random weights."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=num_labels,
        initializer_range=0.3,  # wide, so that random scores differ clearly
    )
    return XLMRobertaForSequenceClassification(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny reranker."""
    folder = tmp_path_factory.mktemp("tiny_reranker")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> Reranker:
    """A tiny reranker, new for each test."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = XLMRobertaForSequenceClassification.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    return Reranker(model, tokenizer, torch.device("cpu"))


def plain_score(query: str, document: str, model, tokenizer, max_length: int = 512) -> float:
    """The reference: one pair, one plain call of Transformers."""
    inputs = tokenizer([query], [document], truncation="only_second", max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.item()


class KeywordModel:
    """A model that is no network: the logit counts a wanted token. It shows what reaches the model, and when."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.batches = []

    def __call__(self, input_ids, attention_mask):
        self.batches.append(input_ids)
        return SimpleNamespace(logits=(input_ids == self.wanted).sum(1, keepdim=True).float())
