"""Sketch states, and the split stage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch
from merit_fast.manifests import sketch_state
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.options.parser import to_plain
from merit_fast.split import SplitConfig, split_mixture
from merit_fast.split.search.problem import Pins

NAMES = [f"d{i}" for i in range(16)]


def identity(**changes):
    values = dict(sketch=CountSketch(4096, 0), model_fingerprint="m", parameters=("a", "b"))
    return SketchIdentity(**{**values, **changes})


def filled_state(seed, blocks=4, examples=10, who=None):
    state = SketchState.zeros(who or identity(), blocks)
    sketches = torch.randn(examples, 4096, generator=torch.Generator().manual_seed(seed))
    state.add_examples(
        sketches,
        torch.arange(examples) % blocks,
        loss_sum=float(examples),
        num_target_tokens=torch.ones(examples, dtype=torch.int64),
    )
    return state


# ---- statistics
def test_states_add_to_the_same_bits_in_any_grouping():
    sketches = torch.randint(-9, 9, (12, 4096)).float()
    whole = SketchState.zeros(identity(), 3)
    shards = [SketchState.zeros(identity(), 3) for _ in range(3)]
    whole.add_examples(sketches, torch.arange(12) % 3, 12.0, torch.arange(12))
    for i, shard in enumerate(shards):
        rows = torch.arange(i * 4, i * 4 + 4)
        shard.add_examples(sketches[rows], rows % 3, 4.0, rows)
    shards[2].merge(shards[0])
    shards[2].merge(shards[1])
    assert shards[2].to_bytes() == whole.to_bytes()
    assert whole.num_examples == 12 and whole.block_counts.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "other,named",
    [
        (identity(sketch=CountSketch(4096, 1)), "seed"),
        (identity(sketch=CountSketch(8192, 0)), "proj_dim"),
        (identity(model_fingerprint="x"), "model_fingerprint"),
        (identity(parameters=("a",)), "parameters"),
    ],
)
def test_states_that_disagree_refuse_to_merge(other, named):
    with pytest.raises(MeritFastError, match=f"disagree in {named}"):
        filled_state(0).merge(SketchState.zeros(other, 4))


def test_state_file_round_trip_and_damage(tmp_path):
    state = filled_state(1)
    file = tmp_path / "d.safetensors"
    file.write_bytes(state.to_bytes())
    again = SketchState.read(file)
    assert again.to_bytes() == state.to_bytes() and again.identity == state.identity
    file.write_bytes(state.to_bytes()[:-5])
    with pytest.raises(InputError, match="d.safetensors: is not a sketch state"):
        SketchState.read(file)


def test_a_state_of_an_earlier_hash_is_refused_in_one_line(tmp_path, monkeypatch):
    file = tmp_path / "d.safetensors"
    with monkeypatch.context() as earlier:
        earlier.setattr(sketch_state, "HASH_VERSION", 2)
        file.write_bytes(filled_state(1).to_bytes())
    with pytest.raises(InputError) as caught:
        SketchState.read(file)
    line = f"{file}: hash_version: must be {HASH_VERSION}, got 2; remove it to sketch again"
    assert str(caught.value) == line


def test_a_state_without_weights_is_refused_in_one_line(tmp_path):
    """As files were before rows had weights."""
    file = tmp_path / "d.safetensors"
    state = filled_state(1)
    kept = {"block_sums": state.block_sums, "block_counts": state.block_counts}
    metadata = {k: v for k, v in state.identity.metadata().items() if k != "weight"}
    file.write_bytes(save(kept, {"identity": json.dumps(metadata)}))
    with pytest.raises(InputError) as caught:
        SketchState.read(file)
    line = f"{file}: weight: must be tokens or examples, got None; remove it to sketch again"
    assert str(caught.value) == line


# ---- the stage
def dataset(name, rows=3, texts=None):
    example = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))
    return Dataset(name, (example,) * rows)


def split(directory, datasets, config, **options):
    defaults = {
        "base_fingerprint": "base",
        "steps": 4000,
        "sketched_at": "at the base model",
        "texts": dict,
    }
    return split_mixture(directory, datasets, "f", config, **{**defaults, **options})


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """16 datasets on two axes, 64 examples each; the last is pure noise.

    The signs of the axes are known by number.
    """
    folder = tmp_path_factory.mktemp("sketch")
    numbers = torch.Generator().manual_seed(0)
    axes = torch.randn(2, 4096, generator=numbers) / 4096**0.5
    for i, name in enumerate(NAMES):
        signs = torch.tensor([1.0 if i % 2 else -1.0, 0.9 if i // 2 % 2 else -0.9])
        mean = signs @ axes if i < 15 else 0
        noise = torch.randn(64, 4096, generator=numbers) / 4096**0.5
        state = SketchState.zeros(identity(), 8)
        state.add_examples(mean + noise, torch.arange(64) % 8, 64.0, torch.ones(64))
        (folder / f"{name}.safetensors").write_bytes(state.to_bytes())
    return folder, [dataset(name) for name in NAMES]


def test_split_stage_refuses_more_groups_than_datasets_and_mixed_states(tmp_path):
    datasets = [dataset(name) for name in NAMES[:3]]
    with pytest.raises(
        InputError, match="split.groups: must be at most the number of datasets \\(3\\), got 4"
    ):
        split(tmp_path, datasets, SplitConfig(groups=4))
    for i, row in enumerate(datasets):
        who = identity(model_fingerprint="other") if i == 2 else identity()
        (tmp_path / f"{row.name}.safetensors").write_bytes(
            filled_state(i, blocks=8, who=who).to_bytes()
        )
    with pytest.raises(MeritFastError, match="model_fingerprint"):
        split(tmp_path, datasets, SplitConfig(groups=2))


@pytest.mark.parametrize("preset", ["debiased", "paper"])
def test_split_stage_finds_the_planted_axis_and_says_how_sure_it_is(planted, preset):
    manifest = split(*planted, SplitConfig(groups=2, preset=preset))
    groups = [row.group for row in manifest.datasets]
    assert len(set(groups[:15:2])) == len(set(groups[1:15:2])) == 1 and groups[0] != groups[1]
    separation = manifest.separation
    least = separation.null_mean + 2 * separation.null_std
    assert separation.cross_validated > least
    assert [count.groups for count in manifest.separations] == [2]  # of no K that nobody asked for
    assert [row.groups for row in manifest.numbers_tried] == [2]
    assert manifest.within_cosine > 0.3 > manifest.across_cosine
    assert manifest.base_fingerprint == "base"
    assert manifest.start_fingerprint == identity().model_fingerprint
    noise = manifest.datasets[15]
    strong = manifest.datasets[0]
    assert strong.more_examples == 0 and strong.stability > 0.9 and strong.margin > 0
    assert strong.signal_fraction == pytest.approx(
        1.81 / (1.81 + 1 / 64), abs=0.02
    )  # |mean|^2 over it plus noise / n
    assert noise.more_examples > 0
    if preset == "debiased":  # the published cosines know no noise
        assert manifest.similarity[15][0] is None and noise.gradient_norm is None
    assert len(manifest.scores[0]) == len(manifest.score_errors[0]) == 2
    assert max(map(max, manifest.score_errors)) < 0.2
    json.dumps(to_plain(manifest), allow_nan=False)


def test_split_stage_in_any_order_of_the_mixture_is_the_same(planted):
    folder, datasets = planted
    first = split(folder, datasets, SplitConfig(groups=4)).group_of("merit")
    assert split(folder, datasets[::-1], SplitConfig(groups=4)).group_of("merit") == first


def test_split_stage_chooses_k_or_says_why_not(planted):
    folder, datasets = planted
    chosen = split(folder, datasets, SplitConfig(groups="auto"))
    assert chosen.groups == 4 and "4 groups: on held-out blocks the pairs" in chosen.reason
    assert [row.groups for row in chosen.numbers_tried] == [2, 3, 4, 5, 6, 7, 8]
    assert [row.groups for row in chosen.numbers_tried if row.taken][-1] == 4
    few = split(folder, datasets, SplitConfig(groups="auto"), steps=150)
    assert (
        few.groups == 1
        and "splitting would not help" in few.reason
        and "75 optimizer steps" in few.reason
    )
    assert {row.group for row in few.datasets} == {0} and few.separation is None


@pytest.mark.parametrize("preset", ["debiased", "paper"])
def test_split_stage_of_one_dataset_and_of_two(planted, preset):
    folder, datasets = planted
    for number in (1, 2):
        manifest = split(folder, datasets[:number], SplitConfig(groups=1, preset=preset))
        assert {row.group for row in manifest.datasets} == {0} and manifest.separations == ()
        assert len(manifest.explained_variance) == 2 and len(manifest.scores) == number


def test_split_stage_obeys(planted):
    folder, datasets = planted
    listed = SplitConfig(groups=2, method="manual", manual=(tuple(NAMES[:5]), tuple(NAMES[5:])))
    assert split(folder, datasets, listed).group_of("merit")[NAMES[4]] == 0
    dealt = split(folder, datasets, SplitConfig(groups=3, method="iid"))
    assert {row.group for row in dealt.datasets} == {-1}
    pins = Pins(together=((NAMES[0], NAMES[1]),), group={NAMES[2]: 1})
    pinned = split(folder, datasets, SplitConfig(groups=2, pins=pins)).group_of("merit")
    assert pinned[NAMES[0]] == pinned[NAMES[1]] and pinned[NAMES[2]] == 1
    texts = {name: ["red apple" if i < 8 else "deep sea"] * 3 for i, name in enumerate(NAMES)}
    worded = split(
        folder, datasets, SplitConfig(groups=2, method="text-cluster"), texts=lambda: texts
    )
    assert (
        len({row.group for row in worded.datasets[:8]})
        == len({row.group for row in worded.datasets[8:]})
        == 1
    )


@pytest.mark.parametrize(
    "values,message",
    [
        (
            {"groups": 3, "preset": "paper"},
            "groups: must be a power of two with method pca-median, got 3",
        ),
        ({"groups": 0}, "groups: must be at least 1"),
        ({"groups": "auto", "method": "iid"}, "groups: must be a number with method iid"),
        ({"method": "manual"}, "manual: goes with method manual"),
        (
            {"manual": (("a",),)},
            "manual: goes with method manual, and only with it; got method pca-swap",
        ),
        ({"tolerance": -0.1}, "tolerance: must be at least 0"),
        ({"proj_dim": 100}, "multiple of 4096"),
        ({"examples": 1}, "at least 2"),
        ({"blocks": 1}, "at least 2"),
        ({"blocks": 3}, "blocks: must be at least 4 with debias blocks"),
        ({"warmup": 1.0}, "warmup: must be at least 0 and below 1"),
    ],
)
def test_split_options_are_checked(values, message):
    with pytest.raises(InputError, match=message):
        SplitConfig(**values)
