"""Distributed outputs beyond one merge: resumed, changed, of mixed inputs, and very large."""

import io
import struct

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.merge.dcp.checks import assert_same

from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.merge.read.dcp.items import read_item
from merit_fast.merge.read.dcp.metadata import Item
from merit_fast.merge.write.distcp.items import item_form


def save(folder, **state):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder, state):
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_the_same_merge_is_not_done_again_and_a_changed_input_is_seen(tmp_path):
    models = [save(tmp_path / f"in{k}", a=torch.full((4, 3), float(k))) for k in range(2)]
    out = tmp_path / "out"
    merge_models(models, out=out, form="distcp")
    first = (out / "__0_0.distcp").stat().st_mtime_ns
    merge_models(models, out=out, form="distcp")
    assert (out / "__0_0.distcp").stat().st_mtime_ns == first
    shard = models[1] / "__0_0.distcp"
    data = shard.read_bytes()
    ones = torch.ones(4, 3).numpy().tobytes()
    assert data.count(ones) == 1
    shard.write_bytes(data.replace(ones, torch.full((4, 3), 5.0).numpy().tobytes()))
    merge_models(models, out=out, form="distcp")
    assert torch.equal(load(out, {"a": torch.zeros(4, 3)})["a"], torch.full((4, 3), 2.5))


def test_files_that_a_stopped_merge_left_are_kept_only_if_sound(tmp_path, monkeypatch):
    tensors = {f"t{number}": torch.ones(3, 2) * number for number in range(3)}
    model = save(tmp_path / "in", **tensors)
    merge_models([model], out=tmp_path / "whole", form="distcp")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("merit_fast.merge.write.distcp.finish.finish_distributed", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_models([model], out=tmp_path / "out", form="distcp")
    (left,) = tmp_path.glob("out.tmp/__0_0.distcp")
    data = bytearray(left.read_bytes())
    data[200] ^= 1
    left.write_bytes(data)
    merge_models([model], out=tmp_path / "out", form="distcp")
    shards = [tmp_path / name / "__0_0.distcp" for name in ("whole", "out")]
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_safetensors_and_chunks_mix_in_the_first_model_form(saved, tmp_path):
    """The second model lies in other chunks than the first, or in none."""
    whole = saved / "model-1"
    chunked = saved / "checkpoint-2"
    merge_models([whole, saved / "model-2"], [0.25, 0.75], out=tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    for name, paths, weights in (
        ("first", [chunked, whole], [0.75, 0.25]),
        ("second", [whole, chunked], [0.25, 0.75]),
    ):
        merge_models(paths, weights, out=tmp_path / name, form="distcp")
        flat = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
        load(tmp_path / name, {"model": flat} if name == "first" else flat)
        assert_same(flat, wanted)


def test_wrappers_in_names_stay_in_the_output(tmp_path):
    models = [
        save(tmp_path / f"in{k}", **{"_orig_mod.a.weight": torch.full((2, 2), float(k))})
        for k in range(2)
    ]
    merge_models(models, out=tmp_path / "out", form="distcp")
    state = load(tmp_path / "out", {"_orig_mod.a.weight": torch.zeros(2, 2)})
    assert torch.equal(state["_orig_mod.a.weight"], torch.full((2, 2), 0.5))


def test_an_object_store_takes_no_distributed_checkpoint(tmp_path):
    pytest.importorskip("fsspec")
    model = save(tmp_path / "in", a=torch.ones(2, 2))
    with pytest.raises(InputError, match="can be written to a local disk only"):
        merge_models([model], out="memory://bucket/out", form="distcp")


def test_an_item_above_4_gib_is_a_zip_of_64_bits(tmp_path):
    """torch reads it; the tensor's bytes are a hole in a sparse file."""
    count = (1 << 32) + 64
    form = item_form("U8", (count,), count)
    file = tmp_path / "large.pt"
    with file.open("wb") as opened:
        opened.write(form.head)
        opened.seek(count - 3, io.SEEK_CUR)
        opened.write(b"abc" + form.tail)
    with file.open("rb") as opened:
        item = Item(file.name, 0, file.stat().st_size)
        stored = read_item(opened, file, "t", item, file.stat().st_size)
    assert stored.offset == form.start and stored.view.sizes == (count,)
    tensor = torch.load(file, mmap=True, weights_only=True)
    assert tensor.shape == (count,) and bytes(tensor[-3:].tolist()) == b"abc"
    at, other = form.crc_places
    assert struct.unpack_from("<I", form.head, at) == (0,) and other > count


def test_a_directory_of_single_numbers_is_no_model(tmp_path):
    folder = save(tmp_path / "in", model={"a": torch.ones(2, 2)}, loss=torch.ones(()))
    merge_models([folder], out=tmp_path / "out", form="distcp")
    state = load(tmp_path / "out", {"model": {"a": torch.zeros(2, 2)}})
    assert torch.equal(state["model"]["a"], torch.ones(2, 2))


def test_a_base_of_safetensors_with_other_tensors_is_noticed(tmp_path):
    folder = save(tmp_path / "in", a=torch.ones(2, 2))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"b": torch.ones(2, 2)}, base / "model.safetensors")
    options = {"base": base, "form": "distcp", "method": "ties", "density": 0.5}
    with pytest.raises(InputError):
        merge_models([folder], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
