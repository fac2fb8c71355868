"""The streaming merge: byte for byte the fp64 average rounded once, and bounded in memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.merge.merges import WEIGHTS, load, merge
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average._eager import float64_to_bf16
from merit_fast.merge import MergeConfig, merge_branches, merge_models, resolve_weights
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.engine.layout import lay_out
from merit_fast.merge.engine.plan import plan_merge
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.progress import SilentProgress


def reference(models, weights):
    """NumPy, fp64, one rounding."""
    loaded = [load(model) for model in models]
    result = {}
    for name in loaded[0]:
        total = sum(
            w * other[name].double().numpy() for w, other in zip(weights, loaded, strict=True)
        )
        result[name] = float64_to_bf16(total.ravel())
    return result


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
def test_bytes_equal_the_fp64_average_rounded_once(branches, tmp_path, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    merge(branches, WEIGHTS, tmp_path / "out")
    merged = load(tmp_path / "out")
    truth = reference(branches, WEIGHTS)
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
    merged = load(tmp_path / "out")
    other = load(branches[1])
    assert all(
        torch.equal(merged[name].view(torch.int16), other[name].view(torch.int16)) for name in other
    )


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
    a = tensors(0)
    b = tensors(1)
    for name in ("half", "single", "double"):
        exact = 0.25 * a[name].double() + 0.75 * b[name].double()
        assert torch.equal(merged[name], exact.to(a[name].dtype))
    assert merged["scalar"].shape == () and merged["empty"].shape == (0, 4)
    assert torch.equal(merged["positions"], torch.arange(9))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_runs_of_tensors_are_coalesced(branches):
    plan = plan_merge(lay_out([read_checkpoint(branch) for branch in branches], None, None))
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
def test_linear_methods_are_their_formula(
    branches, tmp_path, method, normalize, scale, coefficients
):
    config = MergeConfig(weights=(1.0, 3.0), method=method, normalize=normalize, scale=scale)
    models = branches[:2]
    base = branches[3]
    out = tmp_path / "out"
    weights = resolve_weights(models, config)
    combination = combine(models, weights, base, config)
    entry = read_checkpoint(base).tensors["model.norm.weight"]
    assert combination.rule(entry) == coefficients
    assert combination.paths == (*models, base)[: len(coefficients)]
    out.mkdir()
    merge_branches(models, weights, base, out, config, SilentProgress())
    name = "model.layers.1.mlp.up_proj.weight"
    truth = exact([*models, base][: len(coefficients)], coefficients, name)
    assert np.array_equal(load(out)[name].view(torch.uint16).numpy(), float64_to_bf16(truth))


def test_scale_0_gives_the_base_and_a_method_that_needs_one_says_so(branches, tmp_path):
    config = MergeConfig(weights="uniform", scale=0.0)
    out = tmp_path / "out"
    out.mkdir()
    merge_branches(branches[:2], [0.5, 0.5], branches[2], out, config, SilentProgress())
    merged = load(out)
    base = load(branches[2])
    assert all(torch.equal(merged[name], base[name]) for name in base)
    with pytest.raises(
        InputError, match="merge: method linear with a scale needs a base model; give --base"
    ):
        combine(branches[:2], [0.5, 0.5], None, config)


@pytest.mark.parametrize(
    "dtype,kind", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_output_dtype_is_chosen_and_mixed_inputs_are_taken_then(branches, tmp_path, dtype, kind):
    from transformers import AutoModelForCausalLM

    make_model(tmp_path / "single", dtype=torch.float32, shard="60KB", seed=9)
    models = [branches[0], tmp_path / "single"]
    with pytest.raises(InputError, match="dtype must be BF16 .* got F32; merge.dtype chooses one"):
        lay_out([read_checkpoint(model) for model in models], None, None)
    merge(models, [0.25, 0.75], tmp_path / "out", MergeConfig(dtype=dtype))
    merged = load(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    truth = exact(models, (0.25, 0.75), name)
    if dtype == "bf16":
        assert np.array_equal(merged[name].view(torch.uint16).numpy(), float64_to_bf16(truth))
    else:
        assert np.array_equal(merged[name].numpy(), truth.astype(merged[name].numpy().dtype))
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == merged[name].dtype == kind
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())


def test_dry_run_plans_and_writes_nothing(branches, tmp_path):
    config = MergeConfig(threads=3, chunk_kib=512)
    plan = merge_models(branches, "uniform", out=tmp_path / "out", config=config, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert plan.pop("free_bytes") > plan["bytes_out"]
    done = merge_models(branches, "uniform", out=tmp_path / "out", config=config)
    assert plan == {key: value for key, value in done.items() if key != "free_bytes"}
    assert plan["bytes_out"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert plan["bytes_in"] == 4 * sum(t.nbytes for t in load(branches[0]).values())
    assert plan["buffer_bytes"] == 3 * 5 * 512 * 1024
    assert plan["coefficients"] == [(str(branch), 0.25) for branch in branches]


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.model import peak_memory_bytes, reset_peak_memory
from merit_fast.progress import SilentProgress
out = Path(sys.argv[1]); out.mkdir()
reset_peak_memory(); before = peak_memory_bytes()
models = [Path(p) for p in sys.argv[2:]]
merge_branches(models, [.5, .5], None, out, MergeConfig(), SilentProgress())
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(peak_memory_bytes() - before)
"""


def test_memory_is_bounded_and_neither_torch_nor_transformers_is_imported(tmp_path):
    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        save_file({"w": torch.full((48, 1 << 20), float(k))}, tmp_path / f"m{k}/model.safetensors")
    arguments = [str(tmp_path / "out"), str(tmp_path / "m0"), str(tmp_path / "m1")]
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (
        int(result.stdout) < 16 << 20
    )  # two models of 192 MiB: 3 buffers of 512 KiB for each of 2 threads


def test_files_honour_the_umask(branches, tmp_path):
    old = os.umask(0o027)
    try:
        merge(branches, WEIGHTS, tmp_path / "out")
    finally:
        os.umask(old)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "out").glob("*.safetensors")} == {
        "0o640"
    }
