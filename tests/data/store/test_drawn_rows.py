"""A sketch tokenizes the rows that it draws, and draws the rows that it draws of the whole."""

from dataclasses import replace

import numpy as np
import pytest
from support.data.rows import write

from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.encode import RowEncoder
from merit_fast.data.store import Draw, TokenStore
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.drawing import choose_examples

LONG = "1 2 3 4 5 6 7 8 9 0 " * 30


def mixture_of(tmp_path, every):
    """300 rows; a row of each ``every`` is too long."""
    rows = [{"prompt": f"{i}?", "completion": str(i) if i % every else LONG} for i in range(300)]
    return [DatasetConfig("a", write(tmp_path / "a.jsonl", rows))]


def drawn(dataset, config):
    return [dataset.examples[i].input_ids.tolist() for i in choose_examples(dataset, config)]


@pytest.mark.parametrize("weight", [0.4, 1, 1.6])
@pytest.mark.parametrize("every", [2, 1000])
@pytest.mark.parametrize("examples", [2, 40, 1000])
def test_drawn_rows_are_those_of_the_whole(
    tmp_path, tokenizer, monkeypatch, every, examples, weight
):
    mixture = [replace(mixture_of(tmp_path, every)[0], weight=weight)]
    data = DataConfig(max_length=60, too_long="drop")
    store = TokenStore(tmp_path / "s", {"a": "print"})
    config = SketchConfig(examples=examples, seed=7)
    seen = []
    plain = RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "encode", lambda self, r: (seen.extend(r), plain(self, r))[1])
    part = replace(store, draw=Draw(examples, 7))
    (some,) = load_mixture(mixture, tokenizer, data, part="train", store=part)
    assert len(seen) <= 16 * examples + 64 and not (tmp_path / "s").exists()
    (whole,) = load_mixture(mixture, tokenizer, data, part="train", store=store)
    found = drawn(some, config)
    assert found == drawn(whole, config)
    assert len(found) == min(examples, len({str(e.input_ids) for e in whole.examples}))
    assert len({str(ids) for ids in found}) == len(found)
    # what is kept is used
    seen.clear()
    (again,) = load_mixture(mixture, tokenizer, data, part="train", store=part)
    assert not seen and again.num_examples == whole.num_examples


def test_the_draw_follows_seed_and_rows_and_no_name_or_length(tmp_path, tokenizer):
    (mixture,) = mixture_of(tmp_path, 1000)
    cases = {
        "first": (mixture, DataConfig(), 0),
        "renamed": (replace(mixture, name="b"), DataConfig(), 0),
        "shorter": (mixture, DataConfig(max_length=1500), 0),
        "fewer": (replace(mixture, max_examples=299), DataConfig(), 0),
        "seed": (mixture, DataConfig(), 1),
    }
    draws = {}
    for case, (config, data, seed) in cases.items():
        (dataset,) = load_mixture([config], tokenizer, data, part="train")
        draws[case] = drawn(dataset, SketchConfig(examples=30, seed=seed))
    assert draws["first"] == draws["renamed"] == draws["shorter"]
    assert len({str(draw) for draw in draws.values()}) == 3
    # a part of the dataset is drawn in the order of the whole
    half = dataset.select(np.arange(0, 300, 2))
    order = drawn(dataset, SketchConfig(examples=300, seed=1))
    kept = [ids for ids in order if ids in [e.input_ids.tolist() for e in half.examples]]
    assert drawn(half, SketchConfig(examples=300, seed=1)) == kept
