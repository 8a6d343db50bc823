"""A tiny XLM-RoBERTa with random weights and a tokenizer like the real one's, both made here in a second, and
random texts of its words."""

import random
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from reranker_helpers import score

TEXT = (
    "the of and a panda bear is an animal that lives in forests of china it eats bamboo what who how does "
    "python language machine learning exercise health heart mood weight library model query document "
    "passage reranker score star planet moon water river mountain bread flour oven music song guitar "
    "history king queen war peace law court contract "
)
WORDS = TEXT.split()
QUERY = "what is a panda"


def texts(seed: int, count: int, words: int = 60) -> list[str]:
    """Random texts of 1 to `words` words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, words))) for _ in range(count)]


def random_documents(seed: int, count: int = 40) -> list[str]:
    """Random texts, most of them short and a few long."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=int(generator.lognormvariate(3.5, 1)))) for _ in range(count)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer whose vocabulary holds the special tokens as pieces, as XLM-RoBERTa's does."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = list(dict.fromkeys(WORDS))
    pieces = [*special, *("▁" + word for word in words), "▁", *"abcdefghijklmnopqrstuvwxyz", "<mask>"]
    vocabulary = [(piece, -0.01 * i if len(piece) > 1 else -10.0) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    backend.normalizer = normalizers.Sequence([normalizers.Replace("\u200b", " "), normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
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


def plain_score(query: str, document: str, model, tokenizer, max_length: int = 512) -> float:
    """The reference: one pair, one plain call of Transformers."""
    inputs = tokenizer([query], [document], truncation="only_second", max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.item()


class Column:
    """Like pyarrow's arrays and columns: iterating gives scalars that are no strings."""

    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return iter([object()] * len(self.texts))

    def to_pylist(self):
        return self.texts


class KeywordModel:
    """A model that is no network: the logit counts a wanted token. It shows what reaches the model, and when."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.batches = []

    def tried(self, tokenizer):
        """Return the model after the padded way has tried once whether it bears padding."""
        score([("bear", "panda"), ("bear", "panda bear")], self, tokenizer, "cpu")
        self.batches.clear()
        return self

    def __call__(self, input_ids, attention_mask):
        self.batches.append(input_ids)
        return SimpleNamespace(logits=(input_ids == self.wanted).sum(1, keepdim=True).float())
