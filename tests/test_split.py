"""Statistics and partition: known answers, invariances, and the paper's own worked example."""

import itertools

import numpy as np
import pytest
import torch

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.split import SplitConfig
from merit_fast.split.conflict import cosine_matrix, double_center, eta_squared, measure_conflict
from merit_fast.split.partition import conflict_axes, median_partition, random_partition
from merit_fast.split.statistics import SketchIdentity, SketchState

NAMES = [f"d{i}" for i in range(16)]


def identity(**changes):
    values = dict(sketch=CountSketch(64, 0), model_fingerprint="m", parameters=("a", "b"))
    return SketchIdentity(**{**values, **changes})


def filled_state(seed, blocks=4, examples=10, who=None):
    state = SketchState.zeros(who or identity(), blocks)
    sketches = torch.randn(examples, 64, generator=torch.Generator().manual_seed(seed))
    state.add_examples(sketches, torch.arange(examples) % blocks, loss_sum=float(examples), num_target_tokens=examples)
    return state


# ---- statistics
def test_states_add_to_the_same_bits_in_any_grouping():
    sketches = torch.randint(-9, 9, (12, 64)).float()
    whole, parts = SketchState.zeros(identity(), 3), [SketchState.zeros(identity(), 3) for _ in range(3)]
    whole.add_examples(sketches, torch.arange(12) % 3, 12.0, 12)
    for i, part in enumerate(parts):
        rows = torch.arange(i * 4, i * 4 + 4)
        part.add_examples(sketches[rows], rows % 3, 4.0, 4)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert parts[2].to_bytes() == whole.to_bytes()
    assert whole.num_examples == 12 and whole.block_counts.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "other,named",
    [
        (identity(sketch=CountSketch(64, 1)), "seed"),
        (identity(sketch=CountSketch(128, 0)), "proj_dim"),
        (identity(model_fingerprint="x"), "model_fingerprint"),
        (identity(parameters=("a",)), "parameters"),
    ],
)
def test_states_that_disagree_refuse_to_merge(other, named):
    with pytest.raises(MeritFastError, match=f"disagree in {named}"):
        filled_state(0).merge(SketchState.zeros(other, 4))


def test_state_file_round_trip_and_damage(tmp_path):
    state, file = filled_state(1), tmp_path / "d.safetensors"
    file.write_bytes(state.to_bytes())
    again = SketchState.read(file)
    assert again.to_bytes() == state.to_bytes() and again.identity == state.identity
    file.write_bytes(state.to_bytes()[:-5])
    with pytest.raises(InputError, match="d.safetensors: is not a sketch state"):
        SketchState.read(file)


def test_signal_fraction_is_unbiased_and_one_without_noise():
    generator = np.random.default_rng(0)
    blocks, examples, width = 8, 64, 50
    mean = generator.standard_normal(width)
    ratios = []
    for _ in range(200):
        noise = generator.standard_normal((blocks, examples // blocks, width)) * 6
        sums = (mean + noise).sum(1)
        conflict = measure_conflict(sums[None], np.full((1, blocks), examples // blocks))
        ratios.append(conflict.signal_fraction[0] * conflict.norm[0] ** 2)
    assert np.mean(ratios) == pytest.approx(mean @ mean, rel=0.05)
    clean = measure_conflict(np.tile(mean * 8, (1, blocks, 1)), np.full((1, blocks), 8))
    assert clean.signal_fraction[0] == pytest.approx(1.0)
    assert clean.norm[0] == pytest.approx(np.linalg.norm(mean))


def test_jackknife_error_is_the_spread_of_the_cosine():
    generator = np.random.default_rng(1)
    means = generator.standard_normal((2, 40))
    cosines, errors = [], []
    for _ in range(300):
        noise = generator.standard_normal((2, 16, 40)) * 1.5
        conflict = measure_conflict(means[:, None] + noise, np.ones((2, 16)))
        cosines.append(conflict.cosine[0, 1])
        errors.append(conflict.error[0, 1])
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(cosines), rel=0.15)


def test_negative_pairs_are_counted():
    rows = np.array([[1.0, 0], [-1, 0.1], [0, 1]])
    conflict = measure_conflict(np.repeat(rows[:, None] / 2, 2, axis=1), np.ones((3, 2)))
    assert conflict.negative_pair_fraction == pytest.approx(1 / 3)
    assert np.allclose(conflict.error, 0)


def test_cosine_of_a_zero_row_is_zero():
    cosine = cosine_matrix(np.array([[0.0, 0], [1, 2]]))
    assert cosine.tolist() == [[1, 0], [0, 1]]


# ---- partition
def between(groups, gradients, hessian):
    """eta^2 / 2 times the between-group sum of squares of H^(1/2) H g: the gain of one step, up to a constant."""
    z = gradients @ np.linalg.cholesky(hessian)
    parts = [z[np.array(groups) == k] for k in set(groups)]
    return sum(len(p) / len(z) * np.sum((p.mean(0) - z.mean(0)) ** 2) for p in parts)


def test_worked_example_of_the_paper():
    """T=4 datasets at (+-1, +-1), H = diag(2, 1), step .1: gains .04, .005, 0; random mean .015; axis 1 is chosen."""
    hessian, step = np.diag([2.0, 1.0]), 0.1
    optima = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], float)
    gradients = -optima @ hessian

    def gain(groups):
        return 0.5 * step**2 * between(groups, gradients, hessian)

    assert gain([1, 1, 0, 0]) == pytest.approx(0.04)
    assert gain([1, 0, 1, 0]) == pytest.approx(0.005)
    assert gain([1, 0, 0, 1]) == pytest.approx(0.0, abs=1e-15)
    halves = [[int(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    assert np.mean([gain(groups) for groups in halves]) == pytest.approx(0.015)
    axes = conflict_axes(cosine_matrix(gradients), 1)
    groups = median_partition(axes.scores, np.full(4, 0.25), NAMES[:4]).groups
    assert groups in ((1, 1, 0, 0), (0, 0, 1, 1))
    assert gain(groups) == pytest.approx(0.04)


def test_opposites_part_and_twins_stay():
    generator = np.random.default_rng(2)
    directions = generator.standard_normal((4, 30))
    rows = np.concatenate(
        [directions, directions + 1e-3 * generator.standard_normal((4, 30)), -directions, -directions]
    )
    axes = conflict_axes(cosine_matrix(rows), 2)
    groups = median_partition(axes.scores, np.full(16, 1 / 16), NAMES).groups
    for i in range(4):
        assert groups[i] == groups[i + 4]
        assert groups[8 + i] == groups[12 + i] != groups[i]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_groups_do_not_depend_on_order_scale_or_axis_sign(axes):
    generator = np.random.default_rng(3)
    rows, weights = generator.standard_normal((16, 40)), generator.uniform(0.5, 2, 16)

    def groups(order, scale):
        names = [NAMES[i] for i in order]
        scores = conflict_axes(cosine_matrix(rows[order] * scale[order, None]), axes).scores
        return dict(zip(names, median_partition(scores, weights[order], names).groups, strict=True))

    first = groups(np.arange(16), np.ones(16))
    assert first == groups(generator.permutation(16), generator.uniform(0.1, 9, 16))
    assert set(first.values()) == set(range(2**axes))


def test_random_partition_is_balanced_seeded_and_order_free():
    weights = np.full(16, 1 / 16)
    first = random_partition(weights, NAMES, 2, np.random.default_rng(5))
    again = random_partition(weights, NAMES[::-1], 2, np.random.default_rng(5))
    other = random_partition(weights, NAMES, 2, np.random.default_rng(6))
    assert dict(zip(NAMES, first.groups, strict=True)) == dict(zip(NAMES[::-1], again.groups, strict=True))
    assert first.groups != other.groups
    assert np.bincount(first.groups).tolist() == [4, 4, 4, 4]


def test_median_lies_within_one_dataset_of_half_the_weight():
    generator = np.random.default_rng(7)
    for _ in range(50):
        weights = generator.uniform(0.1, 3, 11)
        groups = np.array(median_partition(generator.standard_normal((11, 1)), weights, NAMES[:11]).groups)
        assert abs(weights[groups == 0].sum() - weights.sum() / 2) <= weights.max() / 2 + 1e-12


def test_no_group_is_empty_even_under_one_heavy_dataset():
    weights = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    scores = np.random.default_rng(0).standard_normal((8, 3))
    assert sorted(median_partition(scores, weights, NAMES[:8]).groups) == list(range(8))
    with pytest.raises(ValueError, match="8 groups need at least as many datasets, got 7"):
        median_partition(scores[:7], weights[:7], NAMES[:7])


def test_eta_squared_is_the_explicit_share():
    generator = np.random.default_rng(8)
    z, weights = generator.standard_normal((10, 6)), generator.uniform(0.5, 2, 10)
    weights /= weights.sum()
    groups = generator.integers(0, 3, 10)
    mean = weights @ z
    total = weights @ np.sum((z - mean) ** 2, axis=1)
    between_groups = 0.0
    for k in range(3):
        w = weights * (groups == k)
        between_groups += w.sum() * np.sum((w @ z / w.sum() - mean) ** 2)
    assert eta_squared(double_center(z @ z.T, weights), weights, groups) == pytest.approx(between_groups / total)


def test_identical_gradients_still_split_evenly():
    axes = conflict_axes(np.ones((8, 8)), 2)
    partition = median_partition(axes.scores, np.full(8, 1 / 8), NAMES[:8])
    assert np.bincount(partition.groups).tolist() == [2, 2, 2, 2]
    assert eta_squared(double_center(np.ones((8, 8)), np.full(8, 1 / 8)), np.full(8, 1 / 8), partition.groups) == 0


# ---- the stage
def test_split_stage_refuses_more_groups_than_datasets_and_mixed_states(tmp_path):
    from merit_fast.split import split_mixture

    example = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))
    datasets = [Dataset(name, (example,) * 3) for name in NAMES[:3]]
    with pytest.raises(InputError, match="split.groups: must be at most the number of datasets \\(3\\), got 4"):
        split_mixture(tmp_path, datasets, "f", SplitConfig(groups=4))
    for i, dataset in enumerate(datasets):
        who = identity(model_fingerprint="other") if i == 2 else identity()
        (tmp_path / f"{dataset.name}.safetensors").write_bytes(filled_state(i, blocks=8, who=who).to_bytes())
    with pytest.raises(MeritFastError, match="model_fingerprint"):
        split_mixture(tmp_path, datasets, "f", SplitConfig(groups=2))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"groups": 3}, "groups: must be 2, 4 or 8"),
        ({"proj_dim": 100}, "multiple of 16"),
        ({"examples": 1}, "at least 2"),
        ({"blocks": 1}, "at least 2"),
    ],
)
def test_split_options_are_checked(values, message):
    with pytest.raises(InputError, match=message):
        SplitConfig(**values)
