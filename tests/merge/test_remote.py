"""Models in object stores are read in ranges and written whole: against an S3 server on loopback, and in memory."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checks import tree_bytes
from support.headers import pack, tensor, write_model
from support.paths import KILL_AT
from support.s3_server import get_tree, put_tree, s3_server

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.remote import as_location
from merit_fast.merge.write.upload import MARKER
from merit_fast.progress import SilentProgress

SMALL = {
    "threads": 3,
    "chunk_kib": 8,
    "weights": "uniform",
}  # several chunks and several readers for small models
LEAVE_OUT = ("stage.json",)  # names the inputs
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server() as recorder:
        yield recorder


@pytest.fixture
def bucket(server):
    """A new bucket of the server."""
    place = as_location(f"s3://bucket-{next(NUMBERS)}")
    place.store.mkdir(place.path)
    return place


@pytest.fixture
def in_memory():
    """A place in fsspec's memory."""
    return as_location(f"memory://place-{next(NUMBERS)}")


@pytest.fixture
def remote(bucket, branches):
    """The four models in the bucket, under the same names."""
    for branch in branches:
        put_tree(branch, bucket / branch.name)
    return [bucket / branch.name for branch in branches]


def merge(models, out, base=None, progress=None, share=(1, 1), dry_run=False, **options):
    config, pairs = MergeConfig(**{**SMALL, **options}), [(model, None) for model in models]
    return merge_models(
        pairs, out, config, progress or SilentProgress(), base, dry_run=dry_run, share=share
    )


def tree(place, tmp_path):
    return tree_bytes(get_tree(place, tmp_path / f"copy{next(NUMBERS)}"), LEAVE_OUT)


def local_tree(models, directory, **options):
    merge(models, directory, **options)
    return tree_bytes(directory, LEAVE_OUT)


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
    sent = [one.key.rpartition("/")[2] for one in server.of("PUT", "")]
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
        place = in_memory / branch.name / "branch.json"
        place.store.put_file(str(tmp_path / "b"), place.path)
    models = [in_memory / branch.name for branch in branches[:2]]
    assert merge(models, tmp_path / "out", weights="tokens", dry_run=True)["weights"] == [
        0.75,
        0.25,
    ]


@pytest.mark.process
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


# ---- only what is needed is read
def test_headers_take_one_request_of_a_mebibyte(server, bucket, tmp_path):
    big = np.zeros(6 << 20, np.uint8)
    for k in range(2):
        file = pack({"w": tensor([len(big) // 4], 0, len(big))}, big.tobytes())
        put_tree(write_model(tmp_path / f"m{k}", {"model.safetensors": file}), bucket / f"m{k}")
    server.requests.clear()
    merge([bucket / "m0", bucket / "m1"], bucket / "out", dry_run=True)
    reads = server.of("GET", "model.safetensors")
    assert [one.range for one in reads] == ["bytes=0-1048575"] * 2
    assert sum(one.sent for one in server.requests) < (2 << 20) + 20_000
    server.requests.clear()
    merge([bucket / "m0", bucket / "m1"], tmp_path / "out", chunk_kib=1024)
    ranges = [
        one for one in server.of("GET", "model.safetensors") if one.range != "bytes=0-1048575"
    ]
    assert all(one.sent <= 1 << 20 for one in ranges)
    assert sum(one.sent for one in ranges) == 2 * len(big)  # every byte of the data once


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
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.progress import SilentProgress
models = [(Path(path), 1.0) for path in sys.argv[2:]]
merge_models(models, Path(sys.argv[1]), MergeConfig(), SilentProgress())
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


# ---- what is unfinished never looks finished
@pytest.mark.process
def test_a_killed_merge_resumes_and_sends_no_file_twice(server, remote, branches, bucket, tmp_path):
    expected = local_tree(branches[:2], tmp_path / "out", checksum=True)
    models = [word for model in remote[:2] for word in ("--model", str(model))]
    command = ["merge", str(bucket / "out"), *models, "--weights=uniform", "--checksum", "--json"]
    killed = [sys.executable, str(KILL_AT), "model-00003-of-", "1", *command]
    result = subprocess.run(
        killed, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == -9, result.stderr
    left = set((bucket / "out").entries(fresh=True))
    assert {name for name in left if name.endswith(".safetensors")} and MARKER in left
    assert not {"model.safetensors.index.json", "stage.json", "config.json"} & left
    with pytest.raises(InputError, match="has no index beside it"):
        read_checkpoint(bucket / "out")
    server.requests.clear()
    merge(remote[:2], bucket / "out", checksum=True)
    sent = {one.key.rpartition("/")[2] for one in server.of("PUT", ".safetensors")}
    assert not sent & left and "model-00003-of-" in str(sent)
    assert tree(bucket / "out", tmp_path) == expected
    server.requests.clear()
    assert merge(remote[:2], bucket / "out", checksum=True)["finished"]
    assert not server.of("PUT", "")


def test_processes_share_an_output(branches, in_memory, tmp_path):
    expected = local_tree(branches, tmp_path / "out", checksum=True)
    assert not merge(branches, in_memory / "out", share=(2, 2), checksum=True)["finished"]
    assert "stage.json" not in (in_memory / "out").entries()
    assert merge(branches, in_memory / "out", share=(1, 2), checksum=True)["finished"]
    assert tree(in_memory / "out", tmp_path) == expected


def test_an_earlier_output_is_replaced_without_a_trace(branches, bucket, tmp_path):
    merge(branches, bucket / "out", shard_size="40K", stats=True, base=branches[3])
    merge(branches, bucket / "out", shard_size="1G")
    assert tree(bucket / "out", tmp_path) == local_tree(branches, tmp_path / "out", shard_size="1G")


def test_objects_of_others_are_never_touched(branches, in_memory):
    (in_memory / "out").store.pipe_file((in_memory / "out/thesis.txt").path, b"mine")
    with pytest.raises(InputError, match="out: holds objects and is not an output of merit-fast"):
        merge(branches, in_memory / "out")
    assert set((in_memory / "out").entries()) == {"thesis.txt"}
    put_tree(branches[0], in_memory / "out/b0")
    for out in ("out/b0", "out"):
        with pytest.raises(InputError, match="must not be one of|must not hold"):
            merge([in_memory / "out/b0", branches[1]], in_memory / out)


# ---- what fails is said in one line
class Overwrites(SilentProgress):
    """Puts another object in a model's place once its header has been read."""

    def __init__(self, place):
        self.place = place

    def task(self, *args):
        data = bytes(1 + self.place.parent.entries()[self.place.name]["size"])
        self.place.store.pipe_file(self.place.path, data)
        return super().task(*args)


@pytest.mark.parametrize("out", ["local", "s3"])
def test_an_object_that_changes_meanwhile_is_refused(remote, bucket, tmp_path, out):
    shard = next(name for name in sorted(remote[1].entries()) if name.endswith(".safetensors"))
    place = tmp_path / "out" if out == "local" else bucket / "out"
    with pytest.raises(
        InputError, match=rf"^s3://.*/b1/{shard}: must not change while it is read: was .* bytes"
    ):
        merge(remote[:2], place, progress=Overwrites(remote[1] / shard))
    assert (
        "stage.json" not in (bucket / "out").entries(fresh=True) and not (tmp_path / "out").exists()
    )


def failure(model, out, expected=InputError):
    with pytest.raises(MeritFastError) as caught:
        merge([model, model], out)
    assert type(caught.value) is expected and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_or_not_allowed_is_named(server, remote, bucket, tmp_path):
    out = tmp_path / "out"
    assert failure("s3://no-such-bucket/m", out) == (
        "s3://no-such-bucket/m: does not exist: The specified bucket does not exist"
    )
    assert failure("s3://no-such-bucket/m", "s3://no-such-bucket/out").startswith(
        "s3://no-such-bucket/m: does not"
    )
    assert failure(bucket / "none", out) == f"{bucket}/none: is not a directory"
    shard = next(name for name in sorted(remote[0].entries()) if name.endswith(".safetensors"))
    remote[0].store.rm((remote[0] / shard).path)
    assert failure(remote[0], out) == f"{remote[0]}/{shard}: does not exist"
    resource = f"arn:aws:s3:::{bucket.path}/b1/*"
    policy = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": resource}
    bucket.store.call_s3(
        "put_bucket_policy", Bucket=bucket.path, Policy=json.dumps({"Statement": [policy]})
    )
    assert failure(remote[1], out).startswith(
        f"{remote[1]}/model"
    ) and "may not be accessed" in failure(remote[1], out)
    assert failure("nosuch://a/b", out) == "nosuch://a/b: Protocol not known: nosuch"
    assert not out.exists()


@pytest.mark.parametrize("first_byte", [0, 1], ids=["header", "data"])
def test_a_store_that_fails_is_said_in_one_line(
    branches, in_memory, tmp_path, monkeypatch, first_byte
):
    put_tree(branches[0], in_memory / "b0")
    model, cat_file = in_memory / "b0", in_memory.store.cat_file

    def failing(path, start, end):
        if path.endswith(".safetensors") and start >= first_byte:
            raise ConnectionError("Connection reset\nby peer")
        return cat_file(path, start=start, end=end)

    monkeypatch.setattr(model.store, "cat_file", failing)
    line = failure(model, tmp_path / "out", MeritFastError)
    assert line.startswith(f"{model}/model-0000") and line.endswith(
        ".safetensors: Connection reset by peer"
    )


def test_file_urls_are_local_paths():
    assert as_location("file:///data/model") == Path("/data/model") == as_location("/data/model")


def test_a_full_spool_is_found_before_anything_is_sent(branches, in_memory, monkeypatch):
    import merit_fast.merge.write.shards as shards

    monkeypatch.setattr(shards, "free_bytes", lambda path: 1000)
    with pytest.raises(InputError, match="needs [0-9]+ bytes, the disk has 1000"):
        merge(branches, in_memory / "out")
    assert set((in_memory / "out").entries()) == {MARKER}
