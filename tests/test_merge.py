"""The streaming merge: byte for byte the fp64 average rounded once, bounded in memory, and strict about its inputs."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import save_file

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average._eager import float64_to_bf16
from merit_fast.manifest import BranchManifest, write_manifest
from merit_fast.merge import MergeConfig, combine, merge_branches, merge_models, resolve_weights
from merit_fast.merge.checkpoint import read_checkpoint
from merit_fast.merge.plan import plan_merge
from merit_fast.progress import SilentProgress

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    """Four tied bf16 models in several shards, with tokenizer-like companions."""
    root = tmp_path_factory.mktemp("branches")
    for k in range(4):
        make_model(root / f"b{k}", dtype=torch.bfloat16, shard="60KB", seed=k)
        (root / f"b{k}" / "tokenizer.json").write_text(json.dumps({"of": k}))
    return [root / f"b{k}" for k in range(4)]


def merge(models, weights, out, config=None):
    out.mkdir()
    merge_branches(models, weights, config or MergeConfig(), out, SilentProgress())


def load(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def reference(models, weights):
    """NumPy, fp64, one rounding."""
    loaded = [load(model) for model in models]
    result = {}
    for name in loaded[0]:
        total = sum(w * one[name].double().numpy() for w, one in zip(weights, loaded, strict=True))
        result[name] = float64_to_bf16(total.ravel())
    return result


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
def test_bytes_equal_the_fp64_average_rounded_once(branches, tmp_path, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    merge(branches, WEIGHTS, tmp_path / "out")
    merged, truth = load(tmp_path / "out"), reference(branches, WEIGHTS)
    assert merged.keys() == truth.keys()
    for name, tensor in merged.items():
        assert np.array_equal(tensor.view(torch.uint16).numpy().ravel(), truth[name]), name


@pytest.mark.parametrize("threads,chunk_kib", [(1, 4), (2, 7), (5, 512)])
def test_threads_and_chunks_change_no_byte(branches, tmp_path, threads, chunk_kib):
    merge(branches, WEIGHTS, tmp_path / "a")
    merge(branches, WEIGHTS, tmp_path / "b", MergeConfig(threads=threads, chunk_kib=chunk_kib))
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_output_loads_and_is_laid_out_like_the_first_input(branches, tmp_path):
    from transformers import AutoModelForCausalLM

    merge(branches, WEIGHTS, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    first = json.loads((branches[0] / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == first["weight_map"] and len(set(first["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == first["metadata"]["total_size"]
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": 0}
    assert (tmp_path / "out/config.json").read_bytes() == (branches[0] / "config.json").read_bytes()


def test_identical_branches_give_the_branch_back(branches, tmp_path):
    merge([branches[1]] * 3, [1 / 3] * 3, tmp_path / "out")
    merged, one = load(tmp_path / "out"), load(branches[1])
    assert all(torch.equal(merged[name].view(torch.int16), one[name].view(torch.int16)) for name in one)


def test_other_dtypes_mixed_shapes_and_integers(tmp_path):
    def tensors(k):
        generator = torch.Generator().manual_seed(k)
        return {
            "half": torch.randn(5, 3, generator=generator).half(),
            "single": torch.randn(7, generator=generator),
            "double": torch.randn(2, 2, generator=generator).double(),
            "scalar": torch.randn((), generator=generator).bfloat16(),
            "empty": torch.zeros(0, 4),
            "positions": torch.arange(9),
        }

    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        save_file(tensors(k), tmp_path / f"m{k}/model.safetensors", {"format": "pt"})
    merge([tmp_path / "m0", tmp_path / "m1"], [0.25, 0.75], tmp_path / "out")
    merged = load(tmp_path / "out")
    a, b = tensors(0), tensors(1)
    for name in ("half", "single", "double"):
        exact = 0.25 * a[name].double() + 0.75 * b[name].double()
        assert torch.equal(merged[name], exact.to(a[name].dtype))
    assert merged["scalar"].shape == () and merged["empty"].shape == (0, 4)
    assert torch.equal(merged["positions"], torch.arange(9))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_runs_of_tensors_are_coalesced(branches):
    plan = plan_merge([read_checkpoint(branch) for branch in branches])
    tensors = sum(len(segment.names) for shard in plan.shards for segment in shard.segments)
    segments = sum(len(shard.segments) for shard in plan.shards)
    assert segments == len(plan.shards) < tensors


def exact(models, coefficients, name):
    loaded = [load(model)[name].double().numpy() for model in models]
    total = coefficients[0] * loaded[0]
    for coefficient, values in zip(coefficients[1:], loaded[1:], strict=True):
        total = total + coefficient * values
    return total


@pytest.mark.parametrize(
    "method,normalize,scale,coefficients",
    [
        ("linear", True, 0.5, (0.125, 0.375, 0.5)),  # theta_0 + s (mean - theta_0)
        ("linear", True, 2.0, (0.5, 1.5, -1.0)),
        ("linear", True, 1.0, (0.25, 0.75)),  # the base is not read at all
        ("linear", False, 0.5, (0.5, 1.5, 0.5)),
        ("task_arithmetic", False, 0.5, (0.5, 1.5, -1.0)),  # theta_0 + s sum w (theta_k - theta_0)
        ("task_arithmetic", True, 0.5, (0.125, 0.375, 0.5)),
        ("task_arithmetic", True, 1.0, (0.25, 0.75)),
    ],
)
def test_linear_methods_are_their_formula(branches, tmp_path, method, normalize, scale, coefficients):
    config = MergeConfig(weights=(1.0, 3.0), method=method, normalize=normalize, scale=scale)
    models, base, out = branches[:2], branches[3], tmp_path / "out"
    weights = resolve_weights(models, config)
    combination = combine(models, weights, base, config)
    assert combination.coefficients == coefficients
    out.mkdir()
    merge_branches(models, weights, config, out, SilentProgress(), base)
    name = "model.layers.1.mlp.up_proj.weight"
    truth = exact([*models, base][: len(coefficients)], coefficients, name)
    assert np.array_equal(load(out)[name].view(torch.uint16).numpy(), float64_to_bf16(truth))


def test_scale_0_gives_the_base_and_a_method_that_needs_one_says_so(branches, tmp_path):
    config = MergeConfig(weights="uniform", scale=0.0)
    out = tmp_path / "out"
    out.mkdir()
    merge_branches(branches[:2], [0.5, 0.5], config, out, SilentProgress(), branches[2])
    merged, base = load(out), load(branches[2])
    assert all(torch.equal(merged[name], base[name]) for name in base)
    with pytest.raises(InputError, match="method linear with scale 0 needs a base model"):
        combine(branches[:2], [0.5, 0.5], None, config)


@pytest.mark.parametrize("dtype,kind", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_output_dtype_is_chosen_and_mixed_inputs_are_taken_then(branches, tmp_path, dtype, kind):
    from transformers import AutoModelForCausalLM

    make_model(tmp_path / "single", dtype=torch.float32, shard="60KB", seed=9)
    models = [branches[0], tmp_path / "single"]
    with pytest.raises(InputError, match="dtype must be BF16 .* got F32; merge.dtype chooses one"):
        plan_merge([read_checkpoint(model) for model in models])
    merge(models, [0.25, 0.75], tmp_path / "out", MergeConfig(dtype=dtype))
    merged = load(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    truth = exact(models, (0.25, 0.75), name)
    if dtype == "bf16":
        assert np.array_equal(merged[name].view(torch.uint16).numpy(), float64_to_bf16(truth))
    else:
        assert np.array_equal(merged[name].numpy(), truth.astype(merged[name].numpy().dtype))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == merged[name].dtype == kind
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())


def test_dry_run_plans_and_writes_nothing(branches, tmp_path):
    models = [(branch, 1.0) for branch in branches]
    plan = merge_models(models, tmp_path / "out", MergeConfig(threads=3), SilentProgress(), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert plan == merge_models(models, tmp_path / "out", MergeConfig(threads=3), SilentProgress())
    assert plan["bytes_out"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert plan["bytes_in"] == 4 * sum(t.nbytes for t in load(branches[0]).values())
    assert plan["buffer_bytes"] == 3 * 5 * 512 * 1024
    assert plan["coefficients"] == [[str(branch), 0.25] for branch in branches]


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.model import peak_memory_bytes, reset_peak_memory
from merit_fast.progress import SilentProgress
out = Path(sys.argv[1]); out.mkdir()
reset_peak_memory(); before = peak_memory_bytes()
merge_branches([Path(p) for p in sys.argv[2:]], [.5, .5], MergeConfig(), out, SilentProgress())
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(peak_memory_bytes() - before)
"""


def test_memory_is_bounded_and_neither_torch_nor_transformers_is_imported(tmp_path):
    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        save_file({"w": torch.full((48, 1 << 20), float(k))}, tmp_path / f"m{k}/model.safetensors")
    arguments = [str(tmp_path / "out"), str(tmp_path / "m0"), str(tmp_path / "m1")]
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16 << 20  # two models of 192 MiB: 3 buffers of 512 KiB for each of 2 threads


def test_files_honour_the_umask(branches, tmp_path):
    old = os.umask(0o027)
    try:
        merge(branches, WEIGHTS, tmp_path / "out")
    finally:
        os.umask(old)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "out").glob("*.safetensors")} == {"0o640"}


# ---- weights
def branch_manifest(directory, tokens, examples=1, base="x"):
    directory.mkdir(exist_ok=True)
    manifest = BranchManifest("merit-0", "merit", 0, ("a",), examples, tokens, 10, 1, 0, base)
    write_manifest(manifest, directory / "branch.json")
    return directory


def test_weights_from_branch_manifests(tmp_path):
    models = [branch_manifest(tmp_path / "a", 30, 1), branch_manifest(tmp_path / "b", 10, 3)]
    assert resolve_weights(models, MergeConfig()) == [0.75, 0.25]
    assert resolve_weights(models, MergeConfig(weights="samples")) == [0.25, 0.75]
    assert resolve_weights(models, MergeConfig(weights="uniform")) == [0.5, 0.5]
    assert resolve_weights(models, MergeConfig(weights=(1.0, 3.0))) == [0.25, 0.75]


def test_weights_that_cannot_be_had(tmp_path):
    a, b = branch_manifest(tmp_path / "a", 30), branch_manifest(tmp_path / "b", 10, base="y")
    with pytest.raises(InputError, match="b/branch.json: base_fingerprint: must be x"):
        resolve_weights([a, b], MergeConfig())
    with pytest.raises(InputError, match="has no branch.json .* merge.weights=uniform"):
        resolve_weights([a, tmp_path], MergeConfig())
    with pytest.raises(InputError, match="must list 2 numbers, got 3"):
        resolve_weights([a, b], MergeConfig(weights=(1.0, 1.0, 1.0)))
    with pytest.raises(InputError, match="tokens must be positive"):
        resolve_weights([branch_manifest(tmp_path / "c", 0)], MergeConfig())
    for weights in ((), (1.0, -1.0), (float("inf"), 1.0)):
        with pytest.raises(InputError, match="weights"):
            MergeConfig(weights=weights)


# ---- bad input: named, and nothing written
def change_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_tensor(header):
    return next(name for name in header if name != "__metadata__")


def shift(header):
    header[first_tensor(header)]["data_offsets"][0] += 2


def rename(header):
    header["renamed"] = header.pop(first_tensor(header))


def bad_dtype(header):
    header[first_tensor(header)]["dtype"] = "BF17"


def negative(header):
    header[first_tensor(header)]["shape"] = [-1]


def repeated(header):
    name = first_tensor(header)
    return json.dumps(header)[:-1].encode() + f', "{name}": {json.dumps(header[name])}}}'.encode()


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], shift), "must span"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], rename), "is not in model-00001"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], bad_dtype), "dtype must be one of .*BF17"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], negative), "needs dtype, shape"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], lambda h: b"{oops"), "header is not JSON"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], lambda h: b"[1]"), "must be a JSON object"),
        (lambda d: change_header(sorted(d.glob("*.safetensors"))[0], repeated), "stands twice"),
        (lambda d: truncate(sorted(d.glob("*.safetensors"))[0], 10), "holds .* bytes, its header describes"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].write_bytes(b"abc"), "header length"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].write_bytes(b"\xff" * 64), "header length must be between"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].unlink(), "cannot be read: No such file"),
        (lambda d: edit_index(d, lambda m: m.update(ghost="model-00001-of-00001.safetensors")), "cannot be read"),
        (lambda d: edit_index(d, lambda m: m.update(ghost=next(iter(m.values())))), "ghost: is not in"),
        (lambda d: edit_index(d, lambda m: m.update({next(iter(m)): "../x.safetensors"})), "must name a .safetensors"),
        (lambda d: edit_index(d, lambda m: m.popitem()), "but not in the index|has it"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "weight_map"),
        (lambda d: [f.unlink() for f in d.glob("model*")], "holds neither"),
        (lambda d: to_pickle(d), "pytorch_model.bin is a pickle file"),
    ],
)
def test_broken_inputs_are_named_and_nothing_is_written(branches, tmp_path, damage, message):
    bad = tmp_path / "bad"
    shutil.copytree(branches[1], bad)
    damage(bad)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=message) as error:
        merge_branches([branches[0], bad], [0.5, 0.5], MergeConfig(), out, SilentProgress())
    assert "\n" not in str(error.value) and str(bad) in str(error.value)
    assert list(out.iterdir()) == []


def truncate(file, count):
    file.write_bytes(file.read_bytes()[:-count])


def edit_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def to_pickle(directory):
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    "changes,dtype,message",
    [
        ({"vocab_size": 408}, torch.bfloat16, r"embed_tokens.weight: shape must be \[400, 72\].* got \[408, 72\]"),
        ({}, torch.float32, "dtype must be BF16 .* got F32"),
        ({"num_hidden_layers": 1}, torch.bfloat16, "is missing"),
        ({"num_hidden_layers": 3}, torch.bfloat16, "model.layers.2.* is not in"),
        ({"tie_word_embeddings": False}, torch.bfloat16, "lm_head.weight: is not in"),
    ],
    ids=["vocabulary", "dtype", "missing", "extra", "untied"],
)
def test_models_that_do_not_fit_are_named(branches, tmp_path, changes, dtype, message):
    make_model(tmp_path / "other", dtype=dtype, **changes)
    with pytest.raises(InputError, match=message):
        plan_merge([read_checkpoint(branches[0]), read_checkpoint(tmp_path / "other")])


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
    models = two_files(tmp_path, {"v": torch.ones(5), "w": torch.zeros(3000)}, {"v": torch.ones(5), "w": bad})
    with pytest.raises(InputError, match=r"b/model.safetensors: w: must be finite"):
        merge(models, [0.5, 0.5], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    merge(models, [0.5, 0.5], tmp_path / "allowed", MergeConfig(allow_nonfinite=True))
    merged = load(tmp_path / "allowed")["w"][2500]
    assert torch.isnan(merged) if value != value else torch.isinf(merged)


def test_integer_tensors_that_differ_are_named(tmp_path):
    models = two_files(tmp_path, {"ids": torch.arange(4)}, {"ids": torch.arange(4) + 1})
    with pytest.raises(InputError, match="b/model.safetensors: ids: a I64 tensor cannot be averaged"):
        merge(models, [0.5, 0.5], tmp_path / "out")


def test_a_full_disk_is_said_before_any_work(branches, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(InputError, match="the disk has 10"):
        merge(branches, WEIGHTS, tmp_path / "out")


def test_a_write_that_fails_leaves_no_shard(branches, tmp_path):
    script = (
        "import resource, sys; from pathlib import Path; from merit_fast.merge import *;"
        "from merit_fast.progress import SilentProgress; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); out = Path(sys.argv[1]); out.mkdir();"
        "merge_branches([Path(p) for p in sys.argv[2:]], [.25] * 4, MergeConfig(), out, SilentProgress())"
    )
    arguments = [str(tmp_path / "out"), *map(str, branches)]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_interrupted_merge_keeps_finished_shards(branches, tmp_path):
    merge(branches, WEIGHTS, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    shutil.copy(shards[0], out)
    (out / f"{shards[1].name}.part").write_bytes(b"half")
    stamp = (out / shards[0].name).stat().st_mtime_ns
    merge_branches(branches, WEIGHTS, MergeConfig(), out, SilentProgress())
    assert (out / shards[0].name).stat().st_mtime_ns == stamp
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


def test_unreadable_input_is_an_error_of_the_run(branches):
    with pytest.raises(InputError, match="is not a directory"):
        read_checkpoint(branches[0] / "nowhere")
    assert issubclass(InputError, MeritFastError)
