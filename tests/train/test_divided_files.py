"""Files of divided models: their bytes, their rows, and starts that are refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import make_model
from support.training import CONFIG
from support.vision.models import make_vision_model

from merit_fast.errors import InputError
from merit_fast.model import load_model
from merit_fast.train import TrainConfig
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.parallel.files import fill_tensor, write_tensors
from merit_fast.train.parallel.load import make_hollow_model
from merit_fast.train.parallel.pieces import rows_of
from merit_fast.train.parallel.ranks import ONE_PROCESS
from merit_fast.train.parallel.stored import stored_runs

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def test_files_have_the_bytes_of_safetensors(tmp_path):
    tensors = {f"é.{dtype}": (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"b": torch.ones(2, 2).T, "a": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    metadata = {"run": '{"x": "é"}'}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata)
    write_tensors(tmp_path / "ours", tensors, metadata, ONE_PROCESS)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 9])
def test_rows_are_dealt_as_torch_chunks_them(rows):
    for size in (1, 2, 3, 4):
        chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(size)]
        dealt = [rows_of(rows, rank, size) for rank in range(size)]
        own = [list(range(first, first + count)) for first, count in dealt]
        assert [part for part in own if part] == [chunk for chunk in chunks if chunk]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3), r"a: must be \[2, 3\] of F32, got \[3, 2\] of F32"),
        (torch.zeros(3, 2, dtype=torch.int8), r"a: must be \[3, 2\] of I8, got \[3, 2\] of F32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensor, message):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 2)}, path)
    with safe_open(path, framework="pt") as file:
        with pytest.raises(InputError, match=message):
            fill_tensor(file, "a", tensor, ONE_PROCESS, path)
        with pytest.raises(InputError, match="x.safetensors: b: is not there"):
            fill_tensor(file, "b", torch.zeros(3, 2), ONE_PROCESS, path)


@pytest.fixture
def base(tmp_path) -> Path:
    make_model(tmp_path / "base", shard="1GB")
    return tmp_path / "base"


def change_config(base: Path, **values: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_hollow_model_has_the_names_and_buffers_of_the_loaded_one(base):
    hollow = make_hollow_model(str(base), "fp32")
    loaded = load_model(str(base), "fp32")
    assert all(parameter.is_meta for parameter in hollow.parameters())
    shapes = {name: p.shape for name, p in loaded.named_parameters()}
    assert {name: p.shape for name, p in hollow.named_parameters()} == shapes
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in hollow.named_buffers():
        assert torch.equal(buffer, buffers.pop(name)), name
    assert not buffers
    assert hollow.get_output_embeddings().weight is hollow.get_input_embeddings().weight


def test_starts_whose_tensors_have_other_names_are_refused(base):
    file = base / "model.safetensors"
    tensors = load_file(file)
    first = "model.layers.0.mlp.up_proj.weight"
    others = {f"old.{name}" if name == first else name: t for name, t in tensors.items()}
    save_file(others, file)
    with pytest.raises(InputError, match=f"have no {first}"):
        make_hollow_model(str(base), "fp32")
    save_file({**tensors, "surplus": torch.ones(1)}, file)
    with pytest.raises(InputError, match="no weight of this model reads surplus"):
        make_hollow_model(str(base), "fp32")


def test_a_conversion_that_changes_the_order_of_numbers_is_refused(base):
    from transformers.core_model_loading import Transpose, WeightConverter

    model = make_hollow_model(str(base), "fp32")
    name = "mlp.up_proj.weight"
    model._weight_conversions = [WeightConverter(name, name, operations=[Transpose(0, 1)])]
    with pytest.raises(InputError, match="changes the order of numbers of .*mlp.up_proj.weight"):
        stored_runs(model, dict(model.named_parameters()))


def test_quantised_starts_are_refused(base):
    change_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(InputError, match="train.shard: must be none for quantised weights"):
        make_hollow_model(str(base), "fp32")


def test_starts_that_read_images_or_are_adapters_are_refused(tmp_path):
    make_vision_model(tmp_path / "images", "qwen3_vl")
    with pytest.raises(InputError, match="must be none for a model that reads images"):
        make_hollow_model(str(tmp_path / "images"), "fp32")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="must be none for a start that is an adapter"):
        make_hollow_model(str(tmp_path / "adapter"), "fp32")


LORA = AdapterConfig(kind="lora")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": replace(LORA, kind="dora")}, "adapter.kind: must be absent with shard full"),
        ({"adapter": replace(LORA, base="4bit")}, "adapter.base: must be absent with shard full"),
        ({"adapter": replace(LORA, save="merged")}, "adapter.save: must be absent with shard"),
        ({"adapter": replace(LORA, modules_to_save=("lm_head",))}, "adapter.modules_to_save"),
        (
            {"adapter": LORA, "update_in_backward": "previous"},
            "update_in_backward: must be absent with shard full and an adapter",
        ),
    ],
)
def test_options_that_cannot_be_combined_are_refused_first(changes, message):
    with pytest.raises(InputError, match=message):
        replace(CONFIG, shard="full", **changes)


def test_a_divided_branch_is_the_branch_of_whole_models():
    """``shard`` changes no number, so that a run resumes with another value of it."""
    from merit_fast.pipeline.arms import branch_recipe, warmup_branch

    branch = warmup_branch({"a": "content"})
    recipes = [branch_recipe(branch, TrainConfig(shard=shard)) for shard in ("none", "full")]
    assert recipes[0] == recipes[1]
