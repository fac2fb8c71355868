"""Verification fails on what it cannot prove: nothing that is absent counts as permission."""

import json
import re

import pytest
import torch
from support.merge.merges import write

from merit_fast.cli.verify import verify_command
from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.merge.write.verified import verify_checksums

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def out(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {f"w{i}": torch.randn(40, 50) for i in range(2)})
    models = [tmp_path / "a", tmp_path / "b"]
    merge_models(models, [1, 1], out=tmp_path / "out", shard_size="9K", checksum=True)
    assert len(verify_checksums(tmp_path / "out")) == 2
    return tmp_path / "out"


def edit(out, change):
    values = json.loads((out / INDEX).read_text())
    change(values)
    (out / INDEX).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda v: v["metadata"]["xxh3_128"].clear(), "xxh3_128: must be a mapping with at least"),
        (lambda v: v["metadata"].update(xxh3_128=[]), "xxh3_128: must be a mapping with at least"),
        (lambda v: v["metadata"].pop("xxh3_128"), "xxh3_128: is absent; merge with --checksum"),
        (lambda v: v["metadata"]["xxh3_128"].pop(FIRST), f"lacks {FIRST}: the index names it"),
        (lambda v: v["weight_map"].clear(), "weight_map: must be a mapping with at least one"),
        (
            lambda v: v["metadata"]["xxh3_128"].update({"../a/model.safetensors": "0" * 32}),
            "must name .safetensors files of this directory, found '../a/model.safetensors'",
        ),
        (
            lambda v: v["weight_map"].update(w0="/etc/x.safetensors"),
            "weight_map: must name .safetensors files of this directory",
        ),
        (
            lambda v: v["metadata"]["xxh3_128"].update({FIRST: ""}),
            "must be 32 hex digits",
        ),
        (lambda v: v["metadata"]["xxh3_128"].update({FIRST: None}), "must be 32 hex digits"),
        (
            lambda v: v["metadata"]["xxh3_128"].update({"x.safetensors": "0" * 32}),
            "weight_map: lacks x.safetensors, which has a checksum",
        ),
    ],
)
def test_an_index_that_proves_too_little_is_an_error(out, change, message):
    edit(out, change)
    with pytest.raises(InputError, match=re.escape(message)):
        verify_checksums(out)


def test_a_weight_file_without_a_checksum_is_an_error(out):
    (out / "extra.safetensors").write_bytes((out / FIRST).read_bytes())
    with pytest.raises(InputError, match="lacks extra.safetensors: it lies next to the index"):
        verify_checksums(out)


def test_a_link_out_of_the_directory_is_an_error(out):
    (out / FIRST).rename(out.parent / "moved")
    (out / FIRST).symlink_to(out.parent / "moved")
    with pytest.raises(InputError, match=f"{FIRST}: must be a file of this directory"):
        verify_checksums(out)


def test_an_index_that_is_no_json_is_an_error(out):
    (out / INDEX).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not readable JSON"):
        verify_checksums(out)


def test_a_run_without_outputs_proves_nothing(tmp_path):
    ledger = {"split": "", "branches": {}, "command": "x {stage}", "outputs": {}, "old": {}}
    (tmp_path / "run.json").write_text(json.dumps({**ledger, "inputs": {}, "schema_version": 3}))
    with pytest.raises(InputError, match="outputs: names no output that is there"):
        verify_command(str(tmp_path), as_json=False)
