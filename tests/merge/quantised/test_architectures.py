"""Quantised checkpoints of real architectures have the values that transformers reads from them."""

import json

import numpy as np
import pytest
import torch
from support.merge.formats.quantised import gpt_oss_model
from support.merge.merges import load, write
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from merit_fast.merge import load_merged, merge_models


def change_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def assert_equal_models(ours, theirs):
    theirs = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def gpt_oss(tmp_path):
    """A tiny gpt-oss whose experts are MXFP4, as on the hub."""
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=64,
        layer_types=["full_attention"],
    )
    path = tmp_path / "gpt_oss"
    GptOssForCausalLM(config).bfloat16().save_pretrained(path)
    tensors = load(path)
    rng = np.random.default_rng(4)
    prefix = "model.layers.0.mlp.experts."
    for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        del tensors[prefix + name]
        stored = gpt_oss_model(rng, 3, rows, columns)
        for key, tensor in stored.tensors.items():
            tensors[prefix + name + key.removeprefix("l.mlp.experts.down_proj")] = tensor
    write(path, tensors)
    change_config(path, quantization_config={"quant_method": "mxfp4"})
    return path


def test_gpt_oss_decoded_is_what_transformers_decodes(tmp_path, gpt_oss):
    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype=torch.bfloat16)
    merge_models([gpt_oss], out=tmp_path / "out", dtype="bf16")
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), theirs)
    assert_equal_models(load_merged([gpt_oss], dtype="bf16"), theirs)


def test_gpt_oss_passes_byte_for_byte(tmp_path, gpt_oss):
    merge_models([gpt_oss], out=tmp_path / "out")
    before = load(gpt_oss)
    after = load(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_deepseek_in_blocks_decoded_is_what_transformers_decodes(tmp_path):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        vocab_size=64,
    )
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    merge_models([tmp_path / "plain"], out=tmp_path / "fp8", dtype="fp8-block128")
    names = {name for name in load(tmp_path / "fp8") if name.endswith("_scale_inv")}
    assert len([name for name in names if ".experts." in name]) == 4 * 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    merge_models([tmp_path / "fp8"], out=tmp_path / "bf16", dtype="bf16")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert_equal_models(ours, theirs)
    merge_models([tmp_path / "fp8"], out=tmp_path / "again")
    again = load(tmp_path / "again")
    before = load(tmp_path / "fp8")
    assert before.keys() == again.keys()
    for name, tensor in before.items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name
