"""Models merged while they are loaded have the bits of the file merge."""

import json

import pytest
import torch
from support.merge.loaded import SOME, assert_same_model, change_config, copied
from support.merge.merges import METHODS, WEIGHTS, config_of, load, write
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from merit_fast.errors import InputError
from merit_fast.merge import load_merged, merge_models
from merit_fast.merge.read.checkpoint import read_checkpoint


def from_files(models, weights, out, base=None, /, **options):
    """Reads back the output of a file merge."""
    config = config_of(options if weights is None else {**options, "weights": weights})
    merge_models(models, base=base, out=out, config=config)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


def name_of(options):
    return options["method"]


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_a_tied_llama_has_the_bits_of_the_file_merge(branches, tmp_path, dtype):
    loaded = load_merged(branches, WEIGHTS, dtype=dtype)
    assert_same_model(loaded, from_files(branches, WEIGHTS, tmp_path / "out", dtype=dtype))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("options", METHODS, ids=name_of)
def test_every_method_has_the_bits_of_the_file_merge(branches, tmp_path, options):
    weights = [3, 1] if config_of(options).takes_weights else None
    loaded = load_merged(branches[:2], weights, base=str(branches[3]), **options)
    assert_same_model(
        loaded, from_files(branches[:2], weights, tmp_path / "out", branches[3], **options)
    )


@pytest.mark.parametrize("options", [*SOME, {"method": "passthrough", "scale": 0.5}], ids=name_of)
def test_without_the_native_engine_too(branches, tmp_path, options, monkeypatch):
    models = branches[:1] if options["method"] == "passthrough" else branches[:2]
    expected = from_files(models, "uniform", tmp_path / "out", branches[3], **options)
    monkeypatch.setenv("MERIT_FAST_BACKEND", "eager")
    assert_same_model(load_merged(models, "uniform", base=branches[3], **options), expected)


def test_weights_mean_what_they_mean_on_the_command_line(branches):
    expected = load_merged(branches[:2], [0.75, 0.25])
    assert_same_model(load_merged(branches[:2], (3, 1)), expected)
    uniform = load_merged(branches[:2], "uniform")
    assert_same_model(load_merged(branches[:2], [1, 1]), uniform)
    twice = load_merged(branches[:2], [1, 1], normalize=False)
    weight = twice.model.layers[0].mlp.up_proj.weight
    half = uniform.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, 2 * half)
    assert_same_model(load_merged(branches[:2]), uniform)
    with pytest.raises(InputError, match="b0: has no branch.json .*; give weights= as uniform"):
        load_merged(branches[:2], "tokens")


@pytest.mark.parametrize(
    "weights,options", [([0.5, 0.5], {}), ([2, 1], {"method": "ties", "density": 0.4})]
)
def test_adapters_are_merged_onto_their_base(pair, tmp_path, weights, options):
    adapters = [add_adapter(tmp_path / f"adapter{k}", seed=k) for k in range(2)]
    loaded = load_merged(adapters, weights, base=pair[0], **options)
    assert_same_model(loaded, from_files(adapters, weights, tmp_path / "out", pair[0], **options))
    changed = loaded.model.layers[1].self_attn.q_proj.weight
    assert not torch.equal(changed, load(pair[0])["model.layers.1.self_attn.q_proj.weight"])
    with pytest.raises(InputError, match="is an adapter and needs the model it was trained on"):
        load_merged(adapters, weights)


def add_adapter(path, seed):
    """A LoRA adapter of rank 2 on one projection of the fixtures' Llamas."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (2, 72), "lora_B": (72, 2)}
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {
        f"{prefix}.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    write(path, factors, "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_8_bit_floats_become_a_model_of_the_chosen_dtype(pair, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def shrink(tensors):
        tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.tensor([0.01])

    models = [copied(model, tmp_path / model.name, shrink) for model in pair]
    for model in models:
        # a scheme that no transformers knows: it must not come to read it
        change_config(
            model, quantization_config={"quant_method": "fp8", "activation_scheme": "none"}
        )
    loaded = load_merged(models, [1, 1], dtype="bf16")
    assert_same_model(loaded, from_files(models, [1, 1], tmp_path / "out", dtype="bf16"))
    assert not hasattr(loaded.config, "quantization_config") and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options,tied", [({}, True), ({"method": "dare_linear", "density": 0.5}, False)]
)
def test_a_head_that_comes_to_differ_from_its_embedding_is_kept(pair, tmp_path, options, tied):
    """dare's masks depend on names, so a tied pair that the files hold twice comes apart."""

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    models = [copied(model, tmp_path / model.name, tie) for model in pair]
    for model in models:
        change_config(model, tie_word_embeddings=True)
    base = models[0] if options else None
    loaded = load_merged(models, [1, 1], base=base, **options)
    assert_same_model(loaded, from_files(models, [1, 1], tmp_path / "out", base, **options))
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) == tied
    assert loaded.config.tie_word_embeddings == tied


@pytest.mark.parametrize(
    "options,message",
    [
        ({"methd": "ties"}, "^load_merged: methd: unknown key; did you mean method"),
        ({"method": "tie"}, "^load_merged: method: must be one of linear, "),
        ({"method": "ties"}, "^load_merged: density: must be given for method ties"),
        (
            {"weights": "unifrm"},
            "^load_merged: weights: must be one of auto, tokens, samples, uniform, fit or a list, "
            "got 'unifrm'",
        ),
        ({"weights": [1.0]}, "weights: must list 2 numbers, got 1"),
        (
            {"weights": [1, 1], "method": "slerp"},
            "^load_merged: weights: must be absent: method slerp takes no weights",
        ),
        ({"checksum": True}, "^load_merged: checksum: concerns an output's files, must be absent"),
        (
            {"dtype": "int8"},
            "^load_merged: dtype: must be one of bf16, .*, got 'int8'",
        ),
        ({"max_memory": "1K"}, "max_memory: must be at least"),
    ],
)
def test_options_that_are_wrong_are_named(pair, options, message):
    with pytest.raises(InputError, match=message):
        load_merged(pair, **{"weights": "uniform", **options})


def test_a_gpt2_without_its_buffers_is_loaded_whole(tmp_path):
    for k in range(2):
        torch.manual_seed(k)
        config = GPT2Config(
            vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=None
        )
        GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / f"m{k}")
    models = [tmp_path / "m0", tmp_path / "m1"]
    loaded = load_merged(models, [0.3, 0.7])
    assert_same_model(loaded, from_files(models, [0.3, 0.7], tmp_path / "out"))
    with torch.no_grad():
        assert loaded(torch.arange(5)[None]).logits.isfinite().all()


def test_keys_that_transformers_renames_and_joins_arrive(tmp_path):
    """Mixtral's files hold experts one by one, its model all of a layer in one tensor."""
    for k in range(2):
        torch.manual_seed(k)
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            num_local_experts=3,
            bos_token_id=None,
        )
        MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / f"m{k}")
    models = [tmp_path / "m0", tmp_path / "m1"]
    loaded = load_merged(models, [0.3, 0.7])
    assert not loaded.state_dict().keys() >= read_checkpoint(models[0]).tensors.keys()
    assert_same_model(loaded, from_files(models, [0.3, 0.7], tmp_path / "out"))
