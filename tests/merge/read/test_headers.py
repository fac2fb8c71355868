"""Headers are read in linear time and bounded memory, by C++ exactly as by Python."""

import json
import re
import struct
import subprocess
import sys
from functools import partial

import pytest
from support.merge.headers import backends_agree, pack, tensor, write_model

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.merge import merge_models
from merit_fast.merge.read.headers import MAX_TENSORS, parse_header, read_header

MIB = 1 << 20
READ = """
import sys, time
from pathlib import Path
from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.merge.read.headers import read_header
started = time.process_time()
try:
    print(len(read_header(Path(sys.argv[1]))))
except InputError as error:
    print(error)
status = Path("/proc/self/status").read_text()
print(time.process_time() - started, status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize(
    "text",
    [
        b'{ "v" : {"shape":[ 2 ,3],\n"data_offsets":[0,24]\t, "dtype":"F32"} }   ',
        b'{"__metadata__":{},"v":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"a":"x\\"y\\\\","b":"\\u00e9"}}',
        b'{"__metadata__":{"a":"1","a":"2"}}',
        '{"é":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'.encode(),
        b'{"v":{"dtype":"F32","shape":[],"data_offsets":[0,4]},}',
        b'{"v":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}',
        b'{"v":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"v":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"v":{"dtype":"F32","shape":[9223372036854775807,0],"data_offsets":[0,0]}}',
        b'{"v":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,0]}}',
        b'{"v":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
        b'{"v":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"v":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"v":{"dtype":"F32","dtype":"F32","data_offsets":[0,4]}}',
        b'{"v":{"dtype":"","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"z":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},'
        b'"y":{"dtype":"F16","shape":[0,9],"data_offsets":[4,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}x',
        b"{",
        b"{}",
        b"",
        b"[]",
    ],
)
@pytest.mark.parametrize("num_bytes", [0, 4, 8, 24])
def test_the_native_parser_and_the_reference_agree(text, num_bytes):
    backends_agree(text, 8 + len(text) + num_bytes)


def many(count):
    """The text of a header of ``count`` tensors without elements."""
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % i for i in range(count)) + "}").encode()


HOSTILE = {
    "tensors": (lambda: many(1_500_000), "must describe at most 300000 tensors"),
    "lists": (lambda: b'{"v":{"shape":[' + b"[]," * 20_000_000 + b"]}}", "must hold at most"),
    "depth": (lambda: b'{"v":' + b"[" * 80_000_000, "must hold at most"),
    "metadata": (
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(6_000_000)) + b"}}",
        "must hold at most",
    ),
    "shape": (lambda: b'{"v":{"shape":[' + b"1," * 40_000_000 + b"1]}}", "must hold at most"),
    "escapes": (lambda: b'{"__metadata__":{"' + b"\\u0041" * 13_000_000 + b'":""}}', "holds no"),
    "last byte": (lambda: many(290_000)[:-1] + b",", "must hold at most"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_takes_two_seconds_and_256_mib_at_most(tmp_path, kind):
    if dispatch.native_module() is None:
        pytest.skip("the bounds hold for the native parser")
    make, message = HOSTILE[kind]
    text = make()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    command = [sys.executable, "-c", READ, str(tmp_path / "f.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    seconds, kib = map(float, lines[1].split())
    assert message in lines[0] or kind == "escapes"
    assert seconds < 2 and kib < 256 * 1024, lines


def test_as_many_tensors_as_allowed_are_read(tmp_path):
    if dispatch.native_module() is None:
        pytest.skip("the count holds for the native parser")
    text = many(MAX_TENSORS)
    assert len(parse_header("f", text, 8 + len(text), "cpu")) == MAX_TENSORS


def count_calls(work):
    """Calls of Python and C functions in this thread; the same in every run."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def write_many(folder, count):
    """A model of ``count`` tensors of one element in one file."""
    names = [f"model.layers.{i // 300}.experts.{i % 300}.w1.weight" for i in range(count)]
    header = {name: tensor([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    return write_model(folder, {"model.safetensors": pack(header, bytes(4 * count))})


def test_a_merge_takes_steps_in_proportion_to_its_tensors(tmp_path):
    """Calls of a whole merge of two models: so many for each tensor, whatever their number."""
    calls = {}
    for count in (10, 500, 1_000, 2_000):  # the first one loads the modules
        models = [write_many(tmp_path / f"{name}{count}", count) for name in ("a", "b")]
        out = tmp_path / f"out{count}"
        merge = partial(merge_models, models, [1, 1], out=out, fsync=False, threads=1)
        calls[count] = count_calls(merge)
    first = (calls[1_000] - calls[500]) / 500
    second = (calls[2_000] - calls[1_000]) / 1_000
    assert abs(second - first) < 1
    assert second < 140


def test_the_error_of_a_large_header_names_the_tensor(tmp_path):
    header = json.loads(many(2000))
    header["1999"] = tensor([3], 0, 4)
    (tmp_path / "f.safetensors").write_bytes(pack(header, bytes(4)))
    rule = f"{tmp_path / 'f.safetensors'}: 1999: F32 [3] must span 12 bytes, got 4"
    with pytest.raises(InputError, match=f"^{re.escape(rule)}$"):
        read_header(tmp_path / "f.safetensors")
