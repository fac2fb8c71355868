"""Two untied models."""

import pytest
from support.tiny import make_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two untied fp32 Llamas in one file each."""
    root = tmp_path_factory.mktemp("pair")
    for k in range(2):
        make_model(root / f"m{k}", shard="1GB", seed=10 + k, tie_word_embeddings=False)
    return [root / f"m{k}" for k in range(2)]
