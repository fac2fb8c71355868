"""LoRA adapters as PEFT writes them: the tensors they change, the amount, the refusals."""

import json
import math

import numpy as np
import pytest
from support.merge.headers import pack, tensor, write_model

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.adapter import read_adapter
from merit_fast.merge.read.adapters.config import Scalings
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.adapters.on_base import put_on_base
from merit_fast.merge.read.checkpoint import read_checkpoint

PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.1.self_attn.q_proj"
EMBEDDING = f"{PREFIX}model.embed_tokens"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "init_lora_weights": True}


def pair(module, out, into, rank=2, names=("lora_A.weight", "lora_B.weight")):
    return {f"{module}.{names[0]}": (rank, into), f"{module}.{names[1]}": (out, rank)}


def write(directory, shapes, config=PLAIN, dtype="F32"):
    """An adapter of random values; ``shapes`` by the tensors' names in the file."""
    header = {}
    data = b""
    for name, shape in shapes.items():
        item = {"F32": 4, "I32": 4}[dtype]
        end = len(data) + math.prod(shape) * item
        header[name] = tensor(list(shape), len(data), end, dtype)
        data += (
            np.random.default_rng(len(data))
            .standard_normal(math.prod(shape))
            .astype("<f4")
            .tobytes()
        )
    files = {
        "adapter_model.safetensors": pack(header, data),
        "adapter_config.json": json.dumps(config).encode(),
    }
    return write_model(directory, files)


def values(entry):
    data = entry.file.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    return np.frombuffer(data, "<f4").reshape(entry.shape).astype(np.float64)


def test_tensors_are_grouped_by_module_and_use(tmp_path):
    names = ("lora_embedding_A", "lora_embedding_B")
    shapes = pair(Q, 5, 3) | pair(EMBEDDING, 3, 50, names=names)
    shapes |= {f"{EMBEDDING}.base_layer.weight": (50, 3), f"{PREFIX}score.bias": (7,)}
    shapes |= {f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": (2, 3)}
    parts = read_adapter(write(tmp_path / "a", shapes)).parts
    layers = {layer.module: layer for layer in parts.layers}
    assert set(layers) == {"model.layers.1.self_attn.q_proj", "model.embed_tokens"}
    layer = layers["model.layers.1.self_attn.q_proj"]
    assert layer.a.name == f"{Q}.lora_A.weight" and layer.b.name == f"{Q}.lora_B.weight"
    assert values(layer.b).shape == (5, 2) and values(layer.a).shape == (2, 3)
    assert not layer.is_embedding and layers["model.embed_tokens"].is_embedding
    # The whole embedding is the base's own, which PEFT saves with its factors.
    assert set(parts.whole) == {"model.embed_tokens.weight", "score.bias"}
    assert set(parts.rows) == {"lm_head"}


@pytest.mark.parametrize(
    "changes,rank,scaling",
    [
        ({}, 2, 6 / 2),
        ({"use_rslora": True, "r": 4}, 4, 6 / math.sqrt(4)),
        ({"lora_alpha": None}, 2, 8 / 2),  # PEFT's own default
        ({"rank_pattern": {"q_proj": 3}}, 3, 6 / 3),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 4}},
            3,
            6 / 3,
        ),  # the first that fits
        (
            {"rank_pattern": {"proj": 3, "model.layers.1": 4}, "alpha_pattern": {"k_proj": 1}},
            2,
            6 / 2,
        ),  # whole parts
        ({"alpha_pattern": {r"model\.layers\.[0-3]\..*q_proj": 1.5}}, 2, 1.5 / 2),
        ({"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5}}, 2, 5 / 2),
        (
            {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 10}, "use_rslora": True},
            5,
            10 / math.sqrt(5),
        ),
    ],
)
def test_rank_and_scaling_are_those_of_the_module(tmp_path, changes, rank, scaling):
    adapter = read_adapter(write(tmp_path / "a", pair(Q, 5, 3, rank), {**PLAIN, **changes}))
    scalings = Scalings(adapter.config, adapter.path / ADAPTER_CONFIG)
    assert scalings.of("model.layers.1.self_attn.q_proj") == (rank, scaling)


def refused(directory, shapes, config=PLAIN, base=None, tied=False):
    """Reads an adapter and puts it on a base of these shapes."""
    base = {"model.layers.1.self_attn.q_proj.weight": (5, 3)} if base is None else base
    header = {}
    end = 0
    for name, shape in base.items():
        start = end
        end += math.prod(shape) * 4
        header[name] = tensor(list(shape), start, end)
    files = {
        "model.safetensors": pack(header, bytes(end)),
        "config.json": json.dumps({"tie_word_embeddings": tied, "model_type": "x"}).encode(),
    }
    checkpoint = read_checkpoint(write_model(directory / "base", files))
    return put_on_base(read_adapter(write(directory / "a", shapes, config)), checkpoint)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"peft_type": "IA3"}, "peft_type: must be LORA, got 'IA3'; merge this kind with PEFT"),
        ({"use_dora": True}, "q_proj.lora_A.weight: has no lora_magnitude_vector next to it"),
        ({"bias": "some"}, "bias: must be one of none, all, lora_only, got 'some'"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: 'pissa' changes the base before training; save the adapter with "
            "path_initial_model_for_weight_conversion",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base"),
        (
            {"init_lora_weights": "new"},
            "init_lora_weights: must leave the base as it is, got 'new'",
        ),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: .* aLoRA changes only some"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: cannot be merged"),
        ({"kasa_config": {"beta": 1}}, "kasa_config: cannot be merged: KaSA"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config: chooses adapters by token"),
        ({"of the\nfuture": 1}, r"of the\\nfuture: is unknown and must be absent, got 1"),
        ({"r": 0}, "r: must be positive"),
        ({"r": "8"}, "r: must be an integer"),
        ({"r": 10**400}, r"must be below 2\^53"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be finite"),
        ({"rank_pattern": ["q"]}, "rank_pattern: must be a mapping"),
        ({"rank_pattern": {"q": -1}}, "r: must be positive"),
        ({"rank_pattern": {"a\nb": "x"}}, "a pattern must be printable"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: must be of regular expressions"),
        ({"alpha_pattern": {"((x{99}){99}){99}": 1}}, "counts of repetitions with a product"),
        ({"trainable_token_indices": [1, 1]}, "must be lists of different integers from 0 on"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "must be lists of different integers"),
        ({"r": 3}, "q_proj.lora_A.weight: must be of rank 3 by adapter_config.json, got 2"),
    ],
)
def test_configs_that_cannot_be_merged_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        refused(tmp_path, pair(Q, 5, 3), {**PLAIN, **changes})
    assert str(error.value).isprintable() and str(tmp_path / "a") in str(error.value)


def test_a_pattern_that_takes_exponential_time_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("merit_fast.merge.read.adapters.patterns._SECONDS", 0.05)
    module = f"{PREFIX}{'a' * 300}"
    config = {**PLAIN, "alpha_pattern": {"(a|aa|a.|.a)+(.*a){9}b": 1}}
    with pytest.raises(InputError, match="alpha_pattern: .* takes more than 0.05 s to match"):
        refused(tmp_path, pair(module, 5, 3), config, {f"{'a' * 300}.weight": (5, 3)})


ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    "shapes,config,message",
    [
        ({f"{Q}.lora_A.weight": (2, 3)}, {}, f"{Q}.lora_A.weight: has no lora_B next to it"),
        ({f"{Q}.lora_B.weight": (5, 2)}, {}, f"{Q}.lora_B.weight: has no lora_A next to it"),
        ({f"{Q}.lora_B.bias": (5,)}, {}, "lora_B.bias: has no lora_B next to it"),
        (
            pair(Q, 5, 3) | {f"{Q}.lora_magnitude_vector": (5,)},
            {},
            "lora_magnitude_vector: belongs to DoRA, adapter_config.json has no use_dora",
        ),
        (
            pair(Q, 5, 3) | {f"{Q}.lora_magnitude_vector": (4,)},
            {"use_dora": True},
            r"lora_magnitude_vector: must have 5 elements, got \[4\]",
        ),
        (
            pair(Q, 5, 3) | {f"{Q}.lora_B.bias": (5,)},
            {"lora_bias": True},
            r"changes model.layers.1.self_attn.q_proj.bias as a float tensor of \[5\], the",
        ),
        ({f"{Q}.lora_A.default.weight": (2, 3)}, {}, "lora_A.default.weight: is no tensor of a"),
        (pair("model.layers.0.q_proj", 5, 3), {}, f"must begin with {PREFIX}"),
        (
            {f"{Q}.lora_A.weight": (2, 3), f"{Q}.lora_B.weight": (5, 4)},
            {},
            "lora_B.weight: must be of rank 2 .* got 4",
        ),
        (
            {f"{Q}.lora_A.weight": (2, 3, 1), f"{Q}.lora_B.weight": (5, 1, 1)},
            {},
            "its convolution has 2 groups, for which no change of the weights does what LoRA does",
        ),
        (
            {f"{EMBEDDING}.base_layer.weight": (4, 3), f"{EMBEDDING}.weight": (4, 3)},
            {},
            "is no tensor of a LoRA adapter",
        ),
        (
            {f"{EMBEDDING}.weight": (4, 2)},
            {},
            r"must have the shape of model.embed_tokens.weight in .*base, \[4, 3\], got \[4, 2\]",
        ),
        (pair(f"{PREFIX}nobody", 5, 3), {}, "1 LoRA layers of nobody must change as many"),
        ({ROWS: (2, 3)}, {}, "trainable_token_indices of adapter_config.json must name the rows"),
        (
            {ROWS: (2, 3)},
            {"trainable_token_indices": [1, 2, 3]},
            "must hold a row for each of the 3 trainable_token_indices",
        ),
        (
            {ROWS: (2, 3)},
            {"trainable_token_indices": [1, 4]},
            "trainable_token_indices: must be below 4, the rows of .*, got 4",
        ),
    ],
)
def test_tensors_that_cannot_be_merged_are_named(tmp_path, shapes, config, message):
    base = {"model.layers.1.self_attn.q_proj.weight": (5, 3), "model.embed_tokens.weight": (4, 3)}
    with pytest.raises(InputError, match=message):
        refused(tmp_path, shapes, {**PLAIN, **config}, base)


def test_factors_of_integers_and_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="dtype must be one of BF16, .* got I32"):
        read_adapter(write(tmp_path / "a", pair(Q, 5, 3), dtype="I32"))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").touch()
    with pytest.raises(
        InputError, match="holds no adapter_model.safetensors; adapter_model.bin is a pickle file"
    ):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="is not an adapter: holds no adapter_config.json"):
        read_adapter(tmp_path / "a")
