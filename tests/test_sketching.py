"""The sketch stage: as many examples as it takes, of the parameters asked for, and no more work than is left."""

import numpy as np
import pytest
from test_pipeline import Notes

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError
from merit_fast.split.config import SketchConfig
from merit_fast.split.sketching import sketch_mixture
from merit_fast.split.statistics import SketchState


def example(ids):
    ids = np.array(ids, np.int32)
    return Example(ids, np.where(np.arange(len(ids)) < 3, -100, ids).astype(np.int32))


def datasets():
    numbers = np.random.default_rng(0)
    clear = Dataset("clear", (example([5, 9, 11, 20, 30, 40]),) * 80)  # one row again and again: no noise at all
    mixed = Dataset("mixed", tuple(example(numbers.integers(5, 90, 7)) for _ in range(80)))
    return [clear, mixed]


def sketch(model, folder, **options):
    options = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 16, "examples": 80, **options}
    progress = Notes()
    sketch_mixture(str(model), "fingerprint", datasets(), 1, SketchConfig(**options), folder, progress)
    states = {name: SketchState.read(folder / f"{name}.safetensors") for name in ("clear", "mixed")}
    return states, progress.notes


def test_a_dataset_that_is_known_well_enough_stops_early_and_says_so(tiny_model, tmp_path):
    states, notes = sketch(tiny_model, tmp_path, precision=0.05)
    assert states["clear"].num_examples == 32 < states["mixed"].num_examples
    assert "clear: signal fraction 1.00" in notes[0] and "of 32 examples" in notes[0]
    assert notes[1].startswith("mixed: ")


def test_without_a_precision_all_examples_are_taken_and_the_first_ones_are_the_same(tiny_model, tmp_path):
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
