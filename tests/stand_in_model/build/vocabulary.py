"""A small WordPiece tokenizer, cut from the teacher's, with XLM-RoBERTa's special tokens and pair template."""

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

# XLM-RoBERTa's ids: <s> 0, <pad> 1, </s> 2, <unk> 3; <mask> is the last one.
SPECIAL = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]"}


def choose(teacher: Path, texts: list[str], size: int) -> list[str]:
    """The `size` most useful pieces of the teacher's vocabulary, special tokens included.

    Useful is what is frequent in the training text or in English at large: BERT's vocabulary is sorted by frequency,
    so 1 / rank stands in for the latter. Letters stay, so that every English word still decomposes.
    """
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = Counter(i for e in tokenizer.encode_batch(texts, add_special_tokens=False) for i in e.ids)
    total = sum(counts.values())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    score = {}
    for piece, i in vocabulary:
        if piece.startswith("[") and piece.endswith("]") and len(piece) > 1:
            continue
        letter = len(piece.removeprefix("##")) == 1 and (piece.isascii() or counts[i] >= 5)
        score[piece] = 1.0 if letter else counts[i] / total + 0.05 / max(1, i - 990)
    kept = sorted(sorted(score, key=lambda piece: -score[piece])[: size - len(SPECIAL) - 1], key=dict(vocabulary).get)
    return [*SPECIAL, *kept, "<mask>"]


def build(teacher: Path, vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """The fast tokenizer; normalisation (lower case, no accents) and splitting are the teacher's."""
    spec = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    original = Tokenizer.from_str(json.dumps(spec))
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = original.normalizer, original.pre_tokenizer
    tokenizer.decoder = original.decoder
    # The second segment gets token type 1: the model tells query and document apart by it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0",
        pair="<s>:0 $A:0 </s>:0 </s>:1 $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=512,
        padding_side="right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def teacher_ids(teacher: Path, vocabulary: list[str]) -> list[int]:
    """For each piece its row in the teacher's embedding matrix."""
    ids = Tokenizer.from_file(str(teacher / "tokenizer.json")).get_vocab()
    return [ids[SPECIAL.get(piece, "[MASK]" if piece == "<mask>" else piece)] for piece in vocabulary]
