"""Adapters on models whose head is the input embedding: one matrix stays one, two become two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.adapters.written import load_base, peft_model_of, write_adapter, write_base
from support.merge.merges import load, merge

ATTENTION = ["q_proj"]
TOKENS = torch.arange(12).reshape(1, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=TOKENS).logits)


def is_tied(out: Path) -> bool:
    return bool(json.loads((out / "config.json").read_text())["tie_word_embeddings"])


@pytest.mark.parametrize(
    "config,stays_tied",
    [
        (dict(target_modules=["embed_tokens", "q_proj"]), False),
        (dict(target_modules=["lm_head", "q_proj"]), False),
        (dict(target_modules=["embed_tokens", "lm_head"]), False),
        (dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), True),
        (dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), True),
        (dict(target_modules=ATTENTION, modules_to_save=["embed_tokens"]), False),
        (dict(target_modules=ATTENTION, modules_to_save=["lm_head"]), False),
        (
            dict(
                target_modules=ATTENTION,
                modules_to_save=["embed_tokens"],
                ensure_weight_tying=True,
            ),
            True,
        ),
        (dict(target_modules=ATTENTION, trainable_token_indices=[3, 1, 50]), True),
        (
            dict(
                target_modules=ATTENTION,
                trainable_token_indices={"embed_tokens": [4, 3], "lm_head": [9]},
            ),
            False,
        ),
    ],
)
def test_the_merged_model_computes_what_the_adapted_one_does(
    tmp_path: Path, config: dict[str, Any], stays_tied: bool
) -> None:
    base = write_base("llama tied", tmp_path / "base")
    adapter = write_adapter("llama tied", base, tmp_path / "adapter", **config)
    out = tmp_path / "out"
    merge([adapter], [1.0], out, base=base)
    expected = logits(peft_model_of("llama tied", base, adapter))
    torch.testing.assert_close(logits(load_base("llama tied", out)), expected, rtol=2e-6, atol=1e-6)
    assert is_tied(out) is stays_tied
    assert ("lm_head.weight" in load(out)) is not stays_tied


def test_models_without_a_head_of_their_own_join_one_that_has(tmp_path: Path) -> None:
    """The others' head is their embedding, so the mean of heads takes theirs."""
    base = write_base("llama tied", tmp_path / "base")
    untying = write_adapter(
        "llama tied", base, tmp_path / "a", seed=1, target_modules=["embed_tokens"]
    )
    rows = write_adapter(
        "llama tied",
        base,
        tmp_path / "b",
        seed=2,
        target_modules=ATTENTION,
        trainable_token_indices=[5],
    )
    out = tmp_path / "out"
    merge([untying, rows, base], [0.5, 0.3, 0.2], out, base=base)
    start = load(base)["model.embed_tokens.weight"]
    with safe_open(rows / "adapter_model.safetensors", "pt") as opened:
        name = next(key for key in opened.keys() if "trainable_tokens" in key)  # noqa: SIM118
        new_row = opened.get_tensor(name)
    changed = start.clone()
    changed[5] = new_row[0]
    merged = load(out)
    expected = 0.5 * start + 0.3 * changed + 0.2 * start
    torch.testing.assert_close(merged["lm_head.weight"], expected, rtol=1e-12, atol=1e-12)
    assert not is_tied(out)


def test_a_model_without_a_head_keeps_its_embedding_alone(tmp_path: Path) -> None:
    base = write_base("llama tied", tmp_path / "base")
    adapter = write_adapter(
        "llama tied", base, tmp_path / "adapter", target_modules=["embed_tokens"]
    )
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (base / "config.json").write_text(json.dumps(config))
    tensors = load(base) | {"score.weight": torch.randn(2, 24, dtype=torch.float64)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert "lm_head.weight" not in load(tmp_path / "out")
