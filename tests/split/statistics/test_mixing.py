"""Suggested mixture weights solve their programme and tell their errors."""

import numpy as np
import pytest
from support.split.block_sums import sample
from support.split.mixtures import clusters, means_of

from merit_fast.errors import MeritFastError
from merit_fast.split.mixing import kkt_violation, programme, simplex_minimum, suggested_shares
from merit_fast.split.moments import block_products


def drawn_matrix(number, seed):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((number, 5)) + 0.5
    return rows @ rows.T + 0.01 * np.eye(number)


@pytest.mark.parametrize("number", [1, 2, 3, 8, 40, 300])
def test_the_minimum_keeps_the_conditions_of_optimality(number):
    for seed in range(5):
        matrix = drawn_matrix(number, seed)
        shares = simplex_minimum(matrix)
        assert shares.min() >= 0 and shares.sum() == pytest.approx(1)
        assert kkt_violation(matrix, shares) < 1e-8
        others = np.random.default_rng(seed).dirichlet(np.full(number, 0.3), 200)
        values = np.einsum("ri,ij,rj->r", others, matrix, others)
        assert shares @ matrix @ shares <= values.min() * (1 + 1e-9)


def test_the_test_of_optimality_finds_wrong_weights():
    matrix = drawn_matrix(6, 0)
    assert kkt_violation(matrix, np.full(6, 1 / 6)) > 1e-3
    assert kkt_violation(matrix, np.array([1.2, -0.2, 0, 0, 0, 0])) >= 0.2
    with pytest.raises(MeritFastError, match="mixture weights must solve their programme"):
        simplex_minimum(np.array([[1.0, np.nan], [np.nan, 1.0]]))


def test_one_gradient_keeps_the_token_shares():
    weights = np.array([0.5, 0.3, 0.2])
    assert simplex_minimum(programme(np.ones((3, 3)), weights)) == pytest.approx(weights)


def test_a_lone_opponent_gets_more_than_its_tokens():
    """Seven datasets against one: a step of all tokens would forget it."""
    generator = np.random.default_rng(0)
    means = means_of(clusters((7, 1), 0.6, -0.2), generator)
    products = block_products(*sample(means, 200, 20.0, generator))
    weights = np.full(8, 1 / 8)
    shares, errors = suggested_shares(products, weights, np.ones(8, bool))
    assert shares[7] > 2 * weights[7] and shares.sum() == pytest.approx(1)
    assert 0 < errors.max() < 0.1
    step = shares @ means
    assert (means @ step).min() > 0 > (means @ (weights @ means)).min()


def test_errors_are_those_of_other_draws():
    weights = np.full(5, 0.2)
    found = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        means = means_of(clusters((3, 2), 0.5, -0.2), np.random.default_rng(0))
        products = block_products(*sample(means, 200, 20.0, generator))
        found.append(suggested_shares(products, weights, np.ones(5, bool)))
    shares, errors = map(np.array, zip(*found, strict=True))
    ratio = np.sqrt((errors**2).mean(0)) / shares.std(0, ddof=1)
    assert (ratio > 0.6).all() and (ratio < 1.8).all()


def test_datasets_that_are_not_resolved_get_no_weight():
    generator = np.random.default_rng(1)
    products = block_products(*sample(means_of(np.eye(4), generator), 80, 5.0, generator))
    resolved = np.array([True, False, True, True])
    shares, errors = suggested_shares(products, np.full(4, 0.25), resolved)
    assert (
        np.isnan(shares[1]) and np.isnan(errors[1]) and shares[resolved].sum() == pytest.approx(1)
    )
    shares, _ = suggested_shares(products, np.full(4, 0.25), np.arange(4) == 2)
    assert np.isnan(shares).all()
