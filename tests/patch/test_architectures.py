"""Every causal language model of transformers: the table of docs/kernels.md, a part of it each day.

``python -m bench.train.architectures`` compares all of them.
"""

import datetime

import pytest
from support.paths import ROOT

from bench.sketch.architectures import causal_types
from bench.train.architectures import (
    HEAD_AT_LEAST,
    LAYERS_AT_LEAST,
    measure_type,
    ops_in_words,
    read_table,
)

TABLE = read_table((ROOT / "docs" / "kernels.md").read_text())
PARTS = 40
TODAY = sorted(TABLE)[datetime.date.today().toordinal() % PARTS :: PARTS]


def test_the_table_keeps_the_floor():
    assert sum("head" in words for words in TABLE.values()) >= HEAD_AT_LEAST
    assert sum(words not in ("head", "nothing") for words in TABLE.values()) >= LAYERS_AT_LEAST
    assert set(TABLE) <= set(causal_types())


@pytest.mark.parametrize("model_type", dict.fromkeys([*TODAY, "gpt_oss", "deepseek_v3"]))
def test_an_architecture_is_exact_with_what_the_table_says(model_type):
    outcome = measure_type(model_type)
    assert outcome.kind == "exact", outcome
    assert ops_in_words(outcome) == TABLE[model_type], outcome
