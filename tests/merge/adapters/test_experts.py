"""LoRA of experts (target_parameters): nested wrappers, both layouts, old and new PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora.layer import ParamWrapper
from support.adapters.written import (
    MODELS,
    assert_merged_as_by_peft,
    write_adapter,
    write_base,
)
from support.merge.merges import merge

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.experts import TRANSPOSED_MODELS

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj"], target_parameters=BOTH, r=2, lora_alpha=5),
        dict(target_modules=[], target_parameters=BOTH[:1], r=3),
        dict(
            target_modules=[],
            target_parameters=BOTH[1:],
            r=2,
            use_rslora=True,
            rank_pattern={"layers.0.mlp.experts.down_proj": 4},
        ),
    ],
)
def test_experts_are_merged_as_by_peft(
    tmp_path: Path, name: str, config: dict[str, Any], backend: str
) -> None:
    base = write_base(name, tmp_path / "base", save_original_format=False)
    adapter = write_adapter(name, base, tmp_path / "adapter", **config)
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert_merged_as_by_peft(name, base, adapter, tmp_path / "out")


def test_a_bias_of_experts_is_a_matrix(tmp_path: Path, backend: str) -> None:
    base = write_base("gpt_oss", tmp_path / "base")
    targets = [*BOTH, "experts.gate_up_proj_bias", "experts.down_proj_bias"]
    config = dict(target_modules=[], target_parameters=targets, r=2)
    adapter = write_adapter("gpt_oss", base, tmp_path / "adapter", **config)
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert_merged_as_by_peft("gpt_oss", base, adapter, tmp_path / "out")


def square(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gives a model's experts square down projections."""
    class_name, config_name, options = MODELS[name]
    changed = options | {"intermediate_size": 24, "moe_intermediate_size": 24}
    monkeypatch.setitem(MODELS, name, (class_name, config_name, changed))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]])
def test_square_experts_are_told_by_their_siblings_or_the_model(
    tmp_path: Path, name: str, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    square(monkeypatch, name)
    base = write_base(name, tmp_path / "base", save_original_format=False)
    config = dict(target_modules=[], target_parameters=targets, r=2)
    adapter = write_adapter(name, base, tmp_path / "adapter", **config)
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert_merged_as_by_peft(name, base, adapter, tmp_path / "out")


def old_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the installed PEFT read [E, d1, d2] as [E, in, out], as PEFT up to 0.18 does."""
    known = ParamWrapper.update_layer

    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        had = getattr(base, "is_transposed", False)
        base.is_transposed = True
        known(self, *args, **kwargs)
        base.is_transposed = had

    monkeypatch.setattr(ParamWrapper, "update_layer", update_layer)


@pytest.mark.parametrize("is_square", [False, True])
def test_adapters_of_old_peft_are_read_by_shape_or_version(
    tmp_path: Path, is_square: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_square:
        square(monkeypatch, "qwen3_moe")
    base = write_base("qwen3_moe", tmp_path / "base", save_original_format=False)
    old_layout(monkeypatch)
    config = dict(target_modules=[], target_parameters=BOTH[1:], r=2)
    adapter = write_adapter("qwen3_moe", base, tmp_path / "adapter", **config)
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | {"peft_version": "0.18.0"}
    file.write_text(json.dumps(values))
    merge([adapter], [1.0], tmp_path / "out", base=base)
    assert_merged_as_by_peft("qwen3_moe", base, adapter, tmp_path / "out")
    if is_square:
        file.write_text(json.dumps(values | {"peft_version": None}))
        with pytest.raises(InputError, match="changes square experts, for which only peft_version"):
            merge([adapter], [1.0], tmp_path / "none", base=base)


def test_parameters_that_nobody_names_are_an_error(tmp_path: Path) -> None:
    base = write_base("gpt_oss", tmp_path / "base")
    config = dict(target_modules=[], target_parameters=BOTH, r=2)
    adapter = write_adapter("gpt_oss", base, tmp_path / "adapter", **config)
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | {"target_parameters": BOTH[:1]}
    file.write_text(json.dumps(values))
    message = "2 LoRA layers of model.layers.0.mlp.experts must change as many of the base's"
    with pytest.raises(InputError, match=message):
        merge([adapter], [1.0], tmp_path / "out", base=base)
    file.write_text(json.dumps(values | {"target_parameters": BOTH, "r": 3}))
    with pytest.raises(InputError, match="must change a float tensor of their shape and of the ra"):
        merge([adapter], [1.0], tmp_path / "out2", base=base)


def test_the_models_whose_experts_are_transposed_are_transformers_own(tmp_path: Path) -> None:
    """Reads the decorators of the installed transformers."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    named = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if "is_transposed=True" in file.read_text()
    }
    assert named <= set(TRANSPOSED_MODELS)
    assert {name.removesuffix("_text") for name in TRANSPOSED_MODELS} == named
