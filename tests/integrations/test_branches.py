"""Models of another training stack become branches that merges weigh by their tokens."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merit_fast import merge_models
from merit_fast.errors import InputError
from merit_fast.integrations.branches import write_branch


def write_model(folder, value):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
    return folder


def test_a_merge_weighs_branches_by_their_tokens(tmp_path):
    start = write_model(tmp_path / "start", 0.0)
    first = write_model(tmp_path / "first", 4.0)
    second = write_model(tmp_path / "second", 8.0)
    manifest = write_branch(first, 300, start=start, datasets=["a", "b"], steps=7)
    assert manifest.branch == "first" and manifest.datasets == ("a", "b") and manifest.steps == 7
    write_branch(second, 50, start=start)
    write_branch(second, 100, start=start)  # replaces the first one
    merge_models([first, second], "tokens", out=tmp_path / "merged")
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    assert load_file(file)["weight"].tolist() == [5.0] * 4
    with pytest.raises(InputError, match="samples must be positive"):
        merge_models([first, second], "samples", out=tmp_path / "by_samples")


def test_branches_of_different_starts_do_not_merge_by_tokens(tmp_path):
    models = [write_model(tmp_path / name, value) for value, name in enumerate("abcd", 1)]
    write_branch(models[0], 1, start=models[2])
    write_branch(models[1], 1, start=models[3])
    with pytest.raises(InputError, match="start_fingerprint: must be"):
        merge_models(models[:2], "tokens", out=tmp_path / "merged")


def test_what_is_no_branch_is_refused(tmp_path):
    model = write_model(tmp_path / "model", 1.0)
    with pytest.raises(InputError, match=r"is not a model's directory: it has no config\.json"):
        write_branch(tmp_path, 10, start=model)
    with pytest.raises(InputError, match="num_target_tokens: must be at least 1, got 0"):
        write_branch(model, 0, start=model)
    with pytest.raises(InputError, match="num_examples and steps: must be at least 0, got -1"):
        write_branch(model, 1, start=model, num_examples=-1)
    with pytest.raises(InputError, match="nowhere"):
        write_branch(model, 1, start=tmp_path / "nowhere")
    assert not (model / "branch.json").exists()
