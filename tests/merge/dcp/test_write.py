"""Merges into distributed checkpoints, loaded by torch's own ranks with another sharding."""

import json
import pickle
import zipfile
from io import BytesIO

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.merge.dcp.checks import assert_same, expected_grid, run_ranks
from support.merge.dcp.tensors import SEEDS

from merit_fast.errors import InputError
from merit_fast.merge import merge_models


def grids(saved):
    return [saved / f"grid-{name}" for name in SEEDS]


def checkpoints(saved):
    return [saved / f"checkpoint-{name}" for name in SEEDS]


@pytest.fixture(scope="module")
def merged(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "grid"
    merge_models(grids(saved), out=out, subtree="model", form="distcp")
    return out


@pytest.mark.process
def test_any_number_of_ranks_loads_the_output(merged, tmp_path):
    run_ranks("load", merged, "1,2,4", tmp_path)
    for count in (1, 2, 4):
        assert_same(load_file(tmp_path / f"{count}.safetensors"), expected_grid())


def test_the_output_has_the_first_model_shards(saved, merged):
    names = sorted(file.name for file in grids(saved)[0].iterdir())
    assert sorted(file.name for file in merged.iterdir()) == sorted(
        [*names, "README.md", "stage.json"]
    )
    theirs, mine = (
        pickle.loads((folder / ".metadata").read_bytes()) for folder in (grids(saved)[0], merged)
    )
    for name, entry in mine.state_dict_metadata.items():
        other = theirs.state_dict_metadata[name]
        assert entry.properties == other.properties and entry.size == other.size
        assert {(c.offsets, c.sizes) for c in entry.chunks} == {
            (c.offsets, c.sizes) for c in other.chunks
        }
    files = {index: info.relative_path for index, info in mine.storage_data.items()}
    assert files == {index: theirs.storage_data[index].relative_path for index in files}
    assert set(mine.planner_data) == {name for name in theirs.planner_data if "model." in name}


def test_every_item_is_a_sound_file_of_torch_save(merged):
    metadata = pickle.loads((merged / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        data = (merged / info.relative_path).read_bytes()
        item = data[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(BytesIO(item)).testzip() is None  # its checksums hold
        torch.load(BytesIO(item), weights_only=True)


@pytest.mark.parametrize(
    "method", [{"method": "ties", "density": 0.3}, {"method": "slerp", "t": 0.4}]
)
def test_methods_on_whole_tensors_give_what_whole_models_give(saved, tmp_path, method, backend):
    models = [saved / f"model-{name}" for name in SEEDS]
    if method["method"] == "ties":
        method = {**method, "base": models[0]}
    merge_models(models, out=tmp_path / "whole", **method)
    merge_models(checkpoints(saved), out=tmp_path / "out", form="distcp", **method)
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state["model"], wanted)
    assert not (tmp_path / "out" / "whole").exists()


def test_safetensors_become_a_distributed_checkpoint(saved, tmp_path):
    models = [saved / f"model-{name}" for name in SEEDS]
    merge_models(models, out=tmp_path / "whole")
    merge_models(models, out=tmp_path / "out", form="distcp")
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    state = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state, wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_of_the_model_that_are_no_tensors_come_along(tmp_path):
    """Megatron keeps _extra_state as bytes, and other fields in .metadata."""
    extra = ("scale", 1.5)
    for seed in range(2):
        folder = tmp_path / f"in{seed}"
        weight = torch.full((3, 2), float(seed))
        dcp.save({"a.weight": weight, "a._extra_state": extra}, checkpoint_id=folder, no_dist=True)
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        metadata.mcore_data = {"a.weight": {"nd_reformulated_orig_global_shape": (3, 2)}}
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (folder / "common.pt").write_bytes(b"arguments")
    out = tmp_path / "out"
    merge_models([tmp_path / "in0", tmp_path / "in1"], out=out, form="distcp")
    state = {"a.weight": torch.zeros(3, 2), "a._extra_state": None}
    dcp.load(state, checkpoint_id=out, no_dist=True)
    assert state["a._extra_state"] == extra and torch.equal(
        state["a.weight"], torch.full((3, 2), 0.5)
    )
    assert pickle.loads((out / ".metadata").read_bytes()).mcore_data == metadata.mcore_data
    assert (out / "common.pt").read_bytes() == b"arguments"


def test_the_dtype_is_written_as_asked(saved, tmp_path):
    merge_models(checkpoints(saved), out=tmp_path / "out", form="distcp", dtype="fp32")
    merge_models([saved / f"model-{n}" for n in SEEDS], out=tmp_path / "whole", dtype="fp32")
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state["model"], wanted)


@pytest.mark.parametrize("options", [{"shard_size": "1M"}, {"checksum": True}, {"stats": True}])
def test_options_of_safetensors_are_refused(saved, tmp_path, options):
    with pytest.raises(InputError, match="must be absent with form distcp"):
        merge_models(checkpoints(saved), out=tmp_path / "out", form="distcp", **options)
    assert not (tmp_path / "out").exists()
