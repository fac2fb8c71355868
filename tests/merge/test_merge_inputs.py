"""Inputs that a merge takes and refuses: weights, files, models, failing disks."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.merge.merges import WEIGHTS, load, merge
from support.tiny import make_model

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels import dispatch
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.kept import write_record
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge import MergeConfig, merge_branches, merge_models, resolve_weights
from merit_fast.merge.parameters import ModelSettings
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.progress import SilentProgress


# ---- weights
def branch_manifest(directory, tokens, examples=1, base="x"):
    directory.mkdir(exist_ok=True)
    manifest = BranchManifest("merit-0", "merit", 0, ("a",), examples, tokens, 10, 1, 0, "x", base)
    write_manifest(manifest, directory / "branch.json")
    return directory


def test_weights_from_branch_manifests(tmp_path):
    models = [branch_manifest(tmp_path / "a", 30, 1), branch_manifest(tmp_path / "b", 10, 3)]
    assert resolve_weights(models, MergeConfig()) == [0.75, 0.25]
    assert resolve_weights(models, MergeConfig(weights="samples")) == [0.25, 0.75]
    assert resolve_weights(models, MergeConfig(weights="uniform")) == [0.5, 0.5]
    assert resolve_weights(models, MergeConfig(weights=(1.0, 3.0))) == [0.25, 0.75]


def test_default_weights_are_equal_without_branch_manifests_and_refused_with_some(tmp_path):
    with_counts = branch_manifest(tmp_path / "a", 30)
    plain = [tmp_path / "b", tmp_path / "c"]
    assert resolve_weights(plain, MergeConfig()) == [0.5, 0.5]
    rule = "b, .*c: no branch.json with token counts here, but .*a has one; give merge.weights"
    with pytest.raises(InputError, match=rule):
        resolve_weights([plain[0], with_counts, plain[1]], MergeConfig())
    settings = (ModelSettings(weight=1.0), ModelSettings(weight=3.0))
    resolve_weights([plain[0], with_counts], MergeConfig(models=settings))  # they weigh themselves


def test_weights_that_cannot_be_had(tmp_path):
    a, b = branch_manifest(tmp_path / "a", 30), branch_manifest(tmp_path / "b", 10, base="y")
    with pytest.raises(InputError, match="b/branch.json: start_fingerprint: must be x"):
        resolve_weights([a, b], MergeConfig())
    with pytest.raises(InputError, match="has no branch.json .*; give merge.weights as uniform"):
        resolve_weights([a, tmp_path], MergeConfig(weights="tokens"))
    with pytest.raises(InputError, match="must list 2 numbers, got 3"):
        resolve_weights([a, b], MergeConfig(weights=(1.0, 1.0, 1.0)))
    with pytest.raises(InputError, match="tokens must be positive"):
        resolve_weights([branch_manifest(tmp_path / "c", 0)], MergeConfig())
    for weights in ((), (1.0, -1.0), (float("inf"), 1.0)):
        with pytest.raises(InputError, match="weights"):
            MergeConfig(weights=weights)


# ---- models that do not fit
@pytest.mark.parametrize(
    "changes,dtype,of_configs,of_tensors",
    [
        (
            {"vocab_size": 408},
            torch.bfloat16,
            "holds no tokenizer.json that lists tokens.*; tokenizer=ids matches rows by their ids",
            "holds no tokenizer.json that lists tokens.*; tokenizer=ids matches rows by their ids",
        ),
        ({}, torch.float32, "dtype must be BF16 .* got F32", "dtype must be BF16 .* got F32"),
        (
            {"num_hidden_layers": 1},
            torch.bfloat16,
            "num_hidden_layers: must be 2 .* got 1",
            "is missing",
        ),
        (
            {"num_hidden_layers": 3},
            torch.bfloat16,
            "num_hidden_layers: must be 2 .* got 3",
            "layers.2.* is not in",
        ),
    ],
    ids=["vocabulary", "dtype", "missing", "extra"],
)
def test_models_that_do_not_fit_are_named(
    branches, tmp_path, changes, dtype, of_configs, of_tensors
):
    make_model(tmp_path / "other", dtype=dtype, **changes)
    for message in (of_configs, of_tensors):
        models = [branches[0], tmp_path / "other"]
        with pytest.raises(InputError, match=message):
            merge_models(models, [0.5, 0.5], out=tmp_path / "out")
        with pytest.raises(InputError):
            merge_models(models[::-1], [0.5, 0.5], out=tmp_path / "out")
        (tmp_path / "other" / "config.json").unlink(missing_ok=True)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def two_files(tmp_path, first, second):
    for name, tensors in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_stop_the_merge_unless_allowed(tmp_path, value, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    bad = torch.zeros(3000)
    bad[2500] = value
    models = two_files(
        tmp_path, {"v": torch.ones(5), "w": torch.zeros(3000)}, {"v": torch.ones(5), "w": bad}
    )
    with pytest.raises(InputError, match=r"b/model.safetensors: w: must be finite"):
        merge(models, [0.5, 0.5], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    merge(models, [0.5, 0.5], tmp_path / "allowed", MergeConfig(allow_nonfinite=True))
    merged = load(tmp_path / "allowed")["w"][2500]
    assert torch.isnan(merged) if value != value else torch.isinf(merged)


def test_integer_tensors_that_differ_are_named(tmp_path):
    models = two_files(tmp_path, {"ids": torch.arange(4)}, {"ids": torch.arange(4) + 1})
    with pytest.raises(
        InputError, match="b/model.safetensors: ids: a I64 tensor cannot be averaged"
    ):
        merge(models, [0.5, 0.5], tmp_path / "out")


def test_a_full_disk_is_said_before_any_work(branches, tmp_path, monkeypatch):
    statvfs = os.statvfs

    def nearly_full(path):
        """The file system of a path, with ten free bytes."""
        fields = list(statvfs(path))
        fields[1] = 1  # bytes of a block
        fields[4] = 10  # free blocks
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(InputError, match="the disk has 10"):
        merge(branches, WEIGHTS, tmp_path / "out")


def test_a_write_that_fails_leaves_no_shard(branches, tmp_path):
    script = (
        "import resource, sys; from pathlib import Path; from merit_fast.merge import *;"
        "from merit_fast.progress import SilentProgress; import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); out = Path(sys.argv[1]); "
        "out.mkdir();"
        "merge_branches([Path(p) for p in sys.argv[2:]], [.25] * 4, None, out, MergeConfig(), "
        "SilentProgress())"
    )
    arguments = [str(tmp_path / "out"), *map(str, branches)]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert result.returncode != 0 and "File too large" in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_interrupted_merge_keeps_finished_shards(branches, tmp_path):
    merge(branches, WEIGHTS, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    shutil.copy(shards[0], out)
    (out / f"{shards[1].name}.part").write_bytes(b"half")
    write_record(out / shards[0].name, out / shards[0].name)
    stamp = (out / shards[0].name).stat().st_mtime_ns
    merge_branches(branches, WEIGHTS, None, out, MergeConfig(), SilentProgress())
    assert (out / shards[0].name).stat().st_mtime_ns == stamp
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


def test_unreadable_input_is_an_error_of_the_run(branches):
    with pytest.raises(InputError, match="is not a directory"):
        read_checkpoint(branches[0] / "nowhere")
    assert issubclass(InputError, MeritFastError)
