"""Products of block sums: exact, so no bit depends on order, company or threads."""

import subprocess
import sys

import numpy as np
import pytest
from support.split.block_sums import assert_same_bits, draw, eta_squared, products_of

from merit_fast.errors import MeritFastError
from merit_fast.split.conflict import (
    conflict_of,
    double_center,
)
from merit_fast.split.moments import block_products


def test_products_are_those_of_the_block_sums():
    sums, counts = draw()
    products = block_products(sums, counts)
    total = sums.sum(1)

    def assert_products(found, rows):
        length = np.linalg.norm(total, axis=1)
        assert np.abs((found - rows @ rows.T) / np.outer(length, length)).max() < 1e-6

    assert_products(products.total, total)
    assert_products(products.halves[0], sums[:, 0::2].sum(1))
    assert_products(products.halves[1], sums[:, 1::2].sum(1))
    for block in range(8):
        assert_products(products.left_out[block], total - sums[:, block])
    for i in range(len(sums)):
        assert products.within[i] == pytest.approx(
            sums[i] @ sums[i].T, abs=1e-6 * total[i] @ total[i]
        )


def test_order_and_company_of_the_datasets_change_no_bit():
    sums, counts = draw()
    products = block_products(sums, counts)
    order = [4, 0, 5, 2, 1, 3]
    assert_same_bits(block_products(sums[order], counts[order]), products_of(products, order))
    assert_same_bits(block_products(sums[[3]], counts[[3]]), products_of(products, [3]))
    fields = (
        "gram",
        "cosine",
        "error",
        "similarity",
        "norm",
        "signal_fraction",
        "signal_error",
    )
    whole = conflict_of(products, debias="blocks")
    permuted = conflict_of(products_of(products, order), debias="blocks")
    for field in fields:
        value = getattr(whole, field)
        assert np.array_equal(
            getattr(permuted, field), value[np.ix_(*[order] * value.ndim)], equal_nan=True
        ), field
    weights = np.random.default_rng(0).dirichlet(np.ones(6))
    centered = double_center(whole.gram, weights)
    assert np.array_equal(
        double_center(permuted.gram, weights[order]), centered[np.ix_(order, order)]
    )
    groups = np.array([0, 1, 2, 0, 1, 0])
    share = eta_squared(centered, weights, groups)
    assert eta_squared(centered[np.ix_(order, order)], weights[order], groups[order]) == share


def test_leaving_a_dataset_out_needs_no_second_look_at_the_sums():
    sums, counts = draw()
    rest = [0, 1, 3, 4, 5]
    assert_same_bits(
        products_of(block_products(sums, counts), rest), block_products(sums[rest], counts[rest])
    )


def test_the_order_in_which_a_product_is_summed_changes_no_bit():
    """Shuffles the columns within a chunk.

    Where all products have one sign, partial sums grow to the full bound.
    """
    generator = np.random.default_rng(1)
    sums = np.abs(generator.standard_normal((3, 8, 2048))) + 1 / 3
    counts = np.full((3, 8), 4)
    expected = block_products(sums, counts)
    for _ in range(3):
        assert_same_bits(block_products(sums[:, :, generator.permutation(2048)], counts), expected)


def test_threads_change_no_bit():
    script = (
        "import hashlib, numpy as np; from merit_fast.split.moments import block_products;"
        "s = np.random.default_rng(0).standard_normal((90, 4, 5000));"
        "p = block_products(s, np.full((90, 4), 3));"
        "print(hashlib.sha256(p.total.tobytes() + p.left_out.tobytes() + "
        "p.within.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"OPENBLAS_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2)
    }
    assert len(digests) == 1


def test_sums_may_stay_on_disk(tmp_path):
    sums, counts = draw()
    files = []
    for i, array in enumerate(sums):
        np.save(tmp_path / f"{i}.npy", array)
        files.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    assert_same_bits(block_products(files, counts), block_products(sums, counts))


def test_sums_that_are_no_numbers_and_lone_blocks_are_refused():
    sums, counts = draw(3)
    counts[1, 1:] = 0
    with pytest.raises(MeritFastError, match="dataset 1 needs examples in two blocks or more"):
        block_products(sums, counts)
    sums[2, 0, 0] = np.inf
    with pytest.raises(MeritFastError, match="block sums of dataset 2 are not finite"):
        block_products(sums, np.ones_like(counts))
