"""The sketch stage with a store: rows add up to the sums, and no work is done twice."""

import numpy as np
import pytest
import torch
from support.runs import Notes
from support.sketch.staged import example

import merit_fast
from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture import stage as sketching
from merit_fast.sketch.mixture.dataset import DatasetSketcher
from merit_fast.sketch.mixture.stage import sketch_mixture


def named(names, row_numbers=None):
    return [
        Dataset(
            name,
            tuple(
                example([5, 9, 11, *map(ord, name), *[k % 9 + 5] * (k % 3), k + 4])
                for k in range(24)
            ),
            row_numbers=row_numbers,
        )
        for name in names
    ]


def sketched(model, folder, rows, earlier=None, **options):
    options = {
        "proj_dim": 8192,
        "dtype": "fp32",
        "batch_size": 7,
        "examples": 20,
        "store": True,
        "store_dim": 4096,
        **options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    progress = Notes()
    config = SketchConfig(**options)
    sketch_mixture(
        str(model), "fingerprint", rows, 1, config, folder, progress, [earlier] if earlier else ()
    )
    return files_of(folder), progress.notes


def files_of(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("weight", ["tokens", "examples"])
def test_stored_rows_add_up_to_the_folded_sums(tiny_model, tmp_path, weight):
    sketched(tiny_model, tmp_path, named("ab"), weight=weight)
    rows = merit_fast.open_rows(tmp_path)
    assert rows.datasets == ["a", "b"] and len(rows) == 40 and rows.width == 4096
    for name in "ab":
        state = SketchState.read(tmp_path / f"{name}.safetensors")
        total = StoreIdentity.of(state.identity, 4096).fold(state.block_sums.sum(0)[None])[0]
        stored = rows.dataset(name)
        counts = (
            stored.num_target_tokens.double() if weight == "tokens" else torch.ones(20).double()
        )
        back = counts @ stored.vectors.take(np.arange(20)).double()
        assert float((back - total).norm() / total.norm()) < 5e-4
        assert float(counts.square() @ stored.square_norm) == pytest.approx(
            float(state.block_square_norms.sum()), rel=1e-12
        )
        assert int(stored.num_target_tokens.sum()) == state.num_target_tokens
        assert float(stored.loss_sum.sum()) == pytest.approx(state.loss_sum, rel=1e-12)


def test_a_row_is_the_sketch_of_that_row_alone(tiny_model, tmp_path):
    numbers = np.arange(24) * 3 + 1  # other rows of the file are held out
    sketched(tiny_model, tmp_path / "all", named("a", numbers))
    stored = merit_fast.open_rows(tmp_path / "all").dataset("a")
    assert set(stored.row.tolist()) <= set(numbers.tolist()) and stored.num_rows == 20
    for index in (0, 13, 19):
        k = (int(stored.row[index]) - 1) // 3
        one = named("a")[0].select([k, k])
        sketched(tiny_model, tmp_path / f"{k}", [one])
        own = merit_fast.open_rows(tmp_path / f"{k}").vectors("a").take(np.array([0]))[0]
        vector = stored.vectors.take(np.array([index]))[0]
        assert float((own - vector).norm() / own.norm()) < 1e-3


def test_the_store_changes_no_sum_and_all_takes_every_row(tiny_model, tmp_path):
    with_store, _ = sketched(tiny_model, tmp_path / "with", named("ab"), examples="all")
    without, _ = sketched(tiny_model, tmp_path / "without", named("ab"), examples=24, store=False)
    for name in ("a.safetensors", "b.safetensors"):
        assert with_store[name] == without[name]
    assert len(merit_fast.open_rows(tmp_path / "with")) == 48
    assert not [name for name in without if name.startswith("rows")]


def test_a_new_dataset_costs_itself_and_the_rows_of_the_others_stay(
    tiny_model, tmp_path, monkeypatch
):
    sketched(tiny_model, tmp_path / "first", named("abc"))
    whole, _ = sketched(tiny_model, tmp_path / "whole", named("dba"))
    done = []
    real = DatasetSketcher.sketch
    monkeypatch.setattr(
        DatasetSketcher, "sketch", lambda *given: done.append(given[1].name) or real(*given)
    )
    grown, notes = sketched(tiny_model, tmp_path / "grown", named("dba"), tmp_path / "first")
    assert done == ["d"] and grown == whole
    assert notes == ["sketch: 2 of 3 datasets are as before, their sketches are reused"]
    assert not any("/c/" in name for name in grown)

    monkeypatch.setattr(sketching, "load_model_for", None)  # nothing is left to sketch
    renamed = [Dataset(name, one.examples) for name, one in zip("ba", named("ab"), strict=True)]
    swapped, _ = sketched(tiny_model, tmp_path / "swapped", renamed, tmp_path / "first")
    shard = "00000.safetensors"
    assert swapped[f"rows/b/{shard}"] == whole[f"rows/a/{shard}"]
    assert swapped[f"rows/a/{shard}"] == whole[f"rows/b/{shard}"]


@pytest.mark.parametrize("damage", ["absent", "cut", "no index", "other width", "other numbers"])
def test_rows_that_are_not_as_they_must_be_are_sketched_again(tiny_model, tmp_path, damage):
    whole, _ = sketched(tiny_model, tmp_path / "whole", named("ab"))
    sketched(tiny_model, tmp_path / "first", named("ab"))
    folder = tmp_path / "first" / "rows" / "b"
    rows = named("ab")
    options = {}
    if damage == "absent":
        (folder / "00000.safetensors").unlink()
    elif damage == "cut":
        content = (folder / "00000.safetensors").read_bytes()
        (folder / "00000.safetensors").write_bytes(content[:-1])
    elif damage == "no index":
        (folder / "index.json").unlink()
    elif damage == "other width":
        options = {"store_dim": 8192}
    else:
        rows = named("ab", np.arange(24) + 5)
    again, notes = sketched(tiny_model, tmp_path / "again", rows, tmp_path / "first", **options)
    if damage in ("other width", "other numbers"):
        assert notes == []
        opened = merit_fast.open_rows(tmp_path / "again")
        assert opened.width == options.get("store_dim", 4096)
        assert damage == "other width" or min(opened.dataset("a").row.tolist()) >= 5
    else:
        assert again == whole
        assert notes == ["sketch: 1 of 2 datasets are as before, their sketches are reused"]


def test_a_store_that_is_asked_for_later_sketches_and_one_less_does_not(
    tiny_model, tmp_path, monkeypatch
):
    sketched(tiny_model, tmp_path / "none", named("ab"), store=False)
    stored, notes = sketched(tiny_model, tmp_path / "stored", named("ab"), tmp_path / "none")
    assert notes == [] and len(merit_fast.open_rows(tmp_path / "stored")) == 40
    monkeypatch.setattr(sketching, "load_model_for", None)
    off, notes = sketched(
        tiny_model, tmp_path / "off", named("ab"), tmp_path / "stored", store=False
    )
    assert notes == ["sketch: 2 of 2 datasets are as before, their sketches are reused"]
    assert off["a.safetensors"] == stored["a.safetensors"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"store_dim": 5000}, "store_dim: must be a multiple of 4096 from 4096 to 65536, got 5000"),
        ({"store_dim": 0}, "store_dim: must be a multiple"),
        ({"store_dim": 69632, "proj_dim": 131072}, "store_dim: must be a multiple"),
        ({"store": True, "proj_dim": 4096}, r"store_dim: must be at most proj_dim \(4096\)"),
        ({"examples": 1}, "examples: must be at least 2, or all"),
    ],
)
def test_options_of_a_store_have_rules(options, message):
    with pytest.raises(InputError, match=message):
        SketchConfig(**options)


def test_a_gradient_hashed_twice_keeps_the_cosines_of_the_datasets(tiny_model, tmp_path):
    """The folded rows stand for the gradients: their means have nearly the cosine of the sums."""
    options = {"examples": "all", "proj_dim": 65536, "store_dim": 32768, "weight": "examples"}
    sketched(tiny_model, tmp_path, named("ab"), **options)
    rows = merit_fast.open_rows(tmp_path)
    means = [rows.vectors(name).take(np.arange(24)).double().mean(0) for name in "ab"]
    sums = [SketchState.read(tmp_path / f"{name}.safetensors").block_sums.sum(0) for name in "ab"]
    folded = torch.nn.functional.cosine_similarity(*means, dim=0)
    exact = torch.nn.functional.cosine_similarity(*sums, dim=0)
    assert abs(float(folded - exact)) < 5 / 32768**0.5
