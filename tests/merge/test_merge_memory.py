"""Models merged while they are loaded: what the file merge would write, bit for bit; what is wrong is named."""

import json
import shutil

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.merges import METHODS, WEIGHTS, config_of, load, write
from support.tiny import make_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from merit_fast.errors import InputError, MeritFastError
from merit_fast.merge import merge_models
from merit_fast.merge.engine import opened as files
from merit_fast.merge.in_memory.state_dicts import _checked_device, load_merged
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.progress import SilentProgress

SOME = [METHODS[k] for k in (0, 2, 7, 9)]


def assert_same_model(loaded, expected):
    """Class, every parameter and buffer bit for bit, what is tied, mode and generation options."""
    assert type(loaded) is type(expected) and not loaded.training
    mine, theirs = loaded.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert loaded.config.dtype == expected.config.dtype


def from_files(models, weights, out, base=None, /, **options):
    """What the command line would write, read back."""
    config = config_of(options if weights is None else {**options, "weights": weights})
    merge_models([(model, None) for model in models], out, config, SilentProgress(), base)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


def name_of(options):
    return options["method"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two untied fp32 Llamas in one file each."""
    root = tmp_path_factory.mktemp("pair")
    for k in range(2):
        make_model(root / f"m{k}", shard="1GB", seed=10 + k, tie_word_embeddings=False)
    return [root / f"m{k}" for k in range(2)]


def copied(model, path, change):
    """A copy of a one-file model after ``change`` of its tensors."""
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_a_tied_llama_has_the_bits_of_the_file_merge(branches, tmp_path, dtype):
    loaded = load_merged(branches, WEIGHTS, dtype=dtype)
    assert_same_model(loaded, from_files(branches, WEIGHTS, tmp_path / "out", dtype=dtype))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("options", METHODS, ids=name_of)
def test_every_method_has_the_bits_of_the_file_merge(branches, tmp_path, options):
    weights = None if options["method"] in ("sce", "slerp", "model_stock") else [3, 1]
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
    weight, half = (
        twice.model.layers[0].mlp.up_proj.weight,
        uniform.model.layers[0].mlp.up_proj.weight,
    )
    assert torch.equal(weight, 2 * half)
    with pytest.raises(InputError, match="b0: has no branch.json to take its tokens from"):
        load_merged(branches[:2])


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


def change_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "options,tied", [({}, True), ({"method": "dare_linear", "density": 0.5}, False)]
)
def test_a_head_that_comes_to_differ_from_its_embedding_is_kept(pair, tmp_path, options, tied):
    """dare's choices depend on the tensor's name, so a tied pair that the files hold twice comes apart."""

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
            "^load_merged: weights: must be one of tokens, samples, uniform, fit or a list, got 'unifrm'",
        ),
        ({"weights": [1.0]}, "weights: must list 2 numbers, got 1"),
        (
            {"weights": [1, 1], "method": "slerp"},
            "^load_merged: weights: must be absent: method slerp takes no weights",
        ),
        ({"checksum": True}, "^load_merged: checksum: concerns an output's files, must be absent"),
        ({"dtype": "int8"}, "^load_merged: dtype: must be one of bf16, fp16, fp32, got 'int8'"),
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


def test_nothing_is_written_beside_the_models(branches, tmp_path, monkeypatch):
    root = tmp_path / "models"
    for k in range(2):
        shutil.copytree(branches[k], root / f"b{k}")
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    load_merged([root / "b0", str(root / "b1")], [0.5, 0.5])
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before


def test_generation_options_come_along(pair, tmp_path):
    model = shutil.copytree(pair[0], tmp_path / "a")
    (model / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "do_sample": True})
    )
    assert load_merged([model, pair[1]], "uniform").generation_config.temperature == 0.25


def test_models_are_loaded_from_a_store(branches):
    store = fsspec.filesystem("memory")
    for model in branches[:2]:
        store.put(str(model), f"/store/{model.name}", recursive=True)
    loaded = load_merged(
        ["memory://store/b0", "memory://store/b1"],
        [3, 1],
        method="ties",
        density=0.4,
        base=branches[3],
    )
    assert_same_model(
        loaded, load_merged(branches[:2], [3, 1], method="ties", density=0.4, base=branches[3])
    )


def test_threads_and_chunks_leave_no_trace(branches):
    for options in SOME:
        base = branches[3]
        expected = load_merged(branches[:2], "uniform", base=base, threads=1, **options)
        loaded = load_merged(branches[:2], "uniform", base=base, threads=3, chunk_kib=4, **options)
        assert_same_model(loaded, expected)


def test_a_class_that_needs_other_tensors_is_named(pair, tmp_path):
    models = [tmp_path / "a", tmp_path / "b"]
    for model, source in zip(models, pair, strict=True):
        copied(source, model, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(
        InputError, match=r"a: model.norm.weight: is missing, LlamaForCausalLM needs it$"
    ):
        load_merged(models, [0.5, 0.5])
    for model, source in zip(models, pair, strict=True):
        shutil.rmtree(model)
        copied(source, model, lambda tensors: tensors.update(extra=torch.ones(3)))
    with pytest.raises(InputError, match=r"a: extra: is not in LlamaForCausalLM$"):
        load_merged(models, [0.5, 0.5])


def test_a_config_of_another_shape_or_class_is_named(pair, tmp_path):
    models = [tmp_path / "a", tmp_path / "b"]
    for model, source in zip(models, pair, strict=True):
        shutil.copytree(source, model)
        change_config(model, intermediate_size=99)
    with pytest.raises(
        InputError, match=r"mlp.down_proj.weight: shape must be \[72, 99\] by config.json, got"
    ):
        load_merged(models, [0.5, 0.5])
    change_config(models[0], architectures=["Nothing"])
    with pytest.raises(
        InputError,
        match="config.json: architectures: must name a model of transformers, got Nothing",
    ):
        load_merged(models, [0.5, 0.5])
    (models[0] / "config.json").unlink()
    with pytest.raises(InputError, match="has no config that transformers can read"):
        load_merged(models, [0.5, 0.5])


def test_models_that_disagree_are_refused_before_anything_is_read(pair, tmp_path):
    short = copied(pair[1], tmp_path / "short", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match="lm_head.weight: is missing"):
        load_merged([pair[0], short], [0.5, 0.5])
    with pytest.raises(InputError, match="needs a base"):
        load_merged(pair, [0.5, 0.5], scale=2.0)
    with pytest.raises(InputError, match="is not a directory"):
        load_merged([pair[0], tmp_path / "none"], [0.5, 0.5])


def test_a_value_that_is_not_finite_is_named_and_can_be_allowed(pair, tmp_path):
    def spoil(tensors):
        tensors["model.norm.weight"][5] = float("nan")

    bad = copied(pair[1], tmp_path / "bad", spoil)
    with pytest.raises(
        InputError, match=r"bad/model.safetensors: model.norm.weight: must be finite, holds NaN"
    ):
        load_merged([pair[0], bad], [0.5, 0.5])
    loaded = load_merged([pair[0], bad], [0.5, 0.5], allow_nonfinite=True)
    assert loaded.model.norm.weight.isnan().nonzero().tolist() == [[5]]
    with pytest.raises(InputError, match="the result overflows F16"):
        load_merged(pair, [1e6, 1e6], dtype="fp16", normalize=False)


def test_a_read_that_fails_is_named_by_its_file(pair, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setenv("MERIT_FAST_BACKEND", "eager")
    monkeypatch.setattr(files.os, "pread", broken)
    with pytest.raises(MeritFastError, match=r"m0/model.safetensors: \S+: Input/output error$"):
        load_merged(pair, [0.5, 0.5])


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(InputError, match="device: .*nowhere"):
        _checked_device("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match="device: must be there, got 'cuda' where torch finds no GPU"
        ):
            _checked_device("cuda")
