"""Every form of LoRA that PEFT writes gives the weights of PEFT's own merge."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.adapters.written import assert_merged_as_by_peft, write_adapter, write_base
from support.merge.merges import load, merge

ATTENTION = ["q_proj", "v_proj"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", dict(target_modules=ATTENTION, r=3, lora_alpha=7)),
    "rank-stabilised, patterns of three repetitions": (
        "llama",
        dict(
            target_modules="all-linear",
            r=4,
            use_rslora=True,
            rank_pattern={r".*layers.*0.*k_proj": 2, "mlp.up_proj": 5},
            alpha_pattern={"^model.layers.1.self_attn.q_proj": 3},
        ),
    ),
    "layers_to_transform": (
        "llama",
        dict(target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layers"),
    ),
    "dora": ("llama", dict(target_modules="all-linear", use_dora=True, r=3)),
    "dora of embeddings": (
        "llama",
        dict(target_modules=["embed_tokens", "q_proj"], use_dora=True, r=3),
    ),
    "dora in by out": ("gpt2", dict(target_modules=["c_attn", "c_fc"], use_dora=True)),
    "in by out, square too": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"])),
    "every bias": ("qwen2", dict(target_modules=ATTENTION, bias="all")),
    "biases of the layers": ("qwen2", dict(target_modules=ATTENTION, bias="lora_only")),
    "lora_bias": ("qwen2", dict(target_modules=ATTENTION, lora_bias=True)),
    "embeddings and head": (
        "llama",
        dict(target_modules=["embed_tokens", "lm_head", "q_proj"], r=3),
    ),
    "modules_to_save": (
        "llama",
        dict(target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),
    ),
    "trained tokens": (
        "llama",
        dict(target_modules=ATTENTION, trainable_token_indices=[7, 0, 52]),
    ),
    "trained tokens of two modules": (
        "llama",
        dict(
            target_modules=ATTENTION,
            trainable_token_indices={"embed_tokens": [4, 3], "lm_head": [9]},
        ),
    ),
    "trained tokens, tied": (
        "llama tied",
        dict(target_modules=ATTENTION, trainable_token_indices=[7, 0, 52]),
    ),
    "convolutions": ("whisper", dict(target_modules=["conv1", "conv2", "q_proj"], r=3)),
    "convolutions, dora": (
        "whisper",
        dict(target_modules=["conv1", "conv2", "q_proj"], r=3, use_dora=True),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_merged_as_by_peft(tmp_path: Path, form: str, backend: str) -> None:
    name, config = FORMS[form]
    base = write_base(name, tmp_path / "base")
    adapter = write_adapter(name, base, tmp_path / "adapter", **config)
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert_merged_as_by_peft(name, base, adapter, tmp_path / "out")


class Attention(torch.nn.Module):
    """Layers that transformers' language models do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.cube = torch.nn.Conv3d(3, 4, (1, 2, 2))
        self.plane = torch.nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.attn(x, x, x, need_weights=False)
        return torch.as_tensor(out)


@pytest.mark.parametrize("targets", [["attn"], ["cube", "plane"]])
def test_torchs_own_modules_are_merged_as_by_peft(tmp_path: Path, targets: list[str]) -> None:
    start = Attention().double()
    (tmp_path / "base").mkdir()
    save_file(start.state_dict(), tmp_path / "base" / "model.safetensors")
    wrapped = get_peft_model(copy.deepcopy(start), LoraConfig(target_modules=targets, r=2))
    wrapped = wrapped.double().eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    merge([tmp_path / "adapter"], [1.0], tmp_path / "out", base=tmp_path / "base")
    x = torch.randn(2, 5, 8).double()
    adapted = wrapped(x)
    merged = Attention().double().eval()
    merged.load_state_dict(load(tmp_path / "out"))
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-6)
    for key, expected in wrapped.merge_and_unload().state_dict().items():
        error = (merged.state_dict()[key] - expected).abs().max()
        assert error <= 1e-6 * expected.abs().max(), key
