"""The reader of checkpoints names every fault of a header or an index on one line."""

import pytest
from support.headers import one_tensor, pack, tensor, write_model
from support.merge.checkpoints import assert_refused

W = tensor([2], 0, 8)


TWO = {"a.safetensors": one_tensor("v"), "b.safetensors": one_tensor("w")}


HEADERS = {  # a fault of model.safetensors, and a part of its message
    "empty": (b"", "must begin with the 8 bytes"),
    "too short": (b"abc", "must begin with the 8 bytes .* holds 3"),
    "over 100 MB": (
        b"\xff" * 64,
        "header length must be at most 100000000 bytes, got 18446744073709551615",
    ),
    "header cut": (pack({"w": W}, bytes(8), length=500), "header length must be at most"),
    "no length": (bytes(8), "header: is not JSON"),
    "not JSON": (pack(b"{oops"), "header: is not JSON: Expecting property name"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "header: is not UTF-8 text, byte 2 is 0xff"),
    "UTF-16": (pack("{}".encode("utf-16")), "is not UTF-8"),
    "not an object": (pack([1]), "must be a JSON object .* got"),
    "space first": (pack(b" {}"), "must be a JSON object from its first byte"),
    "endless nesting": (pack(b"[" * 200_000), "nested too deeply"),
    "nesting in a tensor": (
        pack(b'{"w": ' + b"[" * 900 + b"]" * 900 + b"}"),
        "w: must be an object of .*, got \\[",
    ),
    "endless number": (pack(b'{"w": ' + b"9" * 5000 + b"}"), "header: is not JSON"),
    "name twice": (pack(b'{"w": {}, "v": {}, "w": {}}'), "'w' stands twice"),
    "key twice": (pack(b'{"w": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands twice"),
    "metadata": (
        pack({"__metadata__": {"format": 1}, "w": W}, bytes(8)),
        "__metadata__: must be a mapping of text",
    ),
    "half a surrogate pair": (
        pack({"__metadata__": {"x": "\ud800"}}),
        "__metadata__: must be a mapping of text",
    ),
    "unknown key": (
        pack({"w": {**W, "strides": [1]}}, bytes(8)),
        "w: must be an object of dtype, shape and data_off",
    ),
    "no tensor": (pack({}), "holds no tensor"),
    "null": (pack({"w": None}), "w: must be an object of dtype, shape and data_offsets, got None"),
    "shape is text": (pack({"w": {**W, "shape": "2"}}, bytes(8)), "w: shape must be integers"),
    "shape is an object": (pack({"w": {**W, "shape": {}}}, bytes(8)), "w: shape must be integers"),
    "shape 2.0": (pack({"w": {**W, "shape": [2.0]}}, bytes(8)), "w: shape must be integers"),
    "shape 2e0": (
        pack(b'{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', bytes(8)),
        "shape must be",
    ),
    "shape true": (pack({"w": {**W, "shape": [True, 2]}}, bytes(8)), "w: shape must be integers"),
    "shape negative": (pack({"w": {**W, "shape": [-2]}}, bytes(8)), "w: shape must be integers"),
    "shape 2^70": (
        pack({"w": {**W, "shape": [2**70]}}, bytes(8)),
        "shape must be .* got .1180591620717411303424",
    ),
    "offset false": (
        pack({"w": {**W, "data_offsets": [False, 8]}}, bytes(8)),
        "data_offsets must be .* got .False",
    ),
    "three offsets": (
        pack({"w": {**W, "data_offsets": [0, 8, 8]}}, bytes(8)),
        "data_offsets must be 2 integers",
    ),
    "size overflows": (
        pack({"w": tensor([2**40, 2**40], 0, 8)}, bytes(8)),
        "span 4835703278458516698824704 bytes",
    ),
    "size of 4000 bits": (
        pack({"w": tensor([2**62] * 64, 0, 8)}, bytes(8)),
        r"must span \d+\.\.\.\d+ bytes, got 8",
    ),
    "endless shape": (
        pack({"w": tensor([1] * 9999, 0, 4)}, bytes(4)),
        "must have at most 64 dimensions, got 9999",
    ),
    "unknown dtype": (
        pack({"w": {**W, "dtype": "BF17"}}, bytes(8)),
        "w: dtype must be one of .* got 'BF17'",
    ),
    "dtype is a list": (pack({"w": {**W, "dtype": ["F32"]}}, bytes(8)), "w: dtype must be one of"),
    "dtype missing": (
        pack({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "w: must be an object of dtype",
    ),
    "span": (pack({"w": tensor([3], 0, 8)}, bytes(8)), r"w: F32 \[3\] must span 12 bytes, got 8"),
    "backwards": (pack({"w": tensor([2], 8, 0)}, bytes(8)), "w: F32 .* must span 8 bytes, got -8"),
    "out of range": (pack({"w": tensor([2], 8, 16)}, bytes(8)), "w: ends at byte .*, the file at"),
    "truncated": (one_tensor()[:-3], "w: ends at byte .*, the file at"),
    "bytes after": (one_tensor() + b"x", "holds .* bytes, its header describes"),
    "hole first": (pack({"w": tensor([1], 4, 8)}, bytes(8)), "w: leaves a hole after the header"),
    "hole": (
        pack({"v": tensor([1], 0, 4), "w": tensor([1], 8, 12)}, bytes(12)),
        "w: leaves a hole after v",
    ),
    "overlap": (
        pack({"v": W, "w": tensor([2], 4, 12)}, bytes(12)),
        "w: overlaps v: must start at 8, got 4",
    ),
    "same bytes": (pack({"v": W, "w": W}, bytes(8)), "w: overlaps v"),
    "empty in another": (pack({"v": tensor([0], 4, 4), "w": W}, bytes(8)), "v: overlaps w"),
    "nameless": (pack({"": W}, bytes(8)), "'': a name must be 1 to 1000 printable"),
    "line break": (pack({"a\nb": W}, bytes(8)), r"'a\\nb': a name must be .* printable"),
    "escape": (pack({"\x1b[2J": W}, bytes(8)), "a name must be"),
    "surrogate": (pack(b'{"\\ud800": 1}'), "a name must be"),
    "endless name": (pack({"w" * 100_000: W}, bytes(8)), "a name must be"),
}


INDEXES = {  # faults of the index next to TWO
    "list": (b"[]", "index.json: must be a JSON object, got"),
    "empty": (b"", "index.json: is not JSON"),
    "no map": (b"{}", "weight_map: must be a mapping of tensor to file, got None"),
    "map of nothing": ({}, "weight_map: must be a mapping"),
    "map is a list": (b'{"weight_map": ["v"]}', "weight_map: must be a mapping"),
    "not UTF-8": (b'{"weight_map": {"\xe9": "a.safetensors"}}', "is not UTF-8"),
    "deep": (b'{"x":' * 50_000, "nested too deeply"),
    "rather deep": (b'{"x":' * 200 + b"1" + b"}" * 200, "nested at most 100 deep"),
    "name twice": (
        b'{"weight_map": {"v": "a.safetensors", "v": "b.safetensors"}}',
        "'v' stands twice",
    ),
    "file is a number": ({"v": 1}, "v: must name a .safetensors file of this directory, got 1"),
    "file is null": ({"v": None}, "v: must name a .safetensors file"),
    "another kind": (
        {"v": "a.bin"},
        "v: must name a .safetensors file of this directory, got 'a.bin'",
    ),
    "parent": ({"v": "../a.safetensors"}, "v: must name a .safetensors file of this directory"),
    "below": ({"v": "x/a.safetensors"}, "v: must name"),
    "absolute": ({"v": "/a.safetensors"}, "v: must name"),
    "backslash": ({"v": "..\\a.safetensors"}, "v: must name"),
    "NUL": ({"v": "a\0.safetensors"}, "v: must name"),
    "surrogate": ({"v": "\ud800.safetensors"}, "v: must name"),
    "line break": ({"v\nw": "a.safetensors"}, "a name must be"),
    "no such file": ({"v": "c.safetensors"}, "c.safetensors: cannot be read: No such file"),
    "too long": ({"v": "a" * 300 + ".safetensors"}, "cannot be read: File name too long"),
    "no such tensor": (
        {"v": "a.safetensors", "w": "b.safetensors", "ghost": "a.safetensors"},
        "ghost: is not in a.sa",
    ),
    "unlisted tensor": ({"v": "a.safetensors", "x": "b.safetensors"}, "x: is not in b.safetensors"),
    "wrong file": (
        {"v": "b.safetensors", "w": "a.safetensors"},
        "v: must be in b.safetensors, is in a.safetensors",
    ),
}


@pytest.mark.parametrize("content,message", HEADERS.values(), ids=HEADERS)
def test_a_broken_header_is_named(tmp_path, content, message):
    assert_refused(write_model(tmp_path / "model", {"model.safetensors": content}), message)


@pytest.mark.parametrize("weight_map,message", INDEXES.values(), ids=INDEXES)
def test_a_broken_index_is_named(tmp_path, weight_map, message):
    assert_refused(write_model(tmp_path / "model", TWO, weight_map), message)


def test_tensors_and_files_that_the_index_does_not_agree_with_are_named(tmp_path):
    both = pack({"v": tensor([1], 0, 4), "w": tensor([1], 4, 8)}, bytes(8))
    unlisted = write_model(tmp_path / "unlisted", {"a.safetensors": both}, {"v": "a.safetensors"})
    assert_refused(unlisted, "w: is in a.safetensors but not in the index")
    twice = {"a.safetensors": both, "b.safetensors": one_tensor("w")}
    repeated = write_model(tmp_path / "twice", twice, {"v": "a.safetensors", "w": "b.safetensors"})
    assert_refused(repeated, "b.safetensors: w: is in a.safetensors too")
    stale = write_model(
        tmp_path / "stale",
        {**TWO, "model.safetensors": both},
        {"v": "a.safetensors", "w": "b.safetensors"},
    )
    assert_refused(stale, "does not name model.safetensors, which is next to it")
