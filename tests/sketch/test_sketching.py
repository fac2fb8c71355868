"""The sketch stage: as many examples as needed, of the chosen parameters, and no work twice."""

import os

import pytest
from support.runs import Notes
from support.sketch.staged import example, sketch

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture import stage as sketching
from merit_fast.sketch.mixture.dataset import DatasetSketcher
from merit_fast.sketch.mixture.stage import sketch_mixture


def test_a_dataset_that_is_known_well_enough_stops_early_and_says_so(tiny_model, tmp_path):
    states, notes = sketch(tiny_model, tmp_path, precision=0.05)
    assert states["clear"].num_examples == 32 < states["mixed"].num_examples
    assert "clear: signal fraction 1.00" in notes[0] and "of 32 examples" in notes[0]
    assert notes[1].startswith("mixed: ")


def test_without_a_precision_all_examples_are_taken_and_the_first_ones_are_the_same(
    tiny_model, tmp_path
):
    (tmp_path / "all").mkdir()
    (tmp_path / "some").mkdir()
    states, notes = sketch(tiny_model, tmp_path / "all")
    assert [state.num_examples for state in states.values()] == [80, 80] and notes == []
    stopped, _ = sketch(tiny_model, tmp_path / "some", precision=0.05)
    mean = states["clear"].block_sums.sum(0) / 80
    early = stopped["clear"].block_sums.sum(0) / 32
    assert float((mean - early).norm() / mean.norm()) < 1e-5  # one row again and again


def test_parameters_are_those_asked_for(tiny_model, tmp_path):
    states, _ = sketch(tiny_model, tmp_path, parameters="blocks", examples=4)
    names = states["clear"].identity.parameters
    assert names and all(".layers." in name for name in names)
    with pytest.raises(InputError, match="parameters: must select at least one"):
        sketch(tiny_model, tmp_path / "none", parameters="no such name")


def test_what_is_there_is_not_made_again(tiny_model, tmp_path):
    first, _ = sketch(tiny_model, tmp_path, examples=4)
    (tmp_path / "mixed.safetensors").unlink()
    before = (tmp_path / "clear.safetensors").stat().st_mtime_ns
    again, _ = sketch(tiny_model, tmp_path, examples=4)
    assert (tmp_path / "clear.safetensors").stat().st_mtime_ns == before
    assert again["mixed"].to_bytes() == first["mixed"].to_bytes()


def test_too_few_blocks_for_the_looks_are_refused_before_any_work(tiny_model, tmp_path):
    with pytest.raises(InputError, match="blocks: must be at least"):
        sketch(tiny_model, tmp_path, precision=0.1, blocks=4)
    assert not list(tmp_path.iterdir())


def sketched(model, folder, rows, earlier=None, fingerprint="fingerprint", **options):
    """A finished output: (name -> bytes of its files, the notes)."""
    options = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 16, "examples": 20, **options}
    folder.mkdir(parents=True)
    progress = Notes()
    sketch_mixture(
        str(model),
        fingerprint,
        rows,
        1,
        SketchConfig(**options),
        folder,
        progress,
        [earlier] if earlier else (),
    )
    return {file.name: file.read_bytes() for file in folder.iterdir()}, progress.notes


def named(names):
    return [
        Dataset(name, tuple(example([5, 9, 11, *map(ord, name), k % 9 + 5]) for k in range(24)))
        for name in names
    ]


def test_a_new_dataset_costs_itself_and_gives_the_bytes_of_a_fresh_run(
    tiny_model, tmp_path, monkeypatch
):
    first, notes = sketched(tiny_model, tmp_path / "first", named("abc"))
    assert notes == []
    whole, _ = sketched(tiny_model, tmp_path / "whole", named("dba"))

    done = []
    real = DatasetSketcher.sketch
    monkeypatch.setattr(
        DatasetSketcher, "sketch", lambda *given: done.append(given[1].name) or real(*given)
    )
    grown, notes = sketched(
        tiny_model, tmp_path / "grown", named("dba"), tmp_path / "first"
    )  # d new, c gone, reordered
    assert done == ["d"] and grown == whole
    assert notes == ["sketch: 2 of 3 datasets are as before, their sketches are reused"]
    assert grown["a.safetensors"] == first["a.safetensors"] and "c.safetensors" not in grown

    monkeypatch.setattr(
        sketching, "load_model_for", None
    )  # with nothing left to sketch there is no model to load
    fewer, _ = sketched(tiny_model, tmp_path / "fewer", named("ba"), tmp_path / "grown")
    assert set(fewer) == {"a.safetensors", "b.safetensors", "datasets.json"}


@pytest.mark.parametrize(
    "change", [{"fingerprint": "another"}, {"seed": 1}, {"examples": 19}, {"parameters": "blocks"}]
)
def test_another_model_or_option_reuses_nothing(tiny_model, tmp_path, change):
    sketched(tiny_model, tmp_path / "first", named("ab"))
    fresh, _ = sketched(tiny_model, tmp_path / "fresh", named("ab"), **change)
    again, notes = sketched(
        tiny_model, tmp_path / "again", named("ab"), tmp_path / "first", **change
    )
    assert again == fresh and notes == []


def test_a_row_that_changed_makes_its_dataset_new(tiny_model, tmp_path):
    sketched(tiny_model, tmp_path / "first", named("ab"))
    rows = named("ab")
    labels = rows[1].examples[3].labels.copy()
    labels[-1] = -100  # the same tokens, one target less
    changed = (
        *rows[1].examples[:3],
        Example(rows[1].examples[3].input_ids, labels),
        *rows[1].examples[4:],
    )
    rows[1] = Dataset("b", changed)
    options = {"examples": 24}
    sketched(tiny_model, tmp_path / "all", named("ab"), **options)
    fresh, _ = sketched(tiny_model, tmp_path / "fresh", rows, **options)
    again, notes = sketched(tiny_model, tmp_path / "again", rows, tmp_path / "all", **options)
    assert again == fresh and notes == [
        "sketch: 1 of 2 datasets are as before, their sketches are reused"
    ]


@pytest.mark.parametrize("broken", ["absent", "not JSON", "no file", "no links"])
def test_an_earlier_output_that_lacks_something_is_no_error(
    tiny_model, tmp_path, broken, monkeypatch
):
    whole, _ = sketched(tiny_model, tmp_path / "first", named("ab"))
    if broken == "absent":
        (tmp_path / "first" / "datasets.json").unlink()
    elif broken == "not JSON":
        (tmp_path / "first" / "datasets.json").write_text("{")
    elif broken == "no file":
        (tmp_path / "first" / "b.safetensors").unlink()
    else:
        monkeypatch.setattr(
            os, "link", lambda *given: (_ for _ in ()).throw(OSError("no hard links here"))
        )
    again, notes = sketched(tiny_model, tmp_path / "again", named("ab"), tmp_path / "first")
    reused = {"no file": 1, "no links": 2}.get(broken, 0)
    assert (
        again == whole
        and len(notes) == bool(reused)
        and all(f"{reused} of 2" in note for note in notes)
    )
