"""Datasets that share rows: cosines without bias, with errors of the right size."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.split.block_sums import products_of

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.options.parser import to_plain
from merit_fast.sketch.mixture.blocks import assign_blocks
from merit_fast.split import SplitConfig, split_mixture
from merit_fast.split.conflict import conflict_of, half_grams
from merit_fast.split.moments import block_products
from merit_fast.split.parting import HeldOutBlocks

BLOCKS = 8
WIDTH = 300
SEEDS = range(300)
EXAMPLE = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))


def digest(name):
    return hashlib.sha256(str(name).encode()).digest()


def block_sums(rows, weights, plan):
    """[G, D] sums and [G] weights of gradients [n, D] in the blocks of a plan."""
    sums = np.zeros((BLOCKS, rows.shape[1]))
    totals = np.zeros(BLOCKS)
    np.add.at(sums, plan.blocks, rows * weights[:, None])
    np.add.at(totals, plan.blocks, weights)
    return sums, totals


def simulate(seed, common, own=24, lengths=False, corrected=True):
    """Conflict of two datasets of one mean that share some of their rows."""
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(WIDTH) / np.sqrt(WIDTH)
    names = {
        "a": [*(f"{seed} c{k}" for k in range(common)), *(f"{seed} a{k}" for k in range(own))],
        "b": [*(f"{seed} c{k}" for k in range(common)), *(f"{seed} b{k}" for k in range(own))],
    }
    rows = {
        name: mean + 3 * generator.standard_normal(WIDTH) / np.sqrt(WIDTH)
        for name in sorted({*names["a"], *names["b"]})
    }
    tokens = {name: float(generator.integers(1, 9)) if lengths else 1.0 for name in sorted(rows)}
    plans = assign_blocks({n: [digest(row) for row in each] for n, each in names.items()}, BLOCKS)
    sums, weights = zip(
        *(
            block_sums(
                np.array([rows[row] for row in each]),
                np.array([tokens[row] for row in each]),
                plans[name],
            )
            for name, each in names.items()
        ),
        strict=True,
    )
    counts = np.array([np.bincount(plans[name].blocks, minlength=BLOCKS) for name in names])
    shared = ~np.eye(2, dtype=bool) if corrected else None
    return block_products(np.stack(sums), counts, np.stack(weights), shared)


@pytest.mark.parametrize("lengths", [False, True], ids=["examples", "tokens"])
def test_half_shared_datasets_have_the_cosine_of_their_means_within_the_error(lengths):
    found = []
    naive = []
    for seed in SEEDS:
        products = simulate(seed, 24, lengths=lengths)
        conflict = conflict_of(products, debias="blocks")
        found.append((conflict.cosine[0, 1], conflict.error[0, 1]))
        naive.append(conflict_of(replace(products, shared=None), debias="blocks").cosine[0, 1])
    cosines, errors = np.transpose(found)
    known = ~np.isnan(cosines)
    assert known.mean() > 0.9
    deviation = cosines[known].std()
    assert abs(cosines[known].mean() - 1) < 0.01 + 3 * deviation / np.sqrt(known.sum())
    assert np.nanmean(naive) - 1 > 3 * abs(cosines[known].mean() - 1)
    assert 0.6 < np.sqrt(np.mean(errors[known] ** 2)) / deviation < 1.8


def test_datasets_of_the_same_rows_have_cosine_one():
    for seed in range(40):
        products = simulate(seed, 40, own=0, lengths=bool(seed % 2))
        conflict = conflict_of(products, debias="blocks")
        assert conflict.cosine[0, 1] == pytest.approx(1, abs=1e-6) or conflict.more_examples.any()


def test_disjoint_datasets_of_the_same_blocks_keep_their_bits():
    """Sharing of one pair changes no figure of another."""
    generator = np.random.default_rng(0)
    sums = generator.standard_normal((4, BLOCKS, 5000)) + 0.3
    counts = generator.integers(3, 9, (4, BLOCKS))
    shared = np.zeros((4, 4), bool)
    shared[1, 3] = shared[3, 1] = True
    plain = block_products(sums, counts)
    some = block_products(sums, counts, None, shared)
    before = conflict_of(plain, debias="blocks")
    after = conflict_of(some, debias="blocks")
    same = before.cosine == after.cosine
    assert same[~shared].all() and not same[shared].any()
    assert np.array_equal(before.error[~shared], after.error[~shared])
    order = [3, 1, 0]
    again = block_products(sums[order], counts[order], None, shared[np.ix_(order, order)])
    chosen = conflict_of(
        replace(products_of(again, [0, 1, 2]), shared=again.shared, same_block=again.same_block),
        debias="blocks",
    )
    assert np.array_equal(chosen.cosine, after.cosine[np.ix_(order, order)])


def test_products_of_different_blocks_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 50, (2, BLOCKS)).astype(float)
    sums = generator.standard_normal((2, BLOCKS, 400)) + weights[:, :, None]
    counts = np.ones((2, BLOCKS))
    products = block_products(sums, counts, weights, ~np.eye(2, dtype=bool))

    def expected(blocks):
        pairs = [(a, b) for a in blocks for b in blocks if a != b]
        above = sum(sums[0, a] @ sums[1, b] for a, b in pairs)
        return above / sum(weights[0, a] * weights[1, b] for a, b in pairs)

    conflict = conflict_of(products, debias="blocks")
    assert conflict.gram[0, 1] == pytest.approx(expected(range(BLOCKS)), rel=1e-5)
    for half, gram in enumerate(half_grams(products, "blocks")):
        assert gram.gram[0, 1] == pytest.approx(expected(range(half, BLOCKS, 2)), rel=1e-5)
    blocks = HeldOutBlocks(products, np.array([0.5, 0.5]))
    rest = [(a, b) for a in range(BLOCKS) for b in range(BLOCKS) if a != b and 2 in (a, b)]
    above = sum(sums[0, a] @ sums[1, b] for a, b in rest)
    below = sum(weights[0, a] * weights[1, b] for a, b in rest)
    lengths = np.sqrt(conflict.norm[0] ** 2 * conflict.norm[1] ** 2)
    assert blocks.cosines[2][0, 1] == pytest.approx(above / below / lengths, rel=1e-4)
    naive = conflict_of(products, debias="none")
    total = sums.sum(1)
    assert naive.gram[0, 1] == pytest.approx(
        total[0] @ total[1] / weights[0].sum() / weights[1].sum(), rel=1e-5
    )


# ---- the blocks of rows
def test_without_shared_rows_the_blocks_are_filled_in_turn():
    plans = assign_blocks({"a": [digest(k) for k in range(11)], "b": [digest("x")] * 9}, 4)
    assert plans["a"].blocks == [k % 4 for k in range(11)]
    assert plans["b"].blocks == [k % 4 for k in range(9)]  # one row again and again is not shared
    assert plans["a"].fingerprint == [] == plans["b"].fingerprint


def test_a_shared_row_has_one_block_and_the_others_even_out():
    rows = {
        "a": [digest(k) for k in range(40)],
        "b": [digest(k) for k in range(20, 60)],
        "c": [digest(k) for k in range(100, 120)],
    }
    plans = assign_blocks(rows, 8)
    where = {}
    for name in ("a", "b"):
        for row, block, shared in zip(
            rows[name], plans[name].blocks, plans[name].shared, strict=True
        ):
            if shared is not None:
                where.setdefault(row, set()).add((block, shared))
        assert np.bincount(plans[name].blocks, minlength=8).max() <= 8
    assert len(where) == 20 and all(len(found) == 1 for found in where.values())
    assert plans["c"].shared == [None] * 20 and plans["a"].fingerprint != plans["b"].fingerprint
    # Another dataset that joins moves no row that is shared already.
    more = assign_blocks({**rows, "d": [digest(k) for k in range(200, 230)]}, 8)
    assert more["a"] == plans["a"] and more["b"] == plans["b"]


def test_few_shared_rows_still_fill_three_blocks():
    for start in range(0, 90, 3):
        rows = [digest(k) for k in range(start, start + 3)]
        plans = assign_blocks({"a": rows, "b": rows}, 8)
        assert plans["a"].blocks == plans["b"].blocks and len(set(plans["a"].blocks)) == 3


def test_a_dataset_of_one_row_that_another_has_is_refused_by_name():
    with pytest.raises(InputError, match="^b: must have rows of its own: .* 1 different rows"):
        assign_blocks({"a": [digest(k) for k in range(9)], "b": [digest(4)] * 9}, 8)


# ---- through the split
ROWS = {
    "two rows": {"a": [0, 1], "b": [0, 1], "c": [2, 3], "d": [4, 5]},
    "three rows": {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2], "d": [4, 5, 6]},
    "subsets": {"a": range(40), "b": range(5), "c": range(3, 60), "d": range(100, 140)},
    "all the same": {name: range(20) for name in "abcd"},
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": "auto", "min_steps": 1}, {"preset": "paper", "weight": "tokens"},
     {"similarity": "gram"}],
    ids=["debiased", "auto", "paper", "gram"],
)  # fmt: skip
def test_any_sharing_gives_a_split_with_finite_figures(tmp_path, case, options):
    """Rows of a, b and c have one mean, those of d the opposite one; each has its own noise."""
    generator = torch.Generator().manual_seed(0)
    identity = SketchIdentity(CountSketch(4096, 0), "m", ("w",), "tokens")
    names = sorted({row for rows in ROWS[case].values() for row in rows})
    noise = {row: torch.randn(4096, generator=generator) / 64 for row in names}
    plans = assign_blocks({d: [digest(row) for row in r] for d, r in ROWS[case].items()}, BLOCKS)
    datasets = []
    for name, rows in ROWS[case].items():
        sign = -1 if name == "d" and case != "all the same" else 1
        sketches = torch.stack([noise[row] + sign / 64 for row in rows])
        state = SketchState.zeros(identity, BLOCKS)
        lengths = torch.tensor([1 + 7 * row % 30 for row in rows])
        state.add_examples(sketches, torch.tensor(plans[name].blocks), 1.0, lengths)
        state.add_shared_rows(plans[name].shared_rows(0, len(rows)))
        (tmp_path / f"{name}.safetensors").write_bytes(state.to_bytes())
        datasets.append(Dataset(name, (EXAMPLE,) * 50))
    split = split_mixture(
        tmp_path,
        datasets,
        "mixture",
        SplitConfig(**{"groups": 2, **options}),
        base_fingerprint="b",
        steps=4000,
        sketched_at="here",
        texts=dict,
    )
    json.dumps(to_plain(split), allow_nan=False)
    for pair in split.shared_rows:
        common = set(ROWS[case][pair.first]) & set(ROWS[case][pair.second])
        assert pair.rows == len(common) > 0
    a_and_b = split.similarity[0][1]
    if ROWS[case]["a"] == ROWS[case]["b"] and a_and_b is not None:
        assert a_and_b == pytest.approx(1, abs=1e-6)
