"""Random vocabularies against a dictionary of rows by token, filled by the rules in words."""

import random

import numpy as np
import pytest
from support.merge.vocabulary.models import EMBEDDING, HEAD, make_model, merged_rows

from merit_fast.merge import merge_models

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def draw_model(random_source, folder, number):
    """A model with some letters as its own tokens, some as added ones, and rows more or less."""
    letters = random_source.sample(LETTERS, random_source.randint(6, 14))
    cut = random_source.randint(3, len(letters) - 1)
    own = ["<unk>", "<s>", "</s>", *letters[:cut]]
    added = letters[cut:]
    rows = len(own) + len(added) + random_source.randint(-2, 5)
    kind = random_source.choice(["BPE", "Unigram", "WordLevel"])
    return make_model(folder, added, own=own, rows=rows, kind=kind, seed=number)


def known(model):
    """The tokens of a model that have rows."""
    rows = len(model.tensors[EMBEDDING])
    return {token: number for token, number in model.ids.items() if number < rows}


def expected_rows(models, base, tokens, weights, name):
    """Each token's merged row in float64."""
    rows = {}
    for token in tokens:
        have = [k for k, model in enumerate(models) if token in known(model)]
        own = {k: models[k].row(name, token) for k in have}
        if not have:
            stand_in = np.zeros(models[0].tensors[name].shape[1])
        elif base in have:
            stand_in = own[base]
        else:
            stand_in = np.mean(list(own.values()), 0)
        each = [own.get(k, stand_in) for k in range(len(models))]
        rows[token] = np.average(each, 0, weights)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_random_vocabularies(tmp_path, seed):
    random_source = random.Random(seed)
    models = [
        draw_model(random_source, tmp_path / f"m{k}", 10 * seed + k)
        for k in range(random_source.randint(2, 4))
    ]
    weights = [random_source.uniform(0.1, 1) for _ in models]
    base = random_source.choice([None, *range(len(models))])
    home = 0 if base is None else base
    source = random_source.choice(["union", "base", *range(len(models))])
    named = source if isinstance(source, str) else str(models[source].path)
    multiple = random_source.choice([1, 8])
    tokens = set(known(models[source if isinstance(source, int) else home]))
    if source == "union":
        tokens = set().union(*map(known, models))
    merge_models(
        [model.path for model in models],
        weights,
        out=tmp_path / "out",
        base=None if base is None else models[base].path,
        tokenizer={"source": named, "pad_to_multiple_of": multiple},
    )
    out = merged_rows(tmp_path / "out")
    assert set(out.ids) == tokens
    assert sorted(out.ids.values()) == [*range(len(tokens))]
    for name in (EMBEDDING, HEAD):
        assert len(out.tensors[name]) == -(-len(tokens) // multiple) * multiple
        for token, truth in expected_rows(models, base, tokens, weights, name).items():
            assert np.allclose(out.row(name, token), truth, rtol=2**-20, atol=1e-8), token
