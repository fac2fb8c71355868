"""Models in object stores are read in ranges and give the bytes of local ones."""

import json
import subprocess
import sys

import numpy as np
from support.merge.headers import pack, tensor, write_model
from support.merge.s3_server import put_tree
from support.merge.stores import local_tree, merge, tree

from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.write.upload import MARKER


# ---- the same bytes from and to anywhere
def test_models_in_s3_merge_to_the_bytes_of_local_ones(remote, branches, tmp_path):
    expected = local_tree(branches, tmp_path / "near")
    assert local_tree(remote, tmp_path / "far") == expected
    urls = [str(model) for model in remote]
    assert local_tree([urls[0], branches[1], *urls[2:]], tmp_path / "mixed") == expected


def test_outputs_in_s3_are_those_of_a_local_merge(server, branches, bucket, tmp_path):
    options = {"stats": True, "checksum": True, "base": branches[3], "shard_size": "70K"}
    expected = local_tree(branches[:3], tmp_path / "out", **options)
    server.requests.clear()
    merge(branches[:3], bucket / "deep/out", **options)
    sent = [request.key.rpartition("/")[2] for request in server.of("PUT", "")]
    assert sent[0] == MARKER and sent[-3:] == [
        "config.json",
        "model.safetensors.index.json",
        "stage.json",
    ]
    assert tree(bucket / "deep/out", tmp_path) == expected
    assert (
        read_checkpoint(bucket / "deep/out").tensors.keys()
        == read_checkpoint(tmp_path / "out").tensors.keys()
    )


def test_ties_from_s3_to_s3(remote, branches, bucket, tmp_path):
    expected = local_tree(
        branches[:2], tmp_path / "out", base=branches[3], method="ties", density=0.3
    )
    merge(remote[:2], str(bucket / "out"), base=str(remote[3]), method="ties", density=0.3)
    assert tree(bucket / "out", tmp_path) == expected


def test_slerp_reads_its_models_twice_from_another_store(branches, in_memory, tmp_path):
    for branch in branches[:2]:
        put_tree(branch, in_memory / branch.name)
    expected = local_tree(branches[:2], tmp_path / "out", method="slerp", t=0.3)
    merge(
        [in_memory / branch.name for branch in branches[:2]],
        in_memory / "out",
        method="slerp",
        t=0.3,
    )
    assert tree(in_memory / "out", tmp_path) == expected


def test_numpy_takes_models_from_a_store_as_the_native_engine_does(
    branches, in_memory, tmp_path, monkeypatch
):
    for branch in branches[:2]:
        put_tree(branch, in_memory / branch.name)
    expected = local_tree(branches[:2], tmp_path / "out")
    monkeypatch.setenv("MERIT_FAST_BACKEND", "eager")
    assert (
        local_tree([in_memory / branch.name for branch in branches[:2]], tmp_path / "eager")
        == expected
    )


def test_weights_come_from_branch_json_in_the_store(branches, in_memory, tmp_path):
    for number, branch in enumerate(branches[:2]):
        put_tree(branch, in_memory / branch.name)
        tokens = 3 - 2 * number
        write_manifest(
            BranchManifest("b", "merit", number, ("a",), 1, tokens, 10, 1, 0, "x", "x"),
            tmp_path / "b",
        )
        location = in_memory / branch.name / "branch.json"
        location.store.put_file(str(tmp_path / "b"), location.path)
    models = [in_memory / branch.name for branch in branches[:2]]
    assert merge(models, tmp_path / "out", weights="tokens", dry_run=True)["weights"] == [
        0.75,
        0.25,
    ]


def test_the_command_line_takes_urls_with_weights(remote, branches, bucket, tmp_path):
    command = [sys.executable, "-m", "merit_fast.cli.main", "merge"]
    models = [f"--model={remote[0]}:3", f"--model={remote[1]}:1"]
    options = ["--threads=3", "--chunk-kib=8", "--json"]
    result = subprocess.run(
        [*command, str(bucket / "out"), *models, *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["weights"] == [0.75, 0.25] and summary["merged"] == str(bucket / "out")
    expected = local_tree(branches[:2], tmp_path / "out", weights=(3.0, 1.0))
    assert tree(bucket / "out", tmp_path) == expected


# ---- only needed bytes are read
def test_headers_take_one_request_of_a_mebibyte(server, bucket, tmp_path):
    big = np.zeros(6 << 20, np.uint8)
    for k in range(2):
        file = pack({"w": tensor([len(big) // 4], 0, len(big))}, big.tobytes())
        put_tree(write_model(tmp_path / f"m{k}", {"model.safetensors": file}), bucket / f"m{k}")
    server.requests.clear()
    merge([bucket / "m0", bucket / "m1"], bucket / "out", dry_run=True)
    reads = server.of("GET", "model.safetensors")
    assert [request.range for request in reads] == ["bytes=0-1048575"] * 2
    assert sum(request.sent for request in server.requests) < (2 << 20) + 20_000
    server.requests.clear()
    merge([bucket / "m0", bucket / "m1"], tmp_path / "out", chunk_kib=1024)
    ranges = [
        request
        for request in server.of("GET", "model.safetensors")
        if request.range != "bytes=0-1048575"
    ]
    assert all(request.sent <= 1 << 20 for request in ranges)
    assert sum(request.sent for request in ranges) == 2 * len(big)  # every byte of the data once


def test_a_header_larger_than_the_first_request_is_read_whole(in_memory, tmp_path):
    names = [f"layer.{i:05d}.{'n' * 80}" for i in range(9000)]
    header = {name: tensor([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    data = np.arange(len(names), dtype=np.float32).tobytes()
    for k in range(2):
        put_tree(
            write_model(tmp_path / f"m{k}", {"model.safetensors": pack(header, data)}),
            in_memory / f"m{k}",
        )
    assert list(read_checkpoint(in_memory / "m0").tensors) == names
    merge([in_memory / "m0", in_memory / "m1"], tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes()[-len(data) :] == data


LOCAL_SCRIPT = """
import sys
from pathlib import Path
from merit_fast.merge import merge_models
models = [Path(path) for path in sys.argv[2:]]
merge_models(models, "uniform", out=Path(sys.argv[1]))
print([name for name in ("fsspec", "s3fs", "torch") if name in sys.modules])
"""


def test_a_local_merge_imports_no_client(branches, tmp_path):
    command = [
        sys.executable,
        "-c",
        LOCAL_SCRIPT,
        str(tmp_path / "out"),
        str(branches[0]),
        str(branches[1]),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
