"""Adaptive sampling: the number of examples that a dataset's mean gradient needs.

Pure functions of a state's block sums.

The signal fraction f = |mean|^2 / E|mean of the n sketched|^2 is estimated by

    U / R,   U = (|sum_b S_b|^2 - sum_b |S_b|^2) / (n^2 - sum_b n_b^2),   R = |sum_b S_b|^2 / n^2

with the block jackknife's standard error; n is the sum of the examples' weights. A dataset is
*resolved* when its U is too large for noise. Under noise the signs of the block sums are arbitrary,
so the test is exact for any covariance and block sizes: the share of all sign choices e with
|sum_b e_b S_b| at least as long (Fisher 1935; Romano 1990, JASA). It assumes only
that a block's noise is as likely as its mirror image.

To stop when the figures look good makes noise look good. So there are few looks, at ``first``,
twice that, ... and at ``most`` examples, and each gets ``error_rate`` / looks. Of the datasets
without any signal at most ``error_rate`` are called resolved, at any look.
"""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import signal_fractions
from merit_fast.errors import InputError, MeritFastError

if TYPE_CHECKING:
    from merit_fast.manifests.sketch_state import SketchState

Array = npt.NDArray[np.float64]

_EXACT_BLOCKS = 14
_DRAWS = 8191
_POWER = 0.8
_NOISE = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class Signal:
    """Signal of one dataset's mean gradient.

    Attributes:
        fraction: U / R with an unbiased U; not clipped, so below 0 on noise now and then.
        error: block-jackknife standard error of ``fraction``; rather too large where there is
            little signal.
        p_value: p-value of no signal at all.
        ratio: U over its standard deviation under no signal, sqrt(2 sum_{a != b} <S_a, S_b>^2) /
            (n^2 - sum_b n_b^2).
        num_examples: n.
    """

    fraction: float
    error: float
    p_value: float
    ratio: float
    num_examples: int

    def examples_needed(self, error_rate: float) -> int:
        """Number of examples that resolves the dataset at ``error_rate`` four times in five.

        ``ratio`` grows as n while noise prevails. Below 1.64 it may be pure noise; 1.64 then
        replaces it, and the result is a lower bound.
        """
        wanted = NormalDist().inv_cdf(1 - error_rate) + NormalDist().inv_cdf(_POWER)
        return math.ceil(self.num_examples * wanted / max(self.ratio, _NOISE))


def measure_signal(state: "SketchState") -> Signal:
    """Measures the signal from block sums and weights; leaves out blocks without examples.

    Raises:
        MeritFastError: fewer than two blocks have examples.
    """
    sums = state.block_sums.numpy()
    counts = state.block_counts.numpy()
    filled = counts > 0
    sums = sums[filled]
    weights = state.block_weights.numpy()[filled]
    counts = counts[filled]
    if len(counts) < 2:
        raise MeritFastError(
            f"signal fraction: needs examples in two blocks or more, got {len(counts)}"
        )
    gram = sums @ sums.T
    squares = np.diag(gram)
    fraction, error = signal_fractions(gram[None], weights[None])
    spread = np.sqrt(2 * ((gram**2).sum() - (squares**2).sum()))
    return Signal(
        fraction=float(fraction[0]),
        error=float(error[0]),
        p_value=_sign_test(gram),
        ratio=float((gram.sum() - squares.sum()) / spread) if spread > 0 else 0.0,
        num_examples=int(counts.sum()),
    )


def looks(first: int, most: int) -> tuple[int, ...]:
    """Sample sizes at which the stopping rule is tested: first, 2 first, 4 first, ... and most."""
    doubled = itertools.takewhile(lambda n: n < most, (first * 2**k for k in itertools.count()))
    return (*doubled, most)


def enough(signal: Signal, precision: float, error_rate: float) -> bool:
    """Whether there is a signal (at ``error_rate``), with ``error <= precision * fraction``."""
    return signal.p_value <= error_rate and signal.error <= precision * signal.fraction


def next_examples(
    state: "SketchState", most: int, precision: float, *, first: int = 32, error_rate: float = 0.05
) -> int:
    """Number of examples of this dataset to sketch before the next test; 0: it is done.

    Args:
        state: sums of the examples sketched so far, perhaps none.
        most: number of available examples.
        precision: largest standard error of the signal fraction, relative to it; 0: take ``most``
            without a test.
        first: examples at the first test.
        error_rate: largest share of the datasets without signal that may stop early.

    Raises:
        InputError: ``blocks`` are too few for so small an error rate.
    """
    count = state.num_examples
    if precision <= 0 or count >= most:
        return max(most - count, 0)
    schedule = looks(first, most)
    check_blocks(len(state.block_counts), first, most, error_rate)
    if count in schedule and enough(measure_signal(state), precision, error_rate / len(schedule)):
        return 0
    return next(look for look in schedule if look > count) - count


def describe_signal(
    state: "SketchState", most: int, *, first: int = 32, error_rate: float = 0.05
) -> str:
    """One line on a finished dataset: its signal fraction, or the examples it still needs."""
    signal = measure_signal(state)
    rate = error_rate / len(looks(first, most))
    if signal.p_value <= rate:
        return (
            f"signal fraction {signal.fraction:.2f} +- {signal.error:.2f} "
            f"of {signal.num_examples} examples"
        )
    more = max(1, signal.examples_needed(rate) - signal.num_examples)
    about = "about" if signal.ratio > _NOISE else "at least"
    return f"not resolvable with {signal.num_examples} examples: needs {about} {more} more examples"


def check_blocks(blocks: int, first: int, most: int, error_rate: float) -> None:
    """Raises InputError if no signal could pass: 2^(1 - blocks) > error_rate / looks."""
    number = len(looks(first, most))
    least = 1 + math.ceil(math.log2(number / error_rate))
    if blocks < least:
        raise InputError(
            f"blocks: must be at least {least} for {number} looks at error rate {error_rate}, "
            f"got {blocks}"
        )


def _sign_test(gram: Array) -> float:
    """Share of sign choices whose |sum_b e_b S_b|^2 reaches the measured one.

    Drawn for many blocks, always alike.
    """
    others = len(gram) - 1
    if len(gram) <= _EXACT_BLOCKS:
        signs = 1.0 - 2.0 * np.array(list(itertools.product((0, 1), repeat=others)))
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (_DRAWS, others))
        # The measured signs count as one of the draws.
        signs = 1.0 - 2.0 * np.concatenate([np.zeros((1, others)), drawn])
    signs = np.concatenate([np.ones((len(signs), 1)), signs], axis=1)
    squares = np.einsum("pa,ab,pb->p", signs, gram, signs, optimize=True)
    return float((squares >= gram.sum() - 1e-9 * np.abs(gram).sum()).mean())
