"""Loading a merge writes nothing, and names every error."""

import json
import shutil

import fsspec
import pytest
import torch
from support.merge.loaded import SOME, assert_same_model, change_config, copied

from merit_fast.errors import InputError, MeritFastError
from merit_fast.merge import load_merged
from merit_fast.merge.engine import opened as files
from merit_fast.merge.in_memory.loading import checked_device


def test_nothing_is_written_beside_the_models(branches, tmp_path, monkeypatch):
    root = tmp_path / "models"
    for k in range(2):
        shutil.copytree(branches[k], root / f"b{k}")
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    load_merged([root / "b0", str(root / "b1")], [0.5, 0.5])
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before


def test_generation_options_come_along(pair, tmp_path):
    model = shutil.copytree(pair[0], tmp_path / "a")
    (model / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "do_sample": True})
    )
    assert load_merged([model, pair[1]], "uniform").generation_config.temperature == 0.25


def test_models_are_loaded_from_a_store(branches):
    store = fsspec.filesystem("memory")
    for model in branches[:2]:
        store.put(str(model), f"/store/{model.name}", recursive=True)
    loaded = load_merged(
        ["memory://store/b0", "memory://store/b1"],
        [3, 1],
        method="ties",
        density=0.4,
        base=branches[3],
    )
    assert_same_model(
        loaded, load_merged(branches[:2], [3, 1], method="ties", density=0.4, base=branches[3])
    )


def test_threads_and_chunks_leave_no_trace(branches):
    for options in SOME:
        base = branches[3]
        expected = load_merged(branches[:2], "uniform", base=base, threads=1, **options)
        loaded = load_merged(branches[:2], "uniform", base=base, threads=3, chunk_kib=4, **options)
        assert_same_model(loaded, expected)


def test_a_class_that_needs_other_tensors_is_named(pair, tmp_path):
    models = [tmp_path / "a", tmp_path / "b"]
    for model, source in zip(models, pair, strict=True):
        copied(source, model, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(
        InputError, match=r"a: model.norm.weight: is missing, LlamaForCausalLM needs it$"
    ):
        load_merged(models, [0.5, 0.5])
    for model, source in zip(models, pair, strict=True):
        shutil.rmtree(model)
        copied(source, model, lambda tensors: tensors.update(extra=torch.ones(3)))
    with pytest.raises(InputError, match=r"a: extra: is not in LlamaForCausalLM$"):
        load_merged(models, [0.5, 0.5])


def test_a_config_of_another_shape_or_class_is_named(pair, tmp_path):
    models = [tmp_path / "a", tmp_path / "b"]
    for model, source in zip(models, pair, strict=True):
        shutil.copytree(source, model)
        change_config(model, intermediate_size=99)
    with pytest.raises(
        InputError, match=r"mlp.down_proj.weight: shape must be \[72, 99\] by config.json, got"
    ):
        load_merged(models, [0.5, 0.5])
    change_config(models[0], architectures=["Nothing"])
    with pytest.raises(
        InputError,
        match="config.json: architectures: must name a model of transformers, got Nothing",
    ):
        load_merged(models, [0.5, 0.5])
    (models[0] / "config.json").unlink()
    with pytest.raises(InputError, match="has no config that transformers can read"):
        load_merged(models, [0.5, 0.5])


def test_models_that_disagree_are_refused_before_anything_is_read(pair, tmp_path):
    short = copied(pair[1], tmp_path / "short", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match="lm_head.weight: is missing"):
        load_merged([pair[0], short], [0.5, 0.5])
    with pytest.raises(InputError, match="needs a base"):
        load_merged(pair, [0.5, 0.5], scale=2.0)
    with pytest.raises(InputError, match="is not a directory"):
        load_merged([pair[0], tmp_path / "none"], [0.5, 0.5])


def test_a_value_that_is_not_finite_is_named_and_can_be_allowed(pair, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"][5] = float("nan")

    bad = copied(pair[1], tmp_path / "bad", spoil)
    with pytest.raises(
        InputError, match=r"bad/model.safetensors: model.norm.weight: must be finite, holds NaN"
    ):
        load_merged([pair[0], bad], [0.5, 0.5])
    loaded = load_merged([pair[0], bad], [0.5, 0.5], allow_nonfinite=True)
    assert loaded.model.norm.weight.isnan().nonzero().tolist() == [[5]]
    with pytest.raises(InputError, match="the result overflows F16"):
        load_merged(pair, [1e6, 1e6], dtype="fp16", normalize=False)


def test_a_read_that_fails_is_named_by_its_file(pair, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setenv("MERIT_FAST_BACKEND", "eager")
    monkeypatch.setattr(files.os, "pread", broken)
    with pytest.raises(MeritFastError, match=r"m0/model.safetensors: \S+: Input/output error$"):
        load_merged(pair, [0.5, 0.5])


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="device: .*nowhere"):
        checked_device("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match="device: must be there, got 'cuda' where torch finds no GPU"
        ):
            checked_device("cuda")
