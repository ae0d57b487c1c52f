"""A model and a text that several files share; others have their own of the same names."""

import pytest

from tests.integration.test_anchored import with_tokenizer
from tests.integration.test_eval import sentence


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny llama with its tokenizer, never to be written to."""
    return with_tokenizer(zoo("llama"), tmp_path_factory.mktemp("refit") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text(sentence(3, 9000), encoding="utf-8")
    return path
