"""A .metadata from anywhere runs no code; every fault is one line, soon and in little memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from support.paths import ROOT

from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.merge.read.dcp.tiles import tiling_fault

WORD = struct.Struct("<I")
LIMIT_SECONDS = 6  # 2 where nothing else runs


class Runs:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, call, *args):
        self.call = (call, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one tensor in one chunk."""
    dcp.save({"w": torch.arange(6.0).reshape(2, 3)}, checkpoint_id=tmp_path / "in", no_dist=True)
    return tmp_path / "in"


def refuse(folder, message):
    """The merge stops with one line that names a file of the folder, and writes nothing."""
    out = folder.parent / "out"
    with pytest.raises(InputError, match=message) as error:
        merge_models([folder], out=out, form="distcp")
    text = str(error.value)
    assert text.isprintable() and len(text) < 3000 and str(folder) in text
    assert not out.exists()


def change(folder, act):
    """Loads .metadata with torch, changes it and saves it."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    act(metadata)
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "call",
    [(os.mkdir, "ran"), (eval, "open('ran', 'w')"), (io.StringIO, "x"), (bytearray, 9)],
)
def test_no_code_runs(folder, monkeypatch, call):
    monkeypatch.chdir(folder.parent)

    def act(metadata):
        metadata.planner_data = {"w": Runs(*call)}

    change(folder, act)
    refuse(folder, r"\.metadata: names '[\w.]+', which is not read, at byte")
    assert not (folder.parent / "ran").exists()


def test_code_in_an_item_does_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    shard = folder / "__0_0.distcp"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs(os.mkdir, "ran"), 2))
    shard.write_bytes(buffer.getvalue())

    def act(metadata):
        for info in metadata.storage_data.values():
            info.length = len(buffer.getvalue())

    change(folder, act)
    refuse(folder, r"__0_0.distcp: w: data.pkl: .* names 'posix.mkdir', which is not read")
    assert not (folder.parent / "ran").exists()


def chunk(offsets, sizes):
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    "chunks,message",
    [
        ([((0, 0), (1, 3))], r"w: no chunk holds \[1:2, 0:3\]"),
        ([((0, 0), (2, 3)), ((1, 0), (1, 3))], r"w: chunks .* and .* overlap"),
        ([((0, 0), (2, 3))] * 2, r"w: two chunks hold \[0:2, 0:3\]"),
        ([((0, 0), (2, 4))], r"w: chunk \[0:2, 0:4\] lies outside the shape \[2, 3\]"),
        ([((0, 0, 0), (2, 3, 1))], r"w: a chunk must have 2 dimensions as the tensor"),
        ([], r"w: no chunk holds \[0:2, 0:3\]"),
    ],
)
def test_chunks_must_tile_the_tensor_once(folder, chunks, message):
    def act(metadata):
        metadata.state_dict_metadata["w"].chunks = [chunk(*each) for each in chunks]
        index, info = next(iter(metadata.storage_data.items()))
        for offsets, _ in chunks:
            metadata.storage_data[type(index)("w", offsets)] = info

    change(folder, act)
    refuse(folder, message)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("relative_path", "../x.distcp", "must name a file of the checkpoint's folder"),
        ("relative_path", "absent.distcp", "absent.distcp: cannot be read"),
        ("offset", -1, "offset: must be an integer from 0"),
        ("offset", 1 << 40, "ends at byte"),
        ("length", 100, "must be a file of torch.save"),
        ("transform_descriptors", ["zstd"], "is transformed"),
    ],
)
def test_places_must_be_in_the_folder_and_whole(folder, field, value, message):
    change(folder, lambda m: setattr(next(iter(m.storage_data.values())), field, value))
    refuse(folder, message)


def test_the_item_must_be_what_metadata_says(folder):
    change(folder, lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32))
    refuse(folder, "dtype must be I32 as in .metadata, got F32")


def test_a_shape_that_differs_in_the_item(folder):
    def act(metadata):
        metadata.state_dict_metadata["w"].size = torch.Size([3, 2])
        metadata.state_dict_metadata["w"].chunks = [chunk((0, 0), (3, 2))]

    change(folder, act)
    refuse(folder, r"shape must be \[3, 2\] as in .metadata, got \[2, 3\]")


def test_a_record_marked_as_a_folder_is_refused(folder):
    """torch 2.13 reads nothing from it, and gives what the memory held before."""
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    name = data.rindex(b"archive/data/0")  # the last one stands in the zip's directory
    attributes = name - 46 + 38
    assert data[name - 46 : name - 42] == b"PK\1\2"
    data[attributes] |= 0x10
    file.write_bytes(data)
    refuse(folder, "data/0': must be a file, is a folder")


def test_any_cut_is_refused(folder):
    data = (folder / ".metadata").read_bytes()
    for end in range(0, len(data) - 1, 7):
        (folder / ".metadata").write_bytes(data[:end])
        refuse(folder, r"\.metadata: ")


BOMBS = {
    "memo": b"\x80\x04r" + WORD.pack(2**32 - 1) + b".",
    "get": b"\x80\x04j" + WORD.pack(2**32 - 1) + b".",
    "text": b"\x80\x04X" + WORD.pack(2**32 - 1) + b".",
    "long text": b"\x80\x04X" + WORD.pack(50_000_000) + b"x" * 50_000_000 + b".",
    "bytes": b"\x80\x04B" + WORD.pack(2**31) + b".",
    "doubled": b"\x80\x04)\x94" + b"h\x00h\x00\x86q\x00" + b".",
    "laughs": b"\x80\x04K\x01\x94"
    + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(200))
    + b".",
    "marks": b"\x80\x04" + b"(" * 20_000_000,
    "lists": b"\x80\x04" + b"]" * 20_000_000,
    "numbers": b"\x80\x04" + b"K\x00" * 20_000_000,
    "nested": b"\x80\x04)" + b"\x85" * 20_000_000 + b".",
    "appended": b"\x80\x04]" + (b"(" + b"N" * 1000 + b"e") * 20_000 + b".",
    "remembered": b"\x80\x04]" + b"\x94" * 40_000_000,
    "protocols": b"\x80\x04" * 20_000_000,
    "keys": b"\x80\x04}" + (b"(" + b"K\x00N" * 1000 + b"u") * 20_000 + b".",
    "self": b"\x80\x04]\x94h\x00a.",
    "digits": b"\x80\x04L" + b"9" * 10_000_000 + b"L\n.",
}
LIMITED = """
import sys, time
from merit_fast.errors import InputError
from merit_fast.merge.read.dcp.metadata import read_metadata
from pathlib import Path
started = time.process_time()
try:
    read_metadata(Path(sys.argv[1]))
except InputError as error:
    assert str(error).isprintable() and len(str(error)) < 1000
    seconds = round(time.process_time() - started, 2)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(seconds, int(peak.split()[1]) // 1024)
"""


@pytest.mark.process
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon_in_little_memory(tmp_path, bomb):
    (tmp_path / ".metadata").write_bytes(BOMBS[bomb])
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / ".metadata"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout, result.stderr[-2000:]
    seconds, mebibytes = map(float, result.stdout.split())
    assert seconds < LIMIT_SECONDS and mebibytes < 256


def test_many_chunks_are_checked_in_linear_time():
    boxes = [((i, j), (1, 1)) for i in range(300) for j in range(300)]
    started = time.process_time()
    assert tiling_fault((300, 300), boxes) is None
    assert tiling_fault((300, 300), [*boxes, ((7, 9), (1, 1))]) == "two chunks hold [7:8, 9:10]"
    assert tiling_fault((300, 300), boxes[:-1]) == "no chunk holds [299:300, 299:300]"
    assert time.process_time() - started < 5


def test_a_tiling_that_is_no_grid():
    """A pinwheel of five boxes."""
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))]
    whole = [*pinwheel, ((1, 1), (1, 1))]
    assert tiling_fault((3, 3), whole) is None
    assert tiling_fault((3, 3), pinwheel) == "no chunk holds 1 of the elements of [0:3, 0:3]"
    assert "overlap" in tiling_fault((3, 3), [*whole, ((1, 1), (2, 2))])


@pytest.mark.parametrize(
    "places,message",
    [
        ([[0, 0], [1, 0]], r"w: no chunk holds \[2:3, 0:2\]|chunks .* overlap"),
        ([[0, 0], [3, 0]], r"w: no chunk holds \[2:3, 0:2\]"),
        ([[0, 0], [2]], "w: DCP_SHARDING_INFO must have saved_offsets of 2 integers"),
        ([[0, 0], None], "w: DCP_SHARDING_INFO must have saved_offsets of 2 integers"),
    ],
)
def test_chunks_of_safetensors_must_tile(tmp_path, places, message):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, place in enumerate(places):
        info = {"w": {"saved_offsets": place}} if place else {}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info)}
        file = folder / f"shard-0000{number}-model-00001-of-00001.safetensors"
        save_file({"w": torch.ones(2, 2)}, file, metadata)
    refuse(folder, message)
