"""The sketches of a training run become a split without the rows."""

import pytest
import torch

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.sketch_files import write_states
from merit_fast.integrations.sketch_split import split_sketches
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.split import SplitConfig

AXES = {"north": 1.0, "south": -1.0, "up": 1.0, "down": -1.0}


def state_of(direction, *, batches=8, tokens=40, model="sum: model", seed=0, weight="tokens"):
    """A state of noisy gradients along plus or minus one axis."""
    identity = SketchIdentity(CountSketch(4096, 0), model, ("weight",), weight)
    state = SketchState.zeros(identity, 8)
    generator = torch.Generator().manual_seed(seed)
    for block in range(batches):
        state.block_sums[block, 0] = 3.0 * direction
        state.block_sums[block] += torch.randn(4096, generator=generator) / 64
        state.block_counts[block] = 2
        state.block_weights[block] = 2
    for unknown in (state.block_square_norms, state.block_square_weights, state.other_sum):
        unknown.fill_(torch.nan)  # as sums of training leave it
    state.loss_sum = 2.0 * tokens
    state.num_target_tokens = tokens
    return state


def write(folder, **changes):
    states = {name: state_of(sign, seed=i) for i, (name, sign) in enumerate(AXES.items())}
    write_states(folder / "sketches", {**states, **changes})
    return folder / "sketches"


def groups_of(split):
    groups = [{d.name for d in split.datasets if d.group == group} for group in range(split.groups)]
    return sorted(groups, key=sorted)


def test_opposite_gradients_fall_into_two_groups(tmp_path):
    split = split_sketches(write(tmp_path), groups=2)
    assert groups_of(split) == [{"down", "south"}, {"north", "up"}]
    assert split.start_fingerprint == "sum: model"
    assert split.weight == "tokens" and split.shared_rows == ()
    for dataset in split.datasets:
        assert dataset.median_length is None is dataset.weighting_cosine
        assert (dataset.num_examples, dataset.num_target_tokens) == (16, 40)
        assert dataset.mean_loss == 2.0
    assert split_sketches(write(tmp_path), SplitConfig(groups=2)) == split


def test_groups_are_balanced_by_the_tokens_that_are_given(tmp_path):
    tokens = {"north": 100, "up": 100, "south": 10, "down": 10}
    split = split_sketches(write(tmp_path), groups=2, tokens=tokens)
    assert {d.name: d.num_target_tokens for d in split.datasets} == tokens
    assert not any({"north", "up"} <= group for group in groups_of(split))  # too heavy together


def test_the_number_of_groups_can_be_left_to_the_sketches(tmp_path):
    folder = write(tmp_path)
    assert split_sketches(folder, groups="auto", steps=10_000).groups in (1, 2, 4)
    with pytest.raises(InputError, match="steps: must be given with groups auto"):
        split_sketches(folder, groups="auto")


def test_sketches_that_cannot_be_split_are_refused(tmp_path):
    folder = write(tmp_path / "one", north=state_of(1.0, batches=1))
    with pytest.raises(InputError, match="north: must have two batches with target tokens"):
        split_sketches(folder, groups=2)
    folder = write(tmp_path / "names", **{"east/2": state_of(1.0)})
    with pytest.raises(InputError, match="needs dataset names of letters.* got 'east/2'"):
        split_sketches(folder, groups=2)
    folder = write(tmp_path / "models", north=state_of(1.0, model="sum: another"))
    with pytest.raises(MeritFastError, match="disagree in model_fingerprint"):
        split_sketches(folder, groups=2)
    folder = write(tmp_path / "weights", north=state_of(1.0, weight="examples"))
    with pytest.raises(MeritFastError, match="disagree in weight"):
        split_sketches(folder, groups=2)
    with pytest.raises(InputError, match=r"split.weight: must be that of the sketches \(tokens\)"):
        split_sketches(write(tmp_path / "others"), groups=2, weight="examples")
    with pytest.raises(InputError, match="tokens: must name the datasets of .*, differs in 'west'"):
        split_sketches(folder, groups=2, tokens={**dict.fromkeys(AXES, 1), "west": 1})
    with pytest.raises(InputError, match="is not a folder of sketches"):
        split_sketches(tmp_path / "absent", groups=2)
    with pytest.raises(InputError, match="must hold the sketches of two datasets or more"):
        split_sketches(tmp_path, groups=2)
    with pytest.raises(InputError, match="groups: goes into config, which is given"):
        split_sketches(folder, SplitConfig(), groups=2)
    with pytest.raises(InputError, match="sketches hold no text to cluster"):
        split_sketches(write(tmp_path / "texts"), groups=2, method="text-cluster")
