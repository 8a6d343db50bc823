"""Choose the pieces of XLM-RoBERTa's vocabulary that everyday text uses, and make a tokenizer of them.

A piece counts as often as the words that it is part of are used: wordfreq's lists say how often, in each language.
"""

import gzip
import unicodedata
from collections import Counter
from pathlib import Path

import msgpack
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# How much text of a language counts. English has the most, since tests and notebooks are mostly English.
LANGUAGES = {
    **dict.fromkeys(("de", "fr", "es", "it", "pt", "ru", "zh", "ja", "ar", "hi"), 1.0),
    **dict.fromkeys(("nl", "pl", "tr", "sv", "ko", "uk", "id", "vi"), 0.15),
    "en": 3.0,
}
PREFIX = "▁"
UNSPACED = ("zh", "ja")
TEXTS = 3.0  # the training texts count as much as this
RARE = 2e-6
ALPHABETS = {PREFIX, "LATIN", "GREEK", "CYRILLIC", "ARABIC", "DEVANAGARI", "HIRAGANA", "KATAKANA", "DIGIT"}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in XLM-RoBERTa; <mask> is the last one


def backend(pieces: list[tuple[str, float]]) -> Tokenizer:
    """XLM-RoBERTa's rules around any of its pieces. Both normalisations together are SentencePiece's `nmt_nfkc`."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=PREFIX, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=PREFIX, prepend_scheme="always")
    return tokenizer


def word_frequencies(wordfreq: Path, language: str) -> dict[str, float]:
    """word -> share of the text. A list's place in the file is its words' frequency in centibels."""
    with gzip.open(wordfreq / "data" / f"small_{language}.msgpack.gz") as file:
        _, *lists = msgpack.load(file, raw=False)
    return {word: 10 ** (-place / 100) for place, words in enumerate(lists) for word in words}


def use(full: Tokenizer, wordfreq: Path, language: str) -> Counter:
    """Piece -> how often it is used, per word of running text. Three words of ten begin with a capital letter."""
    counts: Counter = Counter()
    for word, frequency in word_frequencies(wordfreq, language).items():
        capital = word[:1].upper() + word[1:]
        for form, share in ((word, 1.0),) if capital == word else ((word, 0.7), (capital, 0.3)):
            text = form if language in UNSPACED else PREFIX + form
            for piece in full.model.tokenize(text):
                counts[piece.id] += frequency * share
    return counts


def choose(full: Tokenizer, pieces: list[tuple[str, float]], wordfreq: Path, texts: list[str], size: int) -> list[int]:
    """The ids of the `size` most useful pieces, in the order of XLM-RoBERTa's vocabulary, special tokens included.

    Single characters that XLM-RoBERTa has stay where the languages' scripts need them, so that any word decomposes.
    """
    value: Counter = Counter()
    for language, weight in LANGUAGES.items():
        counts = use(full, wordfreq, language)
        total = sum(counts.values())
        for i, share in counts.items():
            value[i] += weight * share / total
    # Punctuation, numbers and names are not in the word lists.
    counts = Counter(i for encoding in full.encode_batch(texts, add_special_tokens=False) for i in encoding.ids)
    total = sum(counts.values())
    for i, times in counts.items():
        if times > 1:
            value[i] += TEXTS * times / total
    letters = {
        i for i, (piece, _) in enumerate(pieces) if len(piece.removeprefix(PREFIX)) <= 1 and keep(piece, value[i])
    }
    special = {*range(len(SPECIAL)), len(pieces) - 1}
    best = [i for i, _ in value.most_common() if i not in letters | special]
    return sorted([*special, *letters, *best[: size - len(letters) - len(special)]])


def keep(piece: str, value: float) -> bool:
    """Whether a single character stays: any that is used now and then, and all of the small alphabets."""
    character = piece.removeprefix(PREFIX)
    name = unicodedata.name(character, "") if character else PREFIX
    return value > RARE or name.split(" ")[0] in ALPHABETS


def build(pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the stand-in. Its second segment has token type 1, by which the model tells it apart."""
    tokenizer = backend(pieces)
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
