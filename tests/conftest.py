"""Fixtures: the tiny reranker with random weights, as a folder and loaded, and the local Azure."""

import importlib
import importlib.util

import pytest
import torch
from tiny import make_model, make_tokenizer

from reranker_helpers import Reranker


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny reranker."""
    folder = tmp_path_factory.mktemp("tiny_reranker")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny() -> Reranker:
    """A tiny reranker with random weights, new for each test."""
    tokenizer = make_tokenizer()
    return Reranker(make_model(len(tokenizer)), tokenizer, torch.device("cpu"))


@pytest.fixture
def installed():
    """Import a package, or skip where there is none. `pytest.importorskip` would skip a broken one, too: FlagEmbedding
    1.4.2 does not find a module that Transformers 5.24 has removed."""

    def find(name: str):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name} is not installed")
        return importlib.import_module(name)

    return find


@pytest.fixture(scope="module")
def azure():
    """A local Azure that the SDK talks to, and that nothing gets past."""
    from fake_azure import FakeAzure  # not above: the helper's tests also run where the Azure SDK is not installed

    with FakeAzure() as azure:
        yield azure
        assert not azure.blocked
