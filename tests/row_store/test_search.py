"""Search: equal to a dense reference, honest errors, own rows out, defined answers at the edges."""

import numpy as np
import pytest
import torch
from support.row_store.stores import DIM, identity, write_store

import merit_fast
from merit_fast.errors import InputError
from merit_fast.row_store.hits import count_indistinct


def some_rows():
    shared = torch.randn(DIM)
    return {
        "a": torch.randn(17, DIM) + shared,
        "b": torch.randn(23, DIM) * 3 - 0.2 * shared,
        "c": torch.randn(1, DIM) + shared,
    }


def dense(rows, target, weights, by):
    """Scores of all rows by the definition, in float64; ``target`` [t, D]."""
    t = (weights.unsqueeze(1) * target).sum(0) / weights.sum()
    scores = {}
    for name, own in rows.items():
        products = own.double() @ t
        if by == "cosine":
            products = products / own.double().norm(dim=1) / t.norm()
        scores |= {(name, row): float(score) for row, score in enumerate(products)}
    return scores


@pytest.mark.parametrize("by", ["cosine", "dot"])
@pytest.mark.parametrize("weight", ["tokens", "examples"])
@pytest.mark.parametrize("kind", ["name", "pairs"])
def test_search_equals_a_dense_reference(tmp_path, by, weight, kind):
    rows = some_rows()
    opened = merit_fast.open_rows(write_store(tmp_path, rows))
    if kind == "name":
        target = "b"
        chosen = [("b", row) for row in range(23)]
    else:
        target = chosen = [("b", 22), ("a", 3), ("b", 1), ("a", 16)]
    values = torch.stack([rows[name][row] for name, row in chosen]).double()
    tokens = torch.tensor([row % 5 + 1 for _, row in chosen]).double()
    weights = tokens if weight == "tokens" else torch.ones(len(chosen)).double()
    expected = dense(rows, values, weights, by)
    for pair in chosen:
        del expected[pair]
    hits = opened.search(target, k=1000, by=by, weight=weight)
    found = {(hit.dataset, hit.row): hit.score for hit in hits}
    assert found.keys() == expected.keys()  # own rows are no hits
    size = max(map(abs, expected.values()))
    assert all(found[pair] == pytest.approx(expected[pair], abs=2e-3 * size) for pair in found)
    assert [hit.score for hit in hits] == sorted(found.values(), reverse=True)
    assert opened.search(target, k=5, by=by, weight=weight) == hits[:5]


def test_own_rows_are_hits_where_asked_for(tmp_path):
    opened = merit_fast.open_rows(write_store(tmp_path, some_rows()))
    assert len(opened.search("a", k=99)) == 24
    hits = opened.search("a", k=99, leave_own_out=False)
    assert len(hits) == len(opened) == 41 and hits[0].dataset in ("a", "c")


@pytest.mark.parametrize("by", ["cosine", "dot"])
def test_the_error_of_a_score_is_the_jackknife_over_the_targets_blocks(tmp_path, by):
    rows = some_rows()
    opened = merit_fast.open_rows(write_store(tmp_path, rows))
    tokens = (torch.arange(17) % 5 + 1).double()
    target = rows["a"].double()
    hits = opened.search("a", k=99, by=by)
    left_out = []
    for block in range(8):
        kept = torch.arange(17) % 8 != block
        left_out.append(dense(rows, target[kept], tokens[kept], by))
    for hit in hits:
        values = np.array([scores[hit.dataset, hit.row] for scores in left_out])
        error = np.sqrt(7 / 8 * ((values - values.mean()) ** 2).sum())
        assert hit.error == pytest.approx(error, rel=0.02)


def test_two_errors_cover_the_true_score_in_most_of_many_draws(tmp_path):
    torch.manual_seed(3)
    mean = torch.randn(DIM)
    probe = torch.randn(30, DIM) + 0.5 * mean
    covered = []
    for draw in range(12):
        target = mean + 8 * torch.randn(40, DIM)
        opened = merit_fast.open_rows(
            write_store(tmp_path / str(draw), {"t": target, "p": probe}, shard_rows=64, batch=64)
        )
        true = dense({"p": probe}, mean.double()[None], torch.ones(1).double(), "dot")
        for hit in opened.search("t", k=30, by="dot", weight="examples"):
            covered.append(abs(hit.score - true[hit.dataset, hit.row]) <= 2 * hit.error)
    assert 0.85 < np.mean(covered) < 0.99


def test_rows_that_share_the_target_are_told_apart_only_where_they_differ(tmp_path):
    torch.manual_seed(1)
    mean = torch.randn(DIM)
    close = mean.expand(20, DIM)
    far = torch.randn(20, DIM) + 0.2 * mean
    rows = {"t": mean + 4 * torch.randn(40, DIM), "p": torch.cat([close, far])}
    hits = merit_fast.open_rows(write_store(tmp_path, rows)).search("t", k=40)
    assert {hit.row for hit in hits[:20]} == set(range(20))
    assert count_indistinct(hits[:20]) == 19
    assert count_indistinct(hits[:21]) == 0  # the last one is of the far ones


def test_a_vector_has_hits_without_errors(tmp_path):
    rows = some_rows()
    of = identity(8192, DIM)
    wide = {name: torch.randn(len(own), 8192) for name, own in rows.items()}
    opened = merit_fast.open_rows(write_store(tmp_path, wide, of))
    vector = wide["b"][4]
    hit = opened.search(vector, k=1)[0]
    assert (hit.dataset, hit.row, hit.error) == ("b", 4, None)
    assert hit.score == pytest.approx(1, abs=1e-5)
    folded = opened.search(of.fold(vector[None])[0].numpy(), k=3)
    assert folded == opened.search(vector, k=3)
    assert count_indistinct(folded) is None


def test_one_row_is_a_target_without_errors(tmp_path):
    opened = merit_fast.open_rows(write_store(tmp_path, some_rows()))
    hits = opened.search([("c", 0)], k=3)
    assert {hit.error for hit in hits} == {None} and "c" not in {hit.dataset for hit in hits}


def test_examples_of_one_row_are_own_together_and_share_a_block(tmp_path):
    rows = {"a": torch.randn(6, DIM) + 1}
    numbers = {"a": [4, 4, 9, 9, 9, 2]}
    opened = merit_fast.open_rows(write_store(tmp_path, rows, numbers=numbers))
    hits = opened.search([("a", 9)], k=10)
    assert sorted((hit.row, hit.place) for hit in hits) == [(2, 0), (4, 0), (4, 1)]
    assert hits[0].error is None  # three examples of one row are one block
    assert opened.search("a", leave_own_out=False)[0].error is not None


def test_rows_without_a_gradient_have_a_defined_place(tmp_path):
    rows = some_rows()
    rows["b"][5] = 0
    opened = merit_fast.open_rows(write_store(tmp_path, rows))
    scores = {hit.row: hit.score for hit in opened.search("a", k=99) if hit.dataset == "b"}
    assert scores[5] == 0 and all(np.isfinite(score) for score in scores.values())
    with pytest.raises(InputError, match="must have a mean gradient other than 0"):
        opened.search([("b", 5)])


@pytest.mark.parametrize(
    "target,options,message",
    [
        ("nobody", {}, "target: must be one of a, b, c, found 'nobody'"),
        ([("nobody", 1)], {}, "target: dataset: must be one of a, b, c, found 'nobody'"),
        ([("a", 17)], {}, "row: must be a stored row of a, found 17"),
        (["a"], {}, "must be pairs of dataset and row, found 'a'"),
        ([], {}, "must be a dataset's name, pairs"),
        (3, {}, "must be a dataset's name, pairs"),
        (torch.zeros(5), {}, r"must be a vector \[1, 4096\], found \[5\]"),
        (torch.full((DIM,), torch.nan), {}, "must be finite, found NaN"),
        (torch.zeros(DIM), {}, "must have a mean gradient other than 0"),
        ("a", {"k": 0}, "k: must be a whole number of at least 1, found 0"),
        ("a", {"by": "angle"}, "by: must be cosine or dot, found 'angle'"),
        ("a", {"weight": "rows"}, "weight: must be tokens or examples, found 'rows'"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, target, options, message):
    opened = merit_fast.open_rows(write_store(tmp_path, some_rows()))
    with pytest.raises(InputError, match=message) as error:
        opened.search(target, **options)
    assert "\n" not in str(error.value)


# ---- several checkpoints
def test_scores_of_checkpoints_add_up_by_their_weights(tmp_path):
    stores = [some_rows(), some_rows()]
    folders = [
        write_store(tmp_path / str(i), rows, identity(model=f"step {i}"))
        for i, rows in enumerate(stores)
    ]
    tokens = (torch.arange(17) % 5 + 1).double()
    opened = merit_fast.open_rows(folders, weights=[0.3, 2.0])
    expected = [dense(rows, rows["a"].double(), tokens, "cosine") for rows in stores]
    for hit in opened.search("a", k=99):
        pair = (hit.dataset, hit.row)
        assert hit.score == pytest.approx(0.3 * expected[0][pair] + 2 * expected[1][pair], abs=3e-3)
        assert hit.error > 0
    mean = merit_fast.open_rows(folders).search("a", k=1)[0]
    pair = (mean.dataset, mean.row)
    assert mean.score == pytest.approx((expected[0][pair] + expected[1][pair]) / 2, abs=3e-3)
    vectors = torch.stack([stores[0]["b"][3], stores[1]["b"][3]])
    assert opened.search(vectors, k=1)[0].score == pytest.approx(2.3, abs=1e-3)
    with pytest.raises(InputError, match=r"must be a vector \[2, 4096\]"):
        opened.search(vectors[0])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"of": identity(8192, DIM)}, "proj_dim: must be '4096', found '8192'"),
        ({"numbers": {"a": [*range(16), 40], "b": [*range(23)], "c": [0]}}, "a: row: must be"),
    ],
)
def test_checkpoints_that_differ_in_more_than_the_model_are_refused(tmp_path, change, message):
    rows = some_rows()
    first = write_store(tmp_path / "0", rows)
    if "of" in change:
        other = {name: torch.randn(len(own), 8192) for name, own in rows.items()}
        second = write_store(tmp_path / "1", other, **change)
    else:
        second = write_store(tmp_path / "1", rows, **change)
    with pytest.raises(InputError, match=message):
        merit_fast.open_rows([first, second])


def test_checkpoints_need_the_same_datasets_and_a_weight_each(tmp_path):
    rows = some_rows()
    first = write_store(tmp_path / "0", rows)
    second = write_store(tmp_path / "1", {"a": rows["a"]})
    with pytest.raises(InputError, match="datasets: must be a, b, c, found a"):
        merit_fast.open_rows([first, second])
    with pytest.raises(InputError, match="weights: must be 2 finite numbers"):
        merit_fast.open_rows([first, first], weights=[1.0])
    with pytest.raises(InputError, match="must be at least one, found none"):
        merit_fast.open_rows([])


def test_rows_of_another_store_of_the_same_model_are_a_target(tmp_path):
    rows = some_rows()
    opened = merit_fast.open_rows(write_store(tmp_path / "0", rows))
    target = merit_fast.open_rows(write_store(tmp_path / "1", {"t": rows["a"]}))
    hits = opened.search(target, k=99)
    assert len(hits) == 41
    inside = {(h.dataset, h.row): h.score for h in opened.search("a", k=99, leave_own_out=False)}
    assert all(hit.score == pytest.approx(inside[hit.dataset, hit.row], abs=1e-6) for hit in hits)
    other = write_store(tmp_path / "2", {"t": rows["a"]}, identity(model="another"))
    with pytest.raises(InputError, match="model_fingerprint"):
        opened.search(merit_fast.open_rows(other))
