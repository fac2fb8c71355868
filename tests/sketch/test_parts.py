"""Parts of a model: their sketches come from the same pass and add up to the whole's."""

import itertools
import json
import os

import pytest
import torch
from support.checks import assert_close
from support.runs import Notes
from support.sketch.exact_gradients import exact_sketches, ragged_examples, summed_loss, tiny
from support.sketch.staged import datasets

import merit_fast
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchState, state_path
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture import stage
from merit_fast.sketch.mixture.stage import sketch_mixture
from merit_fast.sketch.names import named_parameters
from merit_fast.sketch.passes.begin import begin_pass
from merit_fast.sketch.passes.parts import Sketches

PARTS = {"attention": "self_attn", "mlp": "mlp", "ends": "embed_tokens|lm_head"}
REST = "norm"  # what PARTS leave out of Llama-like models
NAMES = ("a", "b", "a")


def states_of(model, parts, **options):
    """(states of the whole, states by part) of three ragged examples in two datasets."""
    with merit_fast.sketch_gradients(model, 4096, 7, parts=parts, **options) as sketcher:
        summed_loss(model, ragged_examples()).backward()
        sketcher.update(NAMES, loss_sums=[1.0, 2.0, 3.0], num_target_tokens=[4, 5, 6])
    return sketcher.state, sketcher.part_state


def names_in(model, pattern):
    return {name for name, _ in named_parameters(model) if pattern in name}


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_part_has_the_sketch_of_its_own_gradients(architecture):
    model = tiny(architecture)
    _, parts = states_of(model, {"attention": "self_attn", "mlp": "mlp", "norms": "norm"})
    for part, word in (("attention", "self_attn"), ("mlp", "mlp"), ("norms", "norm")):
        names = names_in(model, word)
        exact = exact_sketches(model, ragged_examples(), names)
        for dataset in "ab":
            state = parts[part][dataset]
            rows = [row for row, name in enumerate(NAMES) if name == dataset]
            assert_close(state.block_sums.sum(0), exact[rows].double().sum(0))
            norms = exact[rows].double().square().sum()
            assert float(state.block_square_norms.sum()) == pytest.approx(float(norms), rel=1e-4)
            assert set(state.identity.parameters) == names
            assert state.num_target_tokens == {"a": 10, "b": 5}[dataset]
            assert state.loss_sum == {"a": 4.0, "b": 2.0}[dataset]


def test_parts_and_rest_add_up_to_the_whole_which_parts_change_by_rounding_only():
    model = tiny("llama")
    plain, nothing = states_of(model, None)
    whole, parts = states_of(model, {**PARTS, "rest": REST})
    assert nothing == {}
    for dataset in "ab":
        summed = sum(parts[part][dataset].block_sums for part in parts)
        assert_close(whole[dataset].block_sums, summed)
        assert_close(whole[dataset].block_sums, plain[dataset].block_sums)
        assert whole[dataset].identity == plain[dataset].identity
        counts = [parts[part][dataset].block_counts for part in parts]
        assert all(torch.equal(count, whole[dataset].block_counts) for count in counts)


def test_the_order_in_which_parts_are_named_changes_no_bit():
    model = tiny("llama")
    first, of_first = states_of(model, PARTS)
    second, of_second = states_of(model, dict(reversed(PARTS.items())))
    for dataset in "ab":
        assert first[dataset].to_bytes() == second[dataset].to_bytes()
        for part in PARTS:
            assert of_first[part][dataset].to_bytes() == of_second[part][dataset].to_bytes()


class Odd(torch.nn.Module):
    """Uses one layer's weight by itself, so that it takes a backward pass per example."""

    def __init__(self):
        super().__init__()
        self.fast = torch.nn.Linear(6, 5)
        self.slow = torch.nn.Linear(6, 5, bias=False)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.fast(x) + (x @ self.slow.weight.T).sin()


def test_slow_and_unused_parameters_have_parts_too():
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(4, 3, 6)
    parts = {"fast": "^fast", "slow": "^slow", "unused": "^unused"}

    def sketched(pattern, value):
        with merit_fast.sketch_gradients(
            model, 4096, parameters=pattern, uncovered="autograd", check="always", parts=value
        ) as sketcher:
            model(x).square().sum().backward()
            whole = sketcher.update(["d"] * 4)
        return whole, sketcher

    whole, sketcher = sketched("all", parts)
    assert list(sketcher.slow_parameters) == ["slow.weight"]
    alone = {part: sketched(parts[part], None)[0] for part in ("fast", "slow")}
    for part, rows in alone.items():
        assert_close(sketcher.part_state[part]["d"].block_sums[:4], rows.double())
    assert not sketcher.part_state["unused"]["d"].block_sums.any()
    assert_close(whole, alone["fast"] + alone["slow"])


def test_packed_rows_are_divided_by_part_too():
    model = tiny("llama")
    examples = ragged_examples()
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids = torch.cat([torch.tensor(example.input_ids).long() for example in examples])
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mask = (segment[:, None] == segment) & (positions[:, None] >= positions)
    mask = torch.where(mask, 0.0, -torch.inf)[None, None]
    with merit_fast.sketch_gradients(model, 4096, 7, parts=PARTS) as sketcher:
        sketcher.packed(bounds)
        logits = model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False
        ).logits[0]
        total = 0.0
        for b, example in enumerate(examples):
            labels = torch.tensor(example.labels).long()[1:]
            rows = logits[bounds[b] : bounds[b + 1] - 1].float()
            total = total + torch.nn.functional.cross_entropy(
                rows, labels, ignore_index=-100, reduction="sum"
            )
        total.backward()
        sketcher.update(["a", "b", "c"])
    names = names_in(model, "self_attn")
    exact = exact_sketches(model, examples, names).double()
    for row, dataset in enumerate("abc"):
        assert_close(sketcher.part_state["attention"][dataset].block_sums.sum(0), exact[row])


def test_sums_of_several_devices_add_up_by_part():
    part_of = {"x": "first", "y": "second"}
    run = begin_pass(CountSketch(4096, 0), {}, part_of, torch.zeros(2, 3), None)
    devices = torch.device("cpu"), torch.device("cpu:0")  # two keys
    for number, (name, device) in enumerate(itertools.product("xyz", devices)):
        run.out(name, device).add_(10.0**number)
    found = Sketches.of(run, ("first", "second", "absent"))
    assert found.parts.keys() == {"first", "second", "absent"}
    for part, value in (("first", 11.0), ("second", 1100.0), ("absent", 0.0)):
        assert torch.equal(found.parts[part], torch.full((2, 4096), value))
    assert torch.equal(found.whole, torch.full((2, 4096), 111111.0))
    joined = found.by_example([0, 0])
    assert torch.equal(joined.parts["first"], torch.full((1, 4096), 22.0))


@pytest.mark.parametrize(
    "parts, told",
    [
        ({"mlp": "mlp", "all": "layers"}, "mlp.* matches mlp .'mlp'. and all .'layers'."),
        ({"mlp": "no such"}, "parts.mlp: must match at least one of the .* got 'no such'"),
        ({"mlp": "("}, r"parts.mlp: must be a regular expression, got '\('"),
        ({"a/b": "mlp"}, "parts: must be file names of letters.* got 'a/b'"),
        ({"..": "mlp"}, "parts: must be file names"),
        ({"": "mlp"}, "parts: must be file names"),
        ({"mlp": "mlp", "MLP": "self_attn"}, "names that differ by more than their case"),
    ],
)
def test_wrong_parts_are_refused_by_name(parts, told):
    with pytest.raises(InputError, match=told):
        merit_fast.sketch_gradients(tiny("llama"), 4096, parts=parts)


# ---- the stage
def files_of(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def staged(model, folder, earlier=None, chosen=None, **options):
    options = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 4, "examples": 8, **options}
    progress = Notes()
    inputs = (str(model), "fingerprint", chosen or datasets(), 1, SketchConfig(**options))
    sketch_mixture(*inputs, folder, progress, [earlier] if earlier else ())
    return files_of(folder), progress.notes


def test_the_stage_writes_a_folder_per_part_and_says_once_what_is_in_none(tiny_model, tmp_path):
    files, notes = staged(tiny_model, tmp_path, parts=PARTS)
    wanted = {f"parts/{part}/{name}.safetensors" for part in PARTS for name in ("clear", "mixed")}
    assert set(files) == wanted | {"clear.safetensors", "mixed.safetensors", "datasets.json"}
    assert len(notes) == 1 and "are in no part, such as" in notes[0] and "norm" in notes[0]
    whole = SketchState.read(tmp_path / "mixed.safetensors")
    of_parts = [SketchState.read(state_path(tmp_path, "mixed", part)) for part in PARTS]
    assert all(
        len(state.identity.parameters) < len(whole.identity.parameters) for state in of_parts
    )
    _, notes = staged(tiny_model, tmp_path / "all", parts={"everything": "."})
    assert notes == []


def test_parts_are_reused_renamed_and_made_again_when_damaged(tiny_model, tmp_path):
    fresh, _ = staged(tiny_model, tmp_path / "a", parts=PARTS)
    again, notes = staged(tiny_model, tmp_path / "b", tmp_path / "a", parts=PARTS)
    assert again == fresh and "2 of 2 datasets are as before" in notes[0]
    damaged = state_path(tmp_path / "a", "mixed", "mlp")
    content = damaged.read_bytes()
    damaged.unlink()  # the other output has the same file
    damaged.write_bytes(content[:-1] + b"\x01")
    again, notes = staged(tiny_model, tmp_path / "c", tmp_path / "a", parts=PARTS)
    assert again == fresh and "1 of 2 datasets" in notes[0]
    state_path(tmp_path / "b", "clear", "ends").unlink()
    again, notes = staged(tiny_model, tmp_path / "d", tmp_path / "b", parts=PARTS)
    assert again == fresh and "1 of 2 datasets" in notes[0]


@pytest.mark.parametrize("other", [None, {"attention": "self_attn"}, {**PARTS, "mlp": "mlp.up"}])
def test_other_parts_reuse_nothing_and_leave_nothing_behind(tiny_model, tmp_path, other):
    fresh, _ = staged(tiny_model, tmp_path / "fresh", parts=other)
    staged(tiny_model, tmp_path / "work", parts=PARTS)
    again, notes = staged(tiny_model, tmp_path / "work", parts=other)
    assert again == fresh and not any("reused" in note for note in notes)
    left = {folder.name for folder in (tmp_path / "work").rglob("*") if folder.is_dir()}
    assert left == ({"parts", *other} if other else set())


def test_a_wrong_part_ends_the_stage_before_any_sum(tiny_model, tmp_path):
    with pytest.raises(InputError, match="parts.mlp: must match"):
        staged(tiny_model, tmp_path, parts={"mlp": "no such"})
    assert set(files_of(tmp_path)) <= {"datasets.json"}


# ---- work of a killed run
def test_another_batch_size_keeps_every_sum(tiny_model, tmp_path):
    first, _ = staged(tiny_model, tmp_path / "a", batch_size=4)
    again, notes = staged(tiny_model, tmp_path / "b", tmp_path / "a", batch_size=2)
    assert again == first and "2 of 2 datasets" in notes[0]
    fresh, _ = staged(tiny_model, tmp_path / "c", batch_size=2)
    for name in ("clear.safetensors", "mixed.safetensors"):
        one = SketchState.read(tmp_path / "a" / name)
        other = SketchState.read(tmp_path / "c" / name)
        assert_close(one.block_sums, other.block_sums)


def test_a_crash_while_states_are_taken_over_loses_none(tiny_model, tmp_path, monkeypatch):
    fresh, _ = staged(tiny_model, tmp_path, parts=PARTS)
    real = os.replace
    for stop in range(1, 9):
        left = stop

        def crash(*given):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", crash)
            staged(tiny_model, tmp_path, parts=PARTS)
        with monkeypatch.context() as patched:
            patched.setattr(
                "merit_fast.sketch.mixture.stage.load_model_for", None
            )  # nothing is left to sketch
            again, _ = staged(tiny_model, tmp_path, parts=PARTS)
        assert again == fresh


def test_sums_do_not_depend_on_the_datasets_sketched_before(tiny_model, tmp_path, monkeypatch):
    """Parameters may turn out slow in the first batch, and then batches have one example."""
    real = stage.load_model_for

    def with_stray_use(*given):
        model = real(*given)
        weight = model.model.norm.weight
        model.model.layers[0].register_forward_hook(lambda _, __, output: output * weight.mean())
        return model

    monkeypatch.setattr(stage, "load_model_for", with_stray_use)
    clear, mixed = datasets()
    both, _ = staged(tiny_model, tmp_path / "both", chosen=[clear, mixed], parts=PARTS)
    second, _ = staged(tiny_model, tmp_path / "second", chosen=[mixed], parts=PARTS)
    of_mixed = {name for name in second if "mixed" in name}
    assert {name: both[name] for name in of_mixed} == {name: second[name] for name in of_mixed}
    slow = json.loads(both["datasets.json"])["mixed"]["check"]["slow_parameters"]
    assert slow == ["model.norm.weight"]
