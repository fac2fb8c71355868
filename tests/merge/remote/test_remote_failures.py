"""An unfinished output in a store never looks finished; failures are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.merge.s3_server import put_tree
from support.merge.stores import local_tree, merge, tree
from support.paths import KILL_AT

from merit_fast.errors import InputError, MeritFastError
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.remote import as_location
from merit_fast.merge.write.upload import MARKER
from merit_fast.progress import SilentProgress


# ---- an unfinished output never looks finished
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
    with pytest.raises(InputError, match="and has no index"):
        read_checkpoint(bucket / "out")
    server.requests.clear()
    merge(remote[:2], bucket / "out", checksum=True)
    sent = {request.key.rpartition("/")[2] for request in server.of("PUT", ".safetensors")}
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


# ---- a failure is one line
class Overwrites(SilentProgress):
    """Puts another object in a model's place once its header has been read."""

    def __init__(self, location):
        self.place = location

    def task(self, *args):
        data = bytes(1 + self.place.parent.entries()[self.place.name]["size"])
        self.place.store.pipe_file(self.place.path, data)
        return super().task(*args)


@pytest.mark.parametrize("out", ["local", "s3"])
def test_an_object_that_changes_meanwhile_is_refused(remote, bucket, tmp_path, out):
    shard = next(name for name in sorted(remote[1].entries()) if name.endswith(".safetensors"))
    location = tmp_path / "out" if out == "local" else bucket / "out"
    with pytest.raises(
        InputError, match=rf"^s3://.*/b1/{shard}: must not change while it is read: was .* bytes"
    ):
        merge(remote[:2], location, progress=Overwrites(remote[1] / shard))
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
    message = f"{bucket}/none: is not a directory, nor a safetensors file"
    assert failure(bucket / "none", out) == message
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
    model = in_memory / "b0"
    cat_file = in_memory.store.cat_file

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
