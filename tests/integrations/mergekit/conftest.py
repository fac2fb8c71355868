"""Four models and an adapter for recipes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.merge.merges import load, write
from support.merge.recipes import SMALL
from support.tiny import make_model

from merit_fast.integrations.mergekit.recipe import read_mergekit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four models m0 .. m3 of 4 layers, an adapter on m0, and equal tokenizers."""
    root = tmp_path_factory.mktemp("mergekit")
    for k in range(4):
        model = make_model(root / f"m{k}", shard="9KB", seed=k, **SMALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(root / f"m{k}", max_shard_size="9KB")
        vocabulary = {
            "model": {"vocab": {"a": 0, "b": 1}},
            "added_tokens": [{"id": 2, "content": "<s>"}],
        }
        (root / f"m{k}" / "tokenizer.json").write_text(json.dumps(vocabulary))
    key = "base_model.model.model.layers.2.mlp.up_proj"
    pair = {f"{key}.lora_A.weight": torch.randn(2, 24), f"{key}.lora_B.weight": torch.randn(36, 2)}
    write(root / "adapter", pair, "adapter_model.safetensors")
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    return root


@pytest.fixture
def inside(folder, monkeypatch):
    """Paths in a recipe count from the current directory."""
    monkeypatch.chdir(folder)
    return [load(folder / f"m{k}") for k in range(4)]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a recipe next to m0, m1, m2 and an adapter; m2's tokenizer has another token."""
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        Path(f"m{k}").mkdir()
        vocabulary = {
            "model": {"vocab": {"a": 0, "b": 1 + k // 2}},
            "added_tokens": [{"id": 7, "content": "<s>"}],
        }
        Path(f"m{k}/tokenizer.json").write_text(json.dumps(vocabulary))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")

    def run(text, *assignments):
        Path("r.yml").write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return read_mergekit(Path("r.yml"), assignments)

    return run
