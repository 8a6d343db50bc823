"""The same scores as sentence-transformers and FlagEmbedding give. Both come with benchmarks/requirements.txt."""

import pytest
import torch
from tiny import QUERY, texts

from reranker_helpers import score


@pytest.fixture
def documents() -> list[str]:
    return texts(0, 30, 700)


def test_cross_encoder(tiny, tiny_folder, documents, installed):
    sentence_transformers = installed("sentence_transformers")
    peer = sentence_transformers.CrossEncoder(
        str(tiny_folder), max_length=512, device="cpu", activation_fn=torch.nn.Identity()
    )
    pairs = [(QUERY, document) for document in documents]
    assert score(pairs, *tiny) == pytest.approx(peer.predict(pairs).tolist(), abs=1e-4)


def test_flag_reranker(tiny, tiny_folder, documents, installed):
    flag_embedding = installed("FlagEmbedding")
    peer = flag_embedding.FlagReranker(str(tiny_folder), use_fp16=False, devices="cpu", max_length=512)
    pairs = [(QUERY, document) for document in documents]
    assert score(pairs, *tiny) == pytest.approx(peer.compute_score(pairs), abs=1e-4)
