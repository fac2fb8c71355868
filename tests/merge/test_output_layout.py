"""Tensors and files of the output: missing tensors, sizes of files, the index."""

import json

import pytest
import torch
from support.merge.merges import load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.engine.layout import lay_out
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.headers import read_header
from merit_fast.merge.sizes import parse_bytes

INDEX = "model.safetensors.index.json"


def tensors(names, k=0):
    return {name: torch.full((3, 4), float(k + 1 + i)) for i, name in enumerate(names)}


@pytest.fixture
def models(tmp_path):
    """a, b, c in all; d not in m1; e in the base and m1; x only in m1."""
    return (
        [write(tmp_path / "m0", tensors("abcd")), write(tmp_path / "m1", tensors("abcex", 10))],
        write(tmp_path / "base", tensors("abcde", 100)),
    )


def run(models, out, base=None, **options):
    merge(models, [1 / len(models)] * len(models), out, MergeConfig(**options), base)
    return load(out)


def test_a_missing_tensor_is_an_error_that_says_what_to_do(models, tmp_path):
    paths, base = models
    with pytest.raises(
        InputError,
        match=r"m1/model.safetensors: d: is missing, .*m0 has it; merge.missing says what",
    ):
        run(paths, tmp_path / "o1")


def test_an_extra_tensor_is_an_error(models, tmp_path):
    first = write(tmp_path / "first", tensors("abc"))
    with pytest.raises(
        InputError, match="m0/model.safetensors: d: is not in .*first; merge.missing"
    ):
        run([first, models[0][0]], tmp_path / "out")


def test_drop_leaves_what_all_have(models, tmp_path):
    paths, base = models
    merged = run(paths, tmp_path / "out", missing="drop")
    assert sorted(merged) == ["a", "b", "c"]
    assert all(torch.equal(merged[n], torch.full((3, 4), 6.0 + i)) for i, n in enumerate("abc"))
    lone = write(tmp_path / "lone", {"z": torch.zeros(2)})
    with pytest.raises(InputError, match="m0: shares no tensor with the other models"):
        run([paths[0], lone], tmp_path / "none", missing="drop")


def test_base_puts_the_bases_tensor_in_the_gap(models, tmp_path):
    paths, base = models
    second = write(tmp_path / "second", tensors("abce", 10))
    merged = run([paths[0], second], tmp_path / "out", base, missing="base")
    assert sorted(merged) == ["a", "b", "c", "d", "e"]
    assert torch.equal(merged["a"], torch.full((3, 4), 6.0))
    assert torch.equal(merged["d"], torch.full((3, 4), (4.0 + 104.0) / 2))  # m0 has it
    assert torch.equal(merged["e"], torch.full((3, 4), (105.0 + 14.0) / 2))  # the second has it
    moved = run(
        [paths[0], second], tmp_path / "ties", base, missing="base", method="ties", density=1.0
    )
    assert torch.equal(moved["d"], torch.full((3, 4), 4.0))  # whoever lacks it has not moved
    with pytest.raises(InputError, match="m1/model.safetensors: x: is not in .*base"):
        run(paths, tmp_path / "extra", base, missing="base")
    with pytest.raises(InputError, match="merge: missing=base needs a base model; give --base"):
        run(paths, tmp_path / "no-base", missing="base")


def test_shapes_and_dtypes_must_agree(tmp_path):
    first_model = write(tmp_path / "m0", {"w": torch.zeros(3, 4), "ids": torch.arange(3)})
    turned = write(tmp_path / "m1", {"w": torch.zeros(4, 3), "ids": torch.arange(3)})
    with pytest.raises(
        InputError, match=r"m1/model.safetensors: w: shape must be \[3, 4\] .* got \[4, 3\]"
    ):
        run([first_model, turned], tmp_path / "o1")
    half = write(tmp_path / "m2", {"w": torch.zeros(3, 4).half(), "ids": torch.arange(3)})
    with pytest.raises(
        InputError, match="w: dtype must be F32 .* got F16; merge.dtype chooses one"
    ):
        run([first_model, half], tmp_path / "o2")
    assert run([first_model, half], tmp_path / "o3", dtype="bf16")["w"].dtype == torch.bfloat16
    counts = write(tmp_path / "m4", {"w": torch.zeros(3, 4), "ids": torch.arange(3).float()})
    with pytest.raises(InputError, match="ids: dtype must be I64 as in .* got F32$"):
        run([first_model, counts], tmp_path / "o4", dtype="fp32")


# ---- files
def sharded(directory, files):
    directory.mkdir()
    for name, parts in files.items():
        write(directory, parts, name)
    weight_map = {name: file for file, parts in files.items() for name in parts}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def check_index(out):
    """The index agrees with the files, its totals with the tensors."""
    index = json.loads((out / INDEX).read_text())
    listed = {
        entry.name: file.name
        for file in sorted(out.glob("*.safetensors"))
        for entry in read_header(file)
    }
    assert index["weight_map"] == listed and list(index["weight_map"]) == sorted(listed)
    loaded = load(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())
    assert index["metadata"]["total_parameters"] == sum(
        tensor.numel() for tensor in loaded.values()
    )
    return listed


def test_files_are_those_of_the_first_model(tmp_path):
    files = {
        "model-00001-of-00002.safetensors": tensors("bd"),
        "model-00002-of-00002.safetensors": tensors("ac"),
    }
    models = [sharded(tmp_path / "m0", files), write(tmp_path / "m1", tensors("abcd"))]
    run(models, tmp_path / "out")
    assert check_index(tmp_path / "out") == {
        name: file for file, parts in files.items() for name in parts
    }
    run(models[::-1], tmp_path / "single")
    files = sorted(file.name for file in (tmp_path / "single").iterdir())
    assert files == ["README.md", "model.safetensors"]


def test_dropping_keeps_the_index_right(tmp_path):
    files = {
        "model-00001-of-00002.safetensors": tensors("bd"),
        "model-00002-of-00002.safetensors": tensors("ac"),
    }
    models = [sharded(tmp_path / "m0", files), write(tmp_path / "m1", tensors("ac"))]
    run(models, tmp_path / "out", missing="drop")
    assert check_index(tmp_path / "out") == dict.fromkeys("ac", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "size,files", [("48", 4), ("95", 4), ("96", 2), ("144", 2), ("192", 1), ("1", 4), ("5G", 1)]
)
def test_shard_size_is_the_most_a_file_holds(tmp_path, size, files):
    """Tensors of 48 bytes; one that is larger than the limit has a file to itself."""
    models = [write(tmp_path / f"m{k}", tensors("abcd", k)) for k in range(2)]
    merged = run(models, tmp_path / "out", shard_size=size)
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) == files and (tmp_path / "out" / INDEX).exists() == (files > 1)
    assert names == (
        [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
        if files > 1
        else ["model.safetensors"]
    )
    for name in names:
        entries = read_header(tmp_path / "out" / name)
        assert (
            sum(entry.num_bytes for entry in entries) <= int(size.replace("5G", "999"))
            or len(entries) == 1
        )
    if files > 1:
        check_index(tmp_path / "out")
    whole = run(models, tmp_path / "whole")
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_order_in_a_file_is_the_first_models(tmp_path):
    names = "dbca"
    models = [write(tmp_path / f"m{k}", tensors(names, k)) for k in range(2)]
    run(models, tmp_path / "out")
    order = [
        [entry.name for entry in read_header(path / "model.safetensors")]
        for path in (models[0], tmp_path / "out")
    ]
    assert order[0] == order[1]


def test_totals_follow_the_chosen_dtype(tmp_path):
    models = [
        write(tmp_path / f"m{k}", tensors("abcd", k) | {"ids": torch.arange(6)}) for k in range(2)
    ]
    run(models, tmp_path / "out", dtype="bf16", shard_size="60")
    check_index(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 4 * 24 + 48
    )


def test_data_begins_at_a_multiple_of_8_bytes(tmp_path):
    for name in ("a", "ab", "abc", "abcdefgh"):
        model = write(tmp_path / name, {name: torch.zeros(5, dtype=torch.float64)})
        run([model], tmp_path / f"{name}-out")
        assert read_header(tmp_path / f"{name}-out/model.safetensors")[0].offset % 8 == 0


@pytest.mark.parametrize(
    "text,number",
    [
        ("32M", 32 << 20),
        ("5G", 5 << 30),
        ("5GB", 5 << 30),
        ("1.5K", 1536),
        ("400MiB", 400 << 20),
        ("7", 7),
    ],
)
def test_sizes_are_in_powers_of_1024(text, number):
    assert parse_bytes("shard_size", text) == number


@pytest.mark.parametrize("text", ["0", "-5M", "5X", "", "M", "0.1"])
def test_sizes_that_are_none_are_refused(text):
    for key in ("shard_size", "max_memory"):
        with pytest.raises(
            InputError, match=f"{key}: must be a number of bytes such as 32M or 5G, got"
        ):
            MergeConfig(**{key: text})


def test_nothing_is_written_before_everything_was_checked(models, tmp_path):
    paths, _ = models
    checkpoints = [read_checkpoint(path) for path in paths]
    with pytest.raises(InputError):
        lay_out(checkpoints, None, None)
    with pytest.raises(InputError):
        run(paths, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
