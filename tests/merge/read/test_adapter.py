"""LoRA adapters as PEFT writes them: the tensors they change, the amount, the refusals."""

import json
import math

import numpy as np
import pytest
from support.headers import pack, tensor, write_model

from merit_fast.errors import InputError
from merit_fast.merge.read.adapter import check_tied, read_adapter
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


def test_pairs_are_found_by_the_bases_names(tmp_path):
    adapter = read_adapter(write(tmp_path / "a", pair(Q, 5, 3) | pair(f"{PREFIX}lm_head", 7, 3)))
    assert set(adapter.low_rank) == {"model.layers.1.self_attn.q_proj.weight", "lm_head.weight"}
    change = adapter.low_rank["model.layers.1.self_attn.q_proj.weight"]
    assert change.a.name == f"{Q}.lora_A.weight" and change.b.name == f"{Q}.lora_B.weight"
    assert (change.scaling, change.transposed, change.shape) == (
        3.0,
        False,
        (5, 3),
    ) and adapter.full == {}
    assert values(change.b).shape == (5, 2) and values(change.a).shape == (2, 3)


def test_an_embeddings_change_is_transposed(tmp_path):
    names = ("lora_embedding_A", "lora_embedding_B")
    shapes = pair(EMBEDDING, 3, 50, names=names) | {f"{EMBEDDING}.base_layer.weight": (50, 3)}
    adapter = read_adapter(write(tmp_path / "a", shapes))
    change = adapter.low_rank["model.embed_tokens.weight"]
    assert (
        change.transposed
        and change.shape == (50, 3)
        and (values(change.b) @ values(change.a)).T.shape == (50, 3)
    )
    assert set(adapter.full) == {
        "model.embed_tokens.weight"
    }  # the base's own, which PEFT saves with it


def test_layers_that_store_in_by_out_are_transposed(tmp_path):
    shapes = pair(f"{PREFIX}transformer.h.0.attn.c_attn", 9, 3)
    change = read_adapter(write(tmp_path / "a", shapes, {**PLAIN, "fan_in_fan_out": True})).low_rank
    assert change["transformer.h.0.attn.c_attn.weight"].shape == (3, 9)


def test_modules_to_save_are_full_tensors(tmp_path):
    shapes = pair(Q, 5, 3) | {f"{PREFIX}lm_head.weight": (7, 3), f"{PREFIX}score.bias": (7,)}
    config = {**PLAIN, "modules_to_save": ["lm_head", "score"]}
    adapter = read_adapter(write(tmp_path / "a", shapes, config))
    assert set(adapter.full) == {"lm_head.weight", "score.bias"} and len(adapter.low_rank) == 1
    assert adapter.config.modules_to_save == ("lm_head", "score")


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
    assert adapter.low_rank["model.layers.1.self_attn.q_proj.weight"].scaling == scaling


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"peft_type": "IA3"}, "peft_type: must be one of LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: must be one of False, got True"),
        ({"bias": "all"}, "bias: must be one of none, got 'all'"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: must leave the base as it is, got 'pissa'",
        ),
        ({"lora_bias": True}, "lora_bias: is not of plain LoRA, must be absent, got True"),
        ({"target_parameters": ["x"]}, "target_parameters: is not of plain LoRA"),
        ({"of the\nfuture": 1}, r"of the\\nfuture: is not of plain LoRA, must be absent, got 1"),
        ({"r": 0}, "r: must be positive"),
        ({"r": "8"}, "r: must be an integer"),
        ({"r": 10**400}, r"must be below 2\^53"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be finite"),
        ({"rank_pattern": ["q"]}, "rank_pattern: must be a mapping"),
        ({"rank_pattern": {"q": -1}}, "r: must be positive"),
        ({"rank_pattern": {"a\nb": "x"}}, "a pattern must be printable"),
        (
            {"alpha_pattern": {"(a+)+b": 1}},
            "alpha_pattern: must be of regular expressions with at most 2 repetitions",
        ),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: must be of regular expressions"),
        ({"r": 3}, "q_proj.lora_A.weight: must be of rank 3 by adapter_config.json, got 2"),
    ],
)
def test_what_is_not_plain_lora_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_adapter(write(tmp_path / "a", pair(Q, 5, 3), {**PLAIN, **changes}))
    assert str(error.value).isprintable() and str(tmp_path / "a") in str(error.value)


@pytest.mark.parametrize(
    "shapes,message",
    [
        ({f"{Q}.lora_A.weight": (2, 3)}, f"{Q}.lora_A.weight: has no {Q}.lora_B.weight next to it"),
        ({f"{Q}.lora_B.weight": (5, 2)}, f"{Q}.lora_B.weight: is no tensor of plain LoRA"),
        (
            pair(Q, 5, 3) | {f"{Q}.lora_magnitude_vector": (5,)},
            "lora_magnitude_vector: is no tensor of plain LoRA",
        ),
        (
            {f"{Q}.lora_A.default.weight": (2, 3)},
            "lora_A.default.weight: is no tensor of plain LoRA",
        ),
        (pair("model.layers.0.q_proj", 5, 3), f"must begin with {PREFIX}"),
        (
            {f"{Q}.lora_A.weight": (2, 3, 1, 1), f"{Q}.lora_B.weight": (5, 2, 1, 1)},
            "must have 2 dimensions, got",
        ),
        (
            {f"{Q}.lora_A.weight": (2, 3), f"{Q}.lora_B.weight": (5, 4)},
            "lora_B.weight: must be of rank 2 .* got 4",
        ),
        (
            {f"{EMBEDDING}.base_layer.weight": (4, 3), f"{EMBEDDING}.weight": (4, 3)},
            "is no tensor of plain LoRA",
        ),
    ],
)
def test_tensors_that_are_not_plain_lora_are_named(tmp_path, shapes, message):
    with pytest.raises(InputError, match=message):
        read_adapter(write(tmp_path / "a", shapes))


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


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_head_too_is_not_changed_alone(tmp_path, tied):
    names = ("lora_embedding_A", "lora_embedding_B")
    adapter = read_adapter(write(tmp_path / "a", pair(EMBEDDING, 3, 4, names=names)))
    files = {
        "model.safetensors": pack({"model.embed_tokens.weight": tensor([4, 3], 0, 48)}, bytes(48)),
        "config.json": json.dumps({"tie_word_embeddings": tied}).encode(),
    }
    base = read_checkpoint(write_model(tmp_path / "base", files))
    if not tied:
        check_tied(adapter, base)
        return
    with pytest.raises(InputError, match="model.embed_tokens.weight: is the head of .*base too"):
        check_tied(adapter, base)
