"""Files that are read or refused: links, pipes, odd names, pickles."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.merge.checkpoints import assert_refused
from support.merge.headers import INDEX, one_tensor, pack, tensor, write_model
from support.merge.merges import load
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import read_checkpoint


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    for name, make in (
        ("pipe", os.mkfifo),
        ("folder", os.mkdir),
        ("zero", lambda p: os.symlink("/dev/zero", p)),
    ):
        for kind in ("model.safetensors", INDEX):
            model = write_model(tmp_path / f"{name} {kind}", {})
            make(model / kind)
            assert_refused(model, f"{kind}: must be a regular file")
    loop = write_model(tmp_path / "loop", {})
    (loop / "model.safetensors").symlink_to("model.safetensors")
    assert_refused(loop, "cannot be read: Too many levels of symbolic links")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs = write_model(tmp_path / "blobs", {"1f": one_tensor("v"), "2e": one_tensor("w")})
    model = write_model(
        tmp_path / "snapshots" / "main", {}, {"v": "a.safetensors", "w": "b.safetensors"}
    )
    for name, blob in (("a.safetensors", "1f"), ("b.safetensors", "2e")):
        (model / name).symlink_to(os.path.relpath(blobs / blob, model))
    assert [file for file, _ in read_checkpoint(model).shards] == ["a.safetensors", "b.safetensors"]


def test_what_may_not_be_read_is_named(tmp_path):
    model = write_model(tmp_path / "model", {"model.safetensors": one_tensor()})
    closed = write_model(tmp_path / "closed", {"model.safetensors": one_tensor()})
    script = (
        "import os, sys; from pathlib import Path; from merit_fast.merge.read.checkpoint import "
        "read_checkpoint\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)  # root may "
        "read all\n"
        "read_checkpoint(Path(sys.argv[1]))"
    )
    (model / "model.safetensors").chmod(0)
    closed.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if (
            os.access(folder, os.W_OK)
            and folder.stat().st_uid == os.getuid()
            and folder != Path("/")
        ):
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's folders are private
    for directory, name in ((model, "model.safetensors"), (closed, "closed")):
        result = subprocess.run(
            [sys.executable, "-c", script, str(directory)], capture_output=True, text=True
        )
        assert f"InputError: {tmp_path}" in result.stderr, result.stderr
        assert f"{name}: cannot be read: Permission denied" in result.stderr
    closed.chmod(0o700)


def test_empty_and_scalar_tensors_and_odd_names_are_read(tmp_path):
    header = {
        "empty first": tensor([0, 4], 0, 0),
        "scalar": tensor([], 0, 4),
        "empty between": tensor([2**40, 0], 4, 4),
        "größe.重み": tensor([1], 4, 8),
        "empty last": tensor([0], 8, 8),
        "__metadata__": {"format": "pt"},
    }
    model = write_model(tmp_path / "model", {"model.safetensors": pack(header, bytes(8))})
    tensors = read_checkpoint(model).tensors
    assert {name: entry.num_elements for name, entry in tensors.items()} == {
        "empty first": 0,
        "scalar": 1,
        "empty between": 0,
        "größe.重み": 1,
        "empty last": 0,
    }
    with safe_open(model / "model.safetensors", framework="np") as reference:
        assert set(reference.keys()) == set(tensors)


# ---- weights in another form
def run_conversion(message):
    """Runs the command that an error message gives."""
    command = shlex.split(message.split("convert it: ")[1])
    result = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    directory = tmp_path / "it's a model"
    model = make_model(directory, dtype=torch.bfloat16)
    for file in directory.glob("model*"):
        file.unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    (directory / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(
        InputError, match="pytorch_model.bin is a pickle file, .* convert it: python -c "
    ) as error:
        read_checkpoint(directory)
    run_conversion(str(error.value))
    converted = load(directory)
    assert read_checkpoint(directory).tensors.keys() == converted.keys()
    assert all(torch.equal(converted[name], model.state_dict()[name]) for name in converted)


def test_other_forms_of_weights_are_named(tmp_path):
    cases = [
        ({}, "holds neither model.safetensors.index.json nor model.safetensors$"),
        (
            {"model-00001-of-00002.safetensors": one_tensor()},
            "lacks model-00002-of-00002.safetensors, and has no index",
        ),
        ({"adapter_model.safetensors": one_tensor()}, "it is an adapter, which needs a base model"),
        ({"weights.pth": b"x"}, "weights.pth is a pickle file, .*only safetensors are read"),
        ({"a\nb.bin": b"x"}, r"a\\nb.bin is a pickle file"),
    ]
    for number, (files, message) in enumerate(cases):
        assert_refused(write_model(tmp_path / str(number), files), message)
