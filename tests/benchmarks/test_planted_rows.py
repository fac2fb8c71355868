"""The benchmark of attribution: its AUC, its BM25, and its ranking of sketches that are known."""

import pytest
import torch
from torch import nn

from bench.select.operations import count
from bench.select.planted_rows import METHODS, Row, auc, bm25, rank


def test_auc_is_the_probability_of_standing_before():
    is_hit = torch.tensor([True, False, True, False])
    assert auc(torch.tensor([4.0, 1.0, 3.0, 2.0]), is_hit) == 1
    assert auc(torch.tensor([1.0, 4.0, 2.0, 3.0]), is_hit) == 0
    assert auc(torch.ones(4), is_hit) == 0.5
    assert auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), is_hit) == 0.75


def test_bm25_prefers_rare_words_and_short_rows():
    pool = ["the red fox", "the dog", "the cat", "the red fox and many other words that follow"]
    scores = bm25(pool, ["the red"])
    assert scores[0] > scores[3] > scores[1]
    assert float(scores[1]) == pytest.approx(float(scores[2]))
    assert not bm25(pool, ["absent"]).any()


def test_each_preconditioner_ranks_by_its_own_sketches():
    """The gradients of one dictionary tell the tasks apart, those of the other are swapped."""
    rows = [
        Row(task, is_query, "same words", None)
        for task in ("a", "b")
        for is_query in (False, False, True)
    ]
    apart = torch.tensor([[1.0, 0.1]] * 3 + [[0.1, 1.0]] * 3, dtype=torch.float64)
    swapped = apart.clone()
    swapped[[2, 5]] = apart[[5, 2]]
    result = rank(rows, {"": apart, "adam ": swapped, "kfac ": 5 * apart})
    assert set(result) == set(METHODS)
    assert result["cosine"] == result["kfac dot"] == result["dot"] == [1.0, 1.0]
    assert result["adam cosine"] == [0.0, 0.0]
    assert result["BM25"] == [0.5, 0.5]


def test_operations_are_those_of_the_layers():
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 6), nn.Linear(6, 30))
    plain, added = count(model, 10)
    assert plain == 6 * (24 + 180)
    assert added == 2 * (16 + 16 + 36 + 36)  # the side of 30 keeps its diagonal only
