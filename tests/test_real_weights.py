"""The scores that the model's authors and sentence-transformers have published for BAAI/bge-reranker-v2-m3."""

import pytest
from huggingface_hub import try_to_load_from_cache

from reranker_helpers import MODEL_NAME, load_reranker, rerank, score

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(
        not isinstance(try_to_load_from_cache(MODEL_NAME, "model.safetensors"), str),
        reason=f"{MODEL_NAME} is not in the local cache: fetch its 2.3 GB with `hf download {MODEL_NAME}`",
    ),
]


@pytest.fixture(scope="module")
def reranker():
    return load_reranker()


@pytest.fixture(scope="module")
def int8_reranker():
    return load_reranker(device="cpu", dtype="int8")


PANDA = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear species "
    "endemic to China."
)


def test_scores_of_the_model_card(reranker):
    """FlagEmbedding, examples/inference/reranker/README.md. They were computed in float16, whose steps are 0.004 to
    0.008 here, so float32 may differ by a little more than that."""
    pairs = [("query", "passage"), ("what is panda?", "hi"), ("what is panda?", PANDA)]
    assert score(pairs, *reranker) == pytest.approx([-5.65234375, -8.1875, 5.26171875], abs=0.05)


PLANET = "Which planet is known as the Red Planet?"
PLANETS = [
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
]


def test_int8_keeps_the_published_order_and_scores(int8_reranker):
    pairs = [("query", "passage"), ("what is panda?", "hi"), ("what is panda?", PANDA)]
    assert score(pairs, *int8_reranker) == pytest.approx([-5.65234375, -8.1875, 5.26171875], abs=0.3)
    assert [result.index for result in rerank(PLANET, PLANETS, *int8_reranker)] == [1, 3, 2, 0]


def test_int8_is_near_float32(reranker, int8_reranker):
    pairs = [(PLANET, document) for document in PLANETS]
    assert score(pairs, *int8_reranker) == pytest.approx(score(pairs, *reranker), abs=0.3)


def test_probabilities_of_sentence_transformers(reranker):
    """sentence-transformers, tests/cross_encoder/test_pretrained.py: float32, tolerance 0.01."""
    ranking = rerank(PLANET, PLANETS, *reranker)
    assert [result.index for result in ranking] == [1, 3, 2, 0]
    probabilities = [result.probability for result in sorted(ranking, key=lambda result: result.index)]
    assert probabilities == pytest.approx([0.01928, 0.9987, 0.78573, 0.98696], abs=0.01)
