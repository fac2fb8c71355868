"""Outliers of a dataset and near-equal rows: against dense references and planted rows."""

import itertools

import numpy as np
import pytest
import torch
from support.row_store.stores import DIM, write_store

import merit_fast
from merit_fast.errors import InputError
from merit_fast.row_store import pairs as pairs_module


def test_outliers_equal_the_cosine_with_the_mean_of_the_other_rows(tmp_path):
    rows = torch.randn(19, DIM) + 0.5 * torch.randn(DIM)
    rows[7] = 0
    tokens = (torch.arange(19) % 5 + 1).double()
    opened = merit_fast.open_rows(write_store(tmp_path, {"a": rows}))
    exact = rows.double()
    expected = {}
    for i in range(19):
        rest = (tokens.unsqueeze(1) * exact).sum(0) - tokens[i] * exact[i]
        length = exact[i].norm() * rest.norm()
        expected[i] = float(exact[i] @ rest / length) if length else 0.0
    hits = opened.outliers("a", k=99)
    assert [hit.score for hit in hits] == sorted(hit.score for hit in hits)
    assert {hit.row: hit.score for hit in hits} == pytest.approx(expected, abs=2e-3)
    assert opened.outliers("a", k=4) == hits[:4]


def test_the_error_of_an_outlier_leaves_blocks_of_other_rows_out(tmp_path):
    rows = torch.randn(18, DIM) + 0.5 * torch.randn(DIM)
    opened = merit_fast.open_rows(write_store(tmp_path, {"a": rows}))
    exact = rows.double()
    for hit in opened.outliers("a", k=5, weight="examples"):
        others = []
        for block in range(8):
            kept = (torch.arange(18) % 8 != block) & (torch.arange(18) != hit.row)
            rest = exact[kept].sum(0)
            others.append(float(exact[hit.row] @ rest / exact[hit.row].norm() / rest.norm()))
        error = np.sqrt(7 / 8 * ((np.array(others) - np.mean(others)) ** 2).sum())
        assert hit.error == pytest.approx(error, rel=0.02)


def test_a_row_with_a_wrong_label_is_the_first_outlier(tmp_path):
    shared = torch.randn(DIM)
    rows = torch.randn(40, DIM) + shared
    rows[31] = torch.randn(DIM) - shared
    first, second = merit_fast.open_rows(write_store(tmp_path, {"a": rows})).outliers("a", k=2)
    assert first.row == 31 and first.score < 0 < second.score
    assert second.score - first.score > 4 * max(first.error, second.error)


def test_outliers_of_one_row_or_of_nobody_are_refused(tmp_path):
    opened = merit_fast.open_rows(write_store(tmp_path, {"a": torch.randn(1, DIM)}))
    with pytest.raises(InputError, match="a: must have at least 2 rows, found 1"):
        opened.outliers("a")
    with pytest.raises(InputError, match="dataset: must be one of a, found 'b'"):
        opened.outliers("b")


def dense_pairs(rows, above):
    places = [(name, i) for name, own in rows.items() for i in range(len(own))]
    units = torch.cat(list(rows.values())).double()
    units = units / units.norm(dim=1, keepdim=True)
    cosines = units @ units.T
    return {
        (places[i], places[j]): float(cosines[i, j])
        for i, j in itertools.combinations(range(len(places)), 2)
        if cosines[i, j] >= above
    }


@pytest.mark.parametrize("above", [0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_duplicates_are_all_pairs_of_the_dense_reference(tmp_path, monkeypatch, above, size):
    monkeypatch.setattr(pairs_module, "_BLOCK_ROWS", 16)  # several blocks, the last one ragged
    monkeypatch.setattr(pairs_module, "_CHUNK_PAIRS", 3)
    torch.manual_seed(5)
    centres = torch.randn(6, DIM)
    noise = torch.tensor([0, 0.01, 0.1, 0.5, 1.0]).repeat(12)[:, None]
    near = centres[torch.arange(60) % 6] + noise * torch.randn(60, DIM)
    rows = {"a": near[:37] * size, "b": near[37:] * size * 50}  # length does not matter
    rows["b"][5] = 0
    expected = dense_pairs(rows, above)
    found = merit_fast.open_rows(write_store(tmp_path, rows)).duplicates(above)
    edge = {pair for pair, cosine in expected.items() if cosine < above + 1e-3}
    assert {(pair.a, pair.b) for pair in found} >= expected.keys() - edge
    near = dense_pairs(rows, above - 1e-3)
    assert {(pair.a, pair.b) for pair in found} <= near.keys()
    assert len(found) > 5
    for pair in found:
        assert pair.cosine == pytest.approx(near[pair.a, pair.b], abs=5e-4)
    assert [pair.cosine for pair in found] == sorted((p.cosine for p in found), reverse=True)


def test_equal_rows_are_found_across_datasets_and_one_row_is_not_its_own_duplicate(tmp_path):
    rows = {"a": torch.randn(9, DIM), "b": torch.randn(12, DIM)}
    rows["b"][8] = rows["a"][2]
    rows["a"][4] = rows["a"][3]
    numbers = {"a": [0, 1, 2, 3, 3, 5, 6, 7, 8], "b": list(range(12))}
    opened = merit_fast.open_rows(write_store(tmp_path, rows, numbers=numbers))
    found = [(pair.a, pair.b) for pair in opened.duplicates(1.0)]
    assert found == [(("a", 2), ("b", 8))]  # the two examples of row 3 are one row


def test_too_many_pairs_and_a_wrong_bound_are_refused(tmp_path):
    opened = merit_fast.open_rows(write_store(tmp_path, {"a": torch.ones(20, DIM)}))
    assert len(opened.duplicates()) == 190
    with pytest.raises(InputError, match="at most 100 pairs, found more; raise above=0.999"):
        opened.duplicates(most=100)
    for above in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(InputError, match="above: must be above 0 and at most 1"):
            opened.duplicates(above)
    folder = tmp_path
    with pytest.raises(InputError, match="must have one checkpoint open, found 2"):
        merit_fast.open_rows([folder, folder]).duplicates()
