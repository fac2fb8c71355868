"""Sketches are of what training descends: weights by tokens, both means, rows that are shared."""

import numpy as np
import pytest
import torch
from support.checks import assert_close
from support.runs import Notes
from support.sketch.exact_gradients import SKETCH, sketch_of_loss, tiny
from support.sketch.staged import example
from torch.nn import functional as F

from merit_fast.data import Dataset
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import load_model
from merit_fast.options.parser import to_plain
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.gradients import GradientSketcher, sketch_gradients
from merit_fast.sketch.mixture.stage import sketch_mixture
from merit_fast.split import SplitConfig, split_mixture

LENGTHS = [5, 6, 5, 7, 6, 5, 40, 44]  # six short rows and two long ones


def rows_of(lengths, seed=0):
    numbers = np.random.default_rng(seed)
    return tuple(example(numbers.integers(5, 90, length)) for length in lengths)


def stage(model, folder, datasets, **options):
    """Runs the stage; returns the states by name."""
    options = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 4, "seed": 7, **options}
    folder.mkdir(parents=True, exist_ok=True)
    sketch_mixture(str(model), "fingerprint", datasets, 1, SketchConfig(**options), folder, Notes())
    return {d.name: SketchState.read(folder / f"{d.name}.safetensors") for d in datasets}


def row_loss(model, row, reduction="mean"):
    """The loss of one row, without any of the package's own code."""
    ids = torch.tensor(row.input_ids)[None].long()
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor(row.labels)[1:].long()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)


def target_tokens(rows):
    return np.array([int((row.labels[1:] != -100).sum()) for row in rows])


@pytest.mark.parametrize("weight", ["tokens", "examples"])
def test_the_mean_of_mixed_lengths_is_the_one_that_was_asked_for(tiny_model, tmp_path, weight):
    rows = rows_of(LENGTHS)
    tokens = target_tokens(rows)
    model = load_model(str(tiny_model), "fp32")
    sums = sketch_of_loss(model, lambda: sum(row_loss(model, row, "sum") for row in rows))
    means = sketch_of_loss(model, lambda: sum(row_loss(model, row) for row in rows))
    state = stage(tiny_model, tmp_path, [Dataset("a", rows)], weight=weight)["a"]
    number = {"tokens": tokens.sum(), "examples": len(rows)}[weight]
    total = {"tokens": sums, "examples": means}[weight]
    other = {"tokens": means, "examples": sums}[weight]
    assert state.identity.weight == weight
    assert float(state.block_weights.sum()) == number and state.num_examples == len(rows)
    assert_close(state.block_sums.sum(0) / number, total[0].double() / number)
    assert_close(state.other_sum, other[0].double())
    cosine = float(F.cosine_similarity(sums.double(), means.double())[0])
    assert state.weighting_cosine == pytest.approx(cosine, abs=1e-5) and cosine < 0.95
    assert state.length_counts.tolist() == np.bincount(tokens).tolist()
    assert state.num_target_tokens == tokens.sum()
    squares = {"tokens": tokens.astype(float) ** 2, "examples": np.ones(8)}[weight]
    assert float(state.block_square_weights.sum()) == squares.sum()
    if weight == "tokens":  # what update gets is what the stage adds
        assert stage(tiny_model, tmp_path / "default", [Dataset("a", rows)])["a"].to_bytes() == (
            state.to_bytes()
        )


def test_lengths_are_exact_quantiles():
    state = SketchState.zeros(GradientSketcher(tiny("llama"), SKETCH).identity, 2)
    assert state.length_quantile(0.5) is None and state.weighting_cosine is None
    lengths = torch.tensor([30, 1, 2, 7, 5])
    state.add_examples(torch.randn(5, 4096), torch.arange(5) % 2, 0.0, lengths)
    assert state.length_quantile(0.5) == 5 and state.length_quantile(0.95) == 30
    state.add_examples(torch.randn(1, 4096), torch.tensor([0]))
    assert state.length_quantile(0.5) is None and state.weighting_cosine is None


def test_update_checks_weights_and_blocks():
    model = tiny("llama")
    ids = torch.randint(1, 97, (2, 6))

    def losses():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.reshape(2, -1).mean(1).sum()

    with GradientSketcher(model, SKETCH, weight="tokens") as sketcher:
        losses().backward()
        with pytest.raises(InputError, match="num_target_tokens: must be given with weight"):
            sketcher.update(["a", "b"])
        with pytest.raises(InputError, match="num_target_tokens: must be whole .* 1 on, got 0"):
            sketcher.update(["a", "b"], None, [5, 0])
        with pytest.raises(InputError, match="blocks: must be from 0 to 7, got 8"):
            sketcher.update(["a", "b"], None, [5, 5], blocks=[0, 8])
        with pytest.raises(InputError, match=r"blocks: must be one per example \(2\), got 1"):
            sketcher.update(["a", "b"], None, [5, 5], blocks=[0])
        assert sketcher.state == {}
        sketches = sketcher.update(["a", "a"], None, [5, 5], blocks=torch.tensor([3, 3]))
    state = sketcher.state["a"]
    assert state.block_counts.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert_close(state.block_sums[3], 5 * sketches.double().sum(0))
    with pytest.raises(InputError, match="weight: must be one of 'tokens', 'examples', got 'all'"):
        sketch_gradients(model, 4096, weight="all")


def test_states_of_another_weight_refuse_to_add(tmp_path):
    states = [
        SketchState.zeros(GradientSketcher(tiny("llama"), SKETCH, weight=weight).identity, 8)
        for weight in ("tokens", "examples")
    ]
    with pytest.raises(MeritFastError, match="disagree in weight: 'tokens' and 'examples'"):
        states[0].merge(states[1])
    with pytest.raises(MeritFastError, match="weight tokens needs num_target_tokens"):
        states[0].add_examples(torch.randn(1, 4096), torch.tensor([0]))


def test_the_preset_decides_the_weight_unless_it_is_given():
    assert SplitConfig().sketch_config().weight == "tokens"
    assert SplitConfig(preset="paper").sketch_config().weight == "examples"
    assert SplitConfig(preset="paper", weight="tokens").sketch_config().weight == "tokens"
    assert to_plain(SplitConfig(weight="examples").sketch_config())["weight"] == "examples"


# ---- datasets that share rows
def split(folder, datasets, **options):
    return split_mixture(
        folder,
        datasets,
        "mixture",
        SplitConfig(groups=1, **options),
        base_fingerprint="base",
        steps=4000,
        sketched_at="at the base model",
        texts=dict,
    )


def test_the_same_rows_under_two_names_have_cosine_one(tiny_model, tmp_path):
    rows = rows_of([9] * 40)
    own = rows_of([8] * 40, seed=1)
    datasets = [Dataset("a", rows), Dataset("b", rows[::-1]), Dataset("c", own)]
    states = stage(tiny_model, tmp_path, datasets)
    assert torch.equal(states["a"].block_counts, states["b"].block_counts)
    assert len(states["a"].shared_rows) == 40 and len(states["c"].shared_rows) == 0
    manifest = split(tmp_path, datasets)
    found = [(pair.first, pair.second, pair.rows) for pair in manifest.shared_rows]
    assert found == [("a", "b", 40)] and manifest.weight == "tokens"
    assert manifest.gram[0][1] == pytest.approx(manifest.gram[0][0], rel=1e-3)
    if manifest.similarity[0][1] is not None:
        assert manifest.similarity[0][1] == pytest.approx(1, abs=1e-3)
    assert manifest.datasets[0].median_length == 6 == manifest.datasets[0].long_length
    assert manifest.datasets[0].weighting_cosine == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match=r"split.weight: must be that of the sketches \(tokens\)"):
        split(tmp_path, datasets, weight="examples")


def test_only_datasets_whose_sharing_changes_are_sketched_again(tiny_model, tmp_path):
    rows = rows_of([9] * 60)
    alone = [Dataset("a", rows[:40]), Dataset("c", rows_of([8] * 20, seed=1))]
    stage(tiny_model, tmp_path / "first", alone)
    joined = [*alone, Dataset("b", rows[20:])]
    options = SketchConfig(proj_dim=4096, dtype="fp32", batch_size=4, seed=7)
    notes = Notes()
    (tmp_path / "second").mkdir()
    sketch_mixture(
        str(tiny_model), "fingerprint", joined, 1, options, tmp_path / "second", notes,
        [tmp_path / "first"],
    )  # fmt: skip
    assert notes.notes == ["sketch: 1 of 3 datasets are as before, their sketches are reused"]
    fresh = stage(tiny_model, tmp_path / "fresh", joined)
    for name, state in fresh.items():
        again = SketchState.read(tmp_path / "second" / f"{name}.safetensors")
        assert again.to_bytes() == state.to_bytes()
    shared = [(p.first, p.second, p.rows) for p in split(tmp_path / "fresh", joined).shared_rows]
    assert shared == [("a", "b", 20)]


def test_adaptive_sampling_keeps_the_blocks_of_shared_rows(tiny_model, tmp_path):
    rows = rows_of([9] * 80)
    datasets = [Dataset("a", rows), Dataset("b", rows)]
    states = stage(tiny_model, tmp_path, datasets, precision=0.3, examples=80)
    whole = stage(tiny_model, tmp_path / "all", datasets, examples=80)
    for name, state in states.items():
        assert 32 <= state.num_examples <= 80
        assert len(state.shared_rows) == state.num_examples
        assert (state.block_counts <= whole[name].block_counts).all()


def test_a_dataset_of_one_row_that_another_has_is_refused_before_any_work(tiny_model, tmp_path):
    rows = rows_of([9] * 20)
    with pytest.raises(InputError, match="^b: must have rows of its own"):
        stage(tiny_model, tmp_path, [Dataset("a", rows), Dataset("b", rows[:1] * 12)])
    assert not list(tmp_path.iterdir())


# ---- auxiliary losses
def test_the_stage_takes_no_auxiliary_loss(tmp_path):
    rows = rows_of([9, 7, 8, 6])
    sums = []
    for routers in (False, True):
        model = tiny("mixtral")
        model.config.output_router_logits = routers
        model.config.router_aux_loss_coef = 10.0
        folder = tmp_path / str(routers)
        model.save_pretrained(folder / "model")
        states = stage(folder / "model", folder / "sketch", [Dataset("a", rows)], blocks=4)
        sums.append(states["a"].block_sums)
    assert_close(sums[0], sums[1])
