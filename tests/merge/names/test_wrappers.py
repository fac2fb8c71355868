"""Names that training loops' wrappers change, and weight files with unusual names."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.merge.headers import pack, tensor

from merit_fast.errors import InputError
from merit_fast.merge import merge_models


def write(path, tensors, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / name, metadata={"format": "pt"})
    return path


def layer(seed):
    generator = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    return {name: torch.randn(4, 3, generator=generator) for name in names}


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled twice": lambda name: f"_orig_mod._orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "compiled in data parallel": lambda name: f"module._orig_mod.{name}",
    "a compiled layer": lambda name: name.replace("layers.0", "layers.0._orig_mod"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(
        "layers.0", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_names_are_taken_away_and_said(kind, tmp_path):
    one, two = layer(0), layer(1)
    plain = write(tmp_path / "plain", one)
    wrapped = write(tmp_path / "wrapped", {WRAPPED[kind](name): t for name, t in two.items()})
    for paths in ([plain, wrapped], [wrapped, plain]):
        summary = merge_models(paths, out=tmp_path / "out")
        assert any("names are read without" in note for note in summary["notes"])
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert merged.keys() == one.keys()
        for name, values in merged.items():
            assert torch.equal(values, ((one[name].double() + two[name].double()) / 2).float())


def test_two_tensors_that_differ_in_wrappers_only_are_refused(tmp_path):
    tensors = {"w": torch.ones(2), "_orig_mod.w": torch.zeros(2)}
    with pytest.raises(InputError, match="without its wrappers, as .* is"):
        merge_models([write(tmp_path / "m", tensors)], out=tmp_path / "out")


def test_a_module_called_module_keeps_its_name(tmp_path):
    tensors = {"module.w": torch.ones(2), "head.w": torch.zeros(2)}
    merge_models([write(tmp_path / "m", tensors)], out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_a_bare_file_is_a_model_with_the_configs_next_to_it(tmp_path):
    one, two = layer(0), layer(1)
    folder = write(tmp_path / "m", one, "step-1.safetensors")
    write(folder, two, "step-2.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    paths = [folder / "step-1.safetensors", folder / "step-2.safetensors"]
    merge_models(paths, [0.25, 0.75], out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "step-1.safetensors")
    for name, values in merged.items():
        expected = 0.25 * one[name].double() + 0.75 * two[name].double()
        assert torch.equal(values, expected.float())
    assert (tmp_path / "out" / "config.json").exists()


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    tensors = layer(0)
    for number, (name, values) in enumerate(tensors.items(), 1):
        write(tmp_path / "m", {name: values}, f"model-{number:05d}-of-00002.safetensors")
    summary = merge_models([tmp_path / "m"], out=tmp_path / "out")
    assert any("has no index" in note for note in summary["notes"])
    merged = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    assert merged.keys() == tensors.keys()
    (tmp_path / "m" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="lacks model-00001-of-00002.safetensors"):
        merge_models([tmp_path / "m"], out=tmp_path / "again")


def test_one_variant_is_read_and_several_are_named(tmp_path):
    tensors = layer(0)
    model = write(tmp_path / "m", tensors, "model.bf16.safetensors")
    summary = merge_models([model], out=tmp_path / "out")
    assert any("variant bf16, model.bf16.safetensors" in note for note in summary["notes"])
    write(model, tensors, "model.fp16.safetensors")
    with pytest.raises(InputError, match="model.bf16.safetensors, model.fp16.safetensors"):
        merge_models([model], out=tmp_path / "again")
    merge_models([model / "model.fp16.safetensors"], out=tmp_path / "again")
    usual = write(model, layer(1))
    merge_models([usual], out=tmp_path / "usual")
    merged = load_file(tmp_path / "usual" / "model.safetensors")
    assert all(torch.equal(merged[name], values) for name, values in layer(1).items())


@pytest.mark.parametrize(
    "names,message",
    [
        (["a.safetensors", "b.safetensors"], "but a.safetensors, b.safetensors: name the file"),
        (
            ["a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"],
            "several models without an index, from a-00001",
        ),
        (["optimizer.safetensors"], "holds neither"),
    ],
)
def test_files_of_which_none_is_clearly_the_model_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes(pack({name: tensor([2], 0, 8)}, bytes(8)))
    with pytest.raises(InputError, match=message):
        merge_models([tmp_path / "m"], out=tmp_path / "out")
