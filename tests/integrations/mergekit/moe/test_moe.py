"""Mixtures of experts from dense models, against the dense models and formulas in fp64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.merge.merges import load, write
from support.paths import ROOT
from support.tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.run import merge_mergekit
from merit_fast.merge.prepared import PreparedMerge
from merit_fast.progress import SilentProgress

CODES = {"source_model": "m1", "positive_prompts": ["write code", "a function"]}
HIDDEN = 72  # of the tiny Llama models
POEMS = {"source_model": "m2", "positive_prompts": ["a poem"], "negative_prompts": ["prose"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """m0, m1 and m2: tiny Llama models with tokenizers; q: a tiny Qwen3."""
    root = tmp_path_factory.mktemp("moe")
    for k in range(3):
        make_tokenizer(root / f"m{k}")
        make_model(root / f"m{k}", seed=k, dtype=torch.float32)
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(root / "q")
    return root


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(recipe, tmp_path, *assignments, **options):
    file = tmp_path / "moe.yml"
    file.write_text(yaml.safe_dump(recipe))
    return merge_mergekit(file, str(tmp_path / "out"), SilentProgress(), assignments, **options)


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits, model


@pytest.mark.parametrize("base, kind", [("m0", "mixtral"), ("q", "qwen3_moe")])
def test_equal_experts_compute_what_the_dense_model_does(inside, tmp_path, base, kind):
    recipe = {"base_model": base, "gate_mode": "random", "experts": [{"source_model": base}] * 4}
    run({**recipe, "experts_per_token": 3}, tmp_path)
    expected, _ = logits(base)
    found, model = logits(tmp_path / "out")
    assert model.config.model_type == kind and model.config.num_experts_per_tok == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_every_tensor_is_that_of_its_model(inside, tmp_path):
    experts = [{**CODES, "residual_scale": 0.5}, POEMS]
    run({"base_model": "m0", "gate_mode": "cheap_embed", "experts": experts}, tmp_path)
    found = load(tmp_path / "out")
    models = [load(Path(f"m{k}")) for k in range(3)]
    block = "model.layers.1.block_sparse_moe"
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for short, name in names.items():
        dense = f"model.layers.1.mlp.{name}.weight"
        scale = 0.5 if short == "w2" else 1.0
        assert torch.equal(found[f"{block}.experts.0.{short}.weight"], scale * models[1][dense])
        assert torch.equal(found[f"{block}.experts.1.{short}.weight"], models[2][dense])
    outside = [name for name in models[0] if ".mlp." not in name]
    assert all(torch.equal(found[name], models[0][name]) for name in outside)
    assert not any(".mlp." in name for name in found)
    logits(tmp_path / "out")


def test_the_shared_expert_of_qwen(inside, tmp_path):
    experts = [{"source_model": "m1"}, {"source_model": "m2"}]
    shared = [{"source_model": "m0", "residual_scale": 0.1}]
    recipe = {"base_model": "m0", "gate_mode": "random", "experts": experts}
    run({**recipe, "shared_experts": shared, "dtype": "bfloat16"}, tmp_path)
    found = load(tmp_path / "out")
    dense = load(Path("m0"))
    block = "model.layers.0.mlp"
    down = 0.1 * dense[f"{block}.down_proj.weight"].double()
    assert torch.equal(found[f"{block}.shared_expert.down_proj.weight"], down.bfloat16())
    assert found[f"{block}.shared_expert_gate.weight"].shape == (1, HIDDEN)
    assert not found["model.layers.0.self_attn.q_proj.bias"].any()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"] and config["dtype"] == "bfloat16"
    logits(tmp_path / "out")


def unit(vector):
    return vector / np.linalg.norm(vector)


def gates_of(directions):
    first = unit(directions(CODES["positive_prompts"]))
    second = directions(POEMS["positive_prompts"]) - directions(POEMS["negative_prompts"])
    return np.stack([first, unit(second)])


def test_cheap_embed_is_the_direction_of_the_prompts_tokens(inside, tmp_path):
    recipe = {"base_model": "m0", "gate_mode": "cheap_embed", "experts": [CODES, POEMS]}
    run(recipe, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("m0")
    rows = load(Path("m0"))["model.embed_tokens.weight"].double().numpy()

    def directions(prompts):
        begin = tokenizer.bos_token or ""
        ids = [tokenizer(begin + text, add_special_tokens=False)["input_ids"] for text in prompts]
        return unit(sum(rows[token] for each in ids for token in each))

    for layer in range(2):
        found = load(tmp_path / "out")[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(found.numpy(), gates_of(directions), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_is_the_direction_of_the_layers_inputs(inside, tmp_path, mode):
    run({"base_model": "m0", "gate_mode": mode, "experts": [CODES, POEMS]}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("m0")
    model = AutoModelForCausalLM.from_pretrained("m0", dtype=torch.float64).eval()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for number in range(2):

        def directions(prompts, number=number):
            ends = []
            for prompt in prompts:
                seen.clear()
                begin = tokenizer.bos_token or ""
                ids = tokenizer(begin + prompt, add_special_tokens=False, return_tensors="pt")
                with torch.no_grad():
                    model(ids["input_ids"])
                states = seen[number].numpy()
                ends.append(states.mean(axis=0) if mode == "hidden_avg" else states[-1])
            return np.mean(ends, axis=0)

        found = load(tmp_path / "out")[f"model.layers.{number}.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(found.numpy(), gates_of(directions), rtol=1e-3, atol=1e-5)


def test_random_routers_follow_the_seed(inside, tmp_path):
    recipe = {"base_model": "m0", "experts": [{"source_model": "m1"}, {"source_model": "m2"}]}
    gates = {}
    for number, (mode, seed) in enumerate(
        [("random", 1), ("random", 1), ("random", 2), ("uniform_random", 1)]
    ):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        run({**recipe, "gate_mode": mode}, folder, f"seed={seed}")
        gates[number] = load(folder / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    assert 0.5 < gates[0].std() < 1.5
    assert gates[3].abs().max() <= HIDDEN**-0.5 and gates[3].std() > 0.3 * HIDDEN**-0.5


def test_a_dry_run_reads_headers_only_and_the_recipe_is_kept(inside, tmp_path):
    recipe = {"base_model": "m0", "gate_mode": "hidden", "experts": [CODES, POEMS]}
    plan = run(recipe, tmp_path, dry_run=True)
    assert os.listdir(tmp_path) == ["moe.yml"] and plan["parameters"] > 0
    summary = run(recipe, tmp_path, "max_memory=2M")
    assert summary["parameters"] == plan["parameters"]
    kept = json.loads((tmp_path / "out/mergekit_moe_config.json").read_text())
    assert [expert["source_model"] for expert in kept["experts"]] == ["m1", "m2"]
    assert kept["experts"][1]["negative_prompts"] == ["prose"]


def test_a_killed_mixture_resumes_and_leaves_nothing(inside, tmp_path, monkeypatch):
    experts = [{"source_model": "m1"}, {"source_model": "m2"}]
    recipe = {"base_model": "m0", "gate_mode": "random", "experts": experts}
    run(recipe, tmp_path)
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out").rename(tmp_path / "whole")

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreparedMerge, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path)
    assert (tmp_path / ".out.routers/routers.safetensors").exists()
    run(recipe, tmp_path)
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole
    left = {name for name in os.listdir(tmp_path) if not name.endswith(".locks")}
    assert left == {"moe.yml", "out", "whole"}


def test_prompts_that_hardly_differ_are_noted(inside, tmp_path):
    notes = []
    progress = SilentProgress()
    progress.note = notes.append
    file = tmp_path / "moe.yml"
    twins = [CODES, {**CODES, "source_model": "m2", "negative_prompts": []}]
    twins[1]["positive_prompts"] = [*CODES["positive_prompts"], "a"]
    file.write_text(
        yaml.safe_dump({"base_model": "m0", "gate_mode": "cheap_embed", "experts": twins})
    )
    merge_mergekit(file, str(tmp_path / "out"), progress)
    assert any("2 of 2 layers have routers that hardly differ" in note for note in notes)


def test_no_torch_is_imported_without_hidden_states(inside, tmp_path):
    file = tmp_path / "moe.yml"
    file.write_text(
        yaml.safe_dump({"base_model": "m0", "gate_mode": "cheap_embed", "experts": [CODES, POEMS]})
    )
    words = ["merit-fast", "merge", str(tmp_path / "out"), "--mergekit", str(file)]
    script = (
        f"import sys; sys.argv = {words!r}; from merit_fast.cli.main import main; "
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.strip().split()[-1] == "False", result.stdout + result.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": []}, "experts: must be a list of at least one"),
        ({"gate_mode": "hiden"}, "gate_mode: must be one of hidden, "),
        ({"exprts_per_token": 2}, "exprts_per_token: is not supported; valid keys: base_model"),
        ({"experts_per_token": 3}, "experts: must be at least experts_per_token, 3, got 2"),
        ({"experts_per_token": 0}, "experts_per_token: must be at least 1, got 0"),
        ({"gate_mode": "hidden", "experts": [{"source_model": "m1"}] * 2}, "is required by gate_m"),
        ({"gate_mode": "hidden", "experts": [CODES, CODES]}, "must have prompts that differ"),
        ({"experts": [{**CODES, "noise_scale": 0.1}] * 2}, r"experts\[0\].noise_scale: must be ab"),
        ({"experts": [{**CODES, "residual_scale": "x"}] * 2}, "residual_scale: must be a number"),
        ({"experts": [{**CODES, "positive_prompts": "x"}] * 2}, "must be a list of texts, got 'x'"),
        (
            {"experts": [{"source_model": "q"}] * 2},
            r"experts\[0\].source_model: must be of model_t",
        ),
        ({"experts": [{"source_model": "gone"}] * 2}, r"experts\[0\].source_model: gone: not a f"),
        ({"shared_experts": [CODES] * 2}, "llama models with 2 shared experts fit none of Mixtral"),
        ({"architecture": "deepseek"}, "architecture: must not be DeepSeek"),
        (
            {"architecture": "gpt"},
            "architecture: must be the beginning of one of Mixtral, Qwen MoE",
        ),
    ],
)
def test_bad_recipes_are_refused(inside, tmp_path, change, message):
    recipe = {"base_model": "m0", "gate_mode": "random", "experts": [CODES, POEMS]}
    with pytest.raises(InputError, match=message):
        run({**recipe, **change}, tmp_path)
    assert os.listdir(tmp_path) == ["moe.yml"]


def test_models_that_do_not_fit_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "wide", intermediate_size=96)
    base = load(folder / "m0")
    for name, tensors in {
        "biased": {**base, "model.layers.0.self_attn.q_proj.bias": torch.zeros(HIDDEN)},
        "short": {k: v for k, v in base.items() if k != "model.layers.1.mlp.up_proj.weight"},
        "old": {**base, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
    }.items():
        write(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text((folder / "m0/config.json").read_text())
    dense = str(folder / "m0")

    def attempt(base, expert):
        experts = [{"source_model": expert}] * 2
        return run({"base_model": base, "gate_mode": "random", "experts": experts}, tmp_path)

    with pytest.raises(InputError, match=r"gate_proj.weight: must be of shape \[100, 72\] as in"):
        attempt(dense, "wide")
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight: is missing"):
        attempt(dense, "short")
    with pytest.raises(InputError, match="q_proj.bias: has no place in a Mixtral model"):
        attempt("biased", dense)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
    attempt("old", dense)
    assert not any("inv_freq" in name for name in load(tmp_path / "out"))
