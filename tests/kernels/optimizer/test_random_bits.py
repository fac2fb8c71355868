"""The random bits of stochastic rounding: even, independent of place, block, stream and key."""

import itertools

import pytest
import torch

from merit_fast.kernels.optimizer import _eager
from merit_fast.kernels.optimizer._update import _key

BLOCK = _eager.RANDOM_BLOCK
ROWS = 256
COUNT = ROWS * BLOCK


def key_of(seed, step, number):
    return _key(seed, step, number, None)


def uniform(raw, shift=16):
    """Numbers from 16 bits: of variance 1 and mean 0 if the bits are even."""
    return ((raw >> shift & 0xFFFF).double() / 65536 - 0.5 + 2**-17) * 12**0.5


def streams_of(key, first=0):
    weights, moments = _eager.random_bits(COUNT, key, first=first)
    return {"weight": uniform(weights), "m": uniform(moments), "v": uniform(moments, 0)}


def correlation(a, b):
    """Correlation of numbers, in standard deviations of what independent ones have."""
    return float((a * b).mean()) * len(a) ** 0.5


def test_every_bit_is_even():
    for raw in _eager.random_bits(COUNT, key_of(0, 1, 0)):
        assert len(raw.unique()) > COUNT - 60  # a few meet by chance, 8 on average
        ones = torch.stack([(raw >> k & 1).double().mean() for k in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / COUNT**0.5


def test_streams_of_other_kinds_seeds_steps_parameters_and_places_are_independent():
    keys = [key_of(*names) for names in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))]
    streams = [stream for key in keys for stream in streams_of(key).values()]
    streams += streams_of(keys[0], first=BLOCK * ROWS * 2**40).values()
    for a, b in itertools.combinations(streams, 2):
        assert abs(correlation(a, b)) < 5
    for stream in streams:
        for distance in (1, 2, 64, 896, BLOCK, 3 * BLOCK, BLOCK + 1):
            assert abs(correlation(stream[distance:], stream[:-distance])) < 5


@pytest.mark.parametrize("kind", ["weight", "m", "v"])
@pytest.mark.parametrize("probability", [0.5, 0.125, 0.01])
def test_roundings_of_a_matrix_have_no_direction(kind, probability):
    """Every row is a block: its key must not make it a copy of another row, or the opposite.

    The largest singular value of independent noise of variance 1 is near sqrt(rows) +
    sqrt(columns); of rows that are alike it is sqrt(rows * columns).
    """
    edge = (probability - 0.5) * 12**0.5
    ups = (streams_of(key_of(3, 7, 2))[kind].view(ROWS, BLOCK) < edge).double()
    noise = (ups - probability) / (probability * (1 - probability)) ** 0.5
    largest = float(torch.linalg.matrix_norm(noise, 2))
    assert largest < 1.1 * (ROWS**0.5 + BLOCK**0.5)


def test_a_part_draws_the_bits_of_its_elements():
    key = key_of(0, 5, 9)
    for first in (0, 1000, 2**32 - 300, 2**42 + 5):
        whole = _eager.random_bits(3000, key, first=first)
        part = _eager.random_bits(1500, key, first=first + 700)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[700:2200], b)
