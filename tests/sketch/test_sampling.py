"""Adaptive sampling on synthetic gradients of known signal: estimates, coverage, stopping."""

import numpy as np
import pytest
import torch
from support.split.block_sums import measure_conflict

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.sketch.mixture.sampling import (
    check_blocks,
    describe_signal,
    enough,
    looks,
    measure_signal,
    next_examples,
)

WIDTH = 300
RATE = 0.05


class Source:
    """A dataset whose examples are mean + noise; noise^2 / mean^2 is ``noise`` per example.

    None: no mean.
    """

    def __init__(self, noise, seed, blocks=8, width=WIDTH):
        self.generator = np.random.default_rng(seed)
        self.width = width
        self.mean = np.zeros(width)
        if noise is not None:
            self.mean = self.generator.standard_normal(width)
            self.mean /= np.linalg.norm(self.mean) * np.sqrt(noise)
        identity = SketchIdentity(CountSketch(4096), "m", ("w",))
        self.state = SketchState.zeros(identity, blocks)
        self.state.block_sums = torch.zeros(blocks, width, dtype=torch.float64)

    def take(self, count):
        """Adds ``count`` examples, dealt to the blocks in turn.

        A block's noise is drawn as one normal of its variance.
        """
        counts = self.state.block_counts
        before = self.state.num_examples
        added = torch.bincount(
            torch.arange(before, before + count) % len(counts), minlength=len(counts)
        )
        counts += added
        self.state.block_weights += added
        sizes = added.numpy()[:, None].astype(float)
        noise = self.generator.standard_normal((len(counts), self.width)) / np.sqrt(self.width)
        self.state.block_sums += torch.as_tensor(sizes * self.mean + np.sqrt(sizes) * noise)

    def run(self, most=200, precision=0.2):
        while more := next_examples(self.state, most, precision):
            self.take(more)
        return self.state


def measured(noise, count, repeats, **options):
    sources = [Source(noise, seed, **options) for seed in range(repeats)]
    for source in sources:
        source.take(count)
    return [measure_signal(source.state) for source in sources]


# ---- the estimate
@pytest.mark.parametrize(
    "noise,count", [(8, 32), (80, 200), (300, 203)], ids=["strong", "middle", "weak, unequal"]
)
def test_fraction_is_unbiased_and_its_error_covers(noise, count):
    signals = measured(noise, count, 300)
    truth = 1 / (1 + noise / count)
    fractions = np.array([s.fraction for s in signals])
    errors = np.array([s.error for s in signals])
    assert abs(fractions.mean() - truth) < 0.02 * truth + 3 * fractions.std() / np.sqrt(300)
    # 95 % of Student's t with 7 degrees of freedom.
    inside = np.abs(fractions - truth) <= 2.365 * errors
    assert inside.mean() >= 0.93
    assert np.sqrt((errors**2).mean()) < 1.6 * fractions.std()  # covers, but not by being boundless


def test_fraction_agrees_with_the_report_of_the_split():
    source = Source(30, seed=1)
    source.take(100)
    sums = source.state.block_sums.numpy()[None]
    counts = source.state.block_counts.numpy()[None]
    assert measure_signal(source.state).fraction == pytest.approx(
        measure_conflict(sums, counts).signal_fraction[0]
    )


@pytest.mark.parametrize("width", [1, 5, WIDTH], ids=["rank 1", "rank 5", "many"])
@pytest.mark.parametrize("blocks", [8, 16], ids=["8 blocks", "16 blocks"])
def test_noise_is_called_signal_as_often_as_said(width, blocks):
    p_values = np.array([s.p_value for s in measured(None, 67, 400, width=width, blocks=blocks)])
    for rate in (0.05, 0.2):
        assert (p_values <= rate).mean() <= rate + 3 * np.sqrt(rate / 400)


def test_a_clear_signal_has_the_smallest_p_value_and_empty_blocks_are_left_out():
    source = Source(1, seed=0)
    source.take(5)
    assert measure_signal(source.state).p_value == 2**-4
    source.take(100)
    assert measure_signal(source.state).p_value == 2**-7
    single = Source(1, seed=0)
    single.take(1)
    with pytest.raises(MeritFastError, match="needs examples in two blocks or more, got 1"):
        measure_signal(single.state)


def test_a_dataset_without_any_gradient_is_not_resolvable():
    state = Source(None, seed=0).state
    state.block_counts += 25
    state.block_weights += 25
    signal = measure_signal(state)
    assert (signal.fraction, signal.error, signal.ratio, signal.p_value) == (0, 0, 0, 1)
    assert not enough(signal, 0.2, RATE)
    assert describe_signal(state, 200).startswith("not resolvable with 200 examples")


# ---- when to stop
def test_looks_double_up_to_what_there_is():
    assert looks(32, 200) == (32, 64, 128, 200)
    assert looks(32, 64) == (32, 64) and looks(32, 20) == (20,)


def test_strong_datasets_stop_early_and_weak_ones_do_not():
    taken = {
        noise: [Source(noise, seed).run().num_examples for seed in range(20)]
        for noise in (1, 8, 80, 1000, None)
    }
    assert set(taken[1]) == set(taken[8]) == {32}
    assert 32 < np.mean(taken[80]) < 120
    assert np.mean(taken[1000]) > 180 and np.mean(taken[None]) > 190


def test_what_stopped_early_is_known_as_well_as_asked():
    """Checks the stopped: rms of the true relative error, and the bias of optional stopping."""
    relative = []
    for seed in range(150):
        state = Source(80, seed).run(precision=0.2)
        signal = measure_signal(state)
        if state.num_examples < 200:
            truth = 1 / (1 + 80 / state.num_examples)
            relative.append(signal.fraction / truth - 1)
    assert len(relative) > 140
    assert np.sqrt(np.mean(np.square(relative))) < 0.2 and abs(np.mean(relative)) < 0.03


@pytest.mark.parametrize("width", [3, WIDTH], ids=["rank 3", "many"])
def test_noise_is_never_resolved_more_often_than_the_error_rate(width):
    """Over all looks of a run, with any precision."""
    schedule = looks(32, 200)
    resolved = 0
    for seed in range(400):
        source = Source(None, seed, width=width)
        for before, look in zip((0, *schedule), schedule, strict=False):
            source.take(look - before)
            if enough(measure_signal(source.state), 1e9, RATE / len(schedule)):
                resolved += 1
                break
    assert resolved / 400 <= RATE + 3 * np.sqrt(RATE / 400)


def test_without_a_precision_all_examples_are_taken_at_once():
    state = Source(1, seed=0).state
    assert next_examples(state, 200, 0.0) == 200
    assert next_examples(state, 200, 0.2) == 32
    assert next_examples(state, 20, 0.2) == 20


def test_a_run_resumed_between_looks_goes_on_to_the_next():
    source = Source(1, seed=0)
    source.take(40)
    assert next_examples(source.state, 200, 0.2) == 24


# ---- notes
def test_examples_needed_are_a_lower_bound_where_nothing_shows_and_fair_where_something_does():
    rate = RATE / 4

    def share_resolved(noise, count):
        return np.mean([s.p_value <= rate for s in measured(noise, count, 200)])

    for noise in (2000, 1000):
        signals = [s for s in measured(noise, 200, 60) if s.p_value > rate]
        stated = int(np.median([s.examples_needed(rate) for s in signals]))
        assert stated > 200 and share_resolved(noise, stated) < 0.85  # never more than it takes
    shown = [s for s in measured(600, 200, 200) if s.p_value > rate and s.ratio > 1.64]
    stated = int(np.median([s.examples_needed(rate) for s in shown]))
    assert 0.5 < share_resolved(600, stated) < 0.95


def test_the_user_is_told_in_one_line():
    state = Source(8, seed=0).run()
    assert describe_signal(state, 200).startswith("signal fraction 0.8") and describe_signal(
        state, 200
    ).endswith("of 32 examples")
    state = Source(None, seed=0).run()
    text = describe_signal(state, 200)
    assert text.startswith("not resolvable with 200 examples: needs at least 1") and text.endswith(
        "more examples"
    )


def test_blocks_too_few_for_the_error_rate_are_refused():
    check_blocks(8, 32, 200, 0.05)
    with pytest.raises(
        InputError, match="blocks: must be at least 8 for 4 looks at error rate 0.05, got 4"
    ):
        next_examples(Source(1, seed=0, blocks=4).state, 200, 0.2)
