"""Adapters merged without a base give an adapter that PEFT loads: the weighted sum of changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters.written import load_base, merged_by_peft, write_adapter, write_base

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.merge import merge_models

ATTENTION = ["q_proj", "v_proj"]


def deltas(name: str, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    start = load_base(name, base).state_dict()
    merged = merged_by_peft(name, base, adapter).state_dict()
    return {key: merged[key] - start[key] for key in start}


def assert_weighted_sum(
    name: str, base: Path, adapters: list[Path], weights: list[float], out: Path, tolerance: float
) -> None:
    """Checks PEFT's merge of the output against the sum of PEFT's merges of the inputs."""
    each = [deltas(name, base, adapter) for adapter in adapters]
    for key, got in deltas(name, base, out).items():
        expected = sum(w * delta[key] for w, delta in zip(weights, each, strict=True))
        assert isinstance(expected, torch.Tensor)
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got - expected).abs().max()) <= tolerance * scale, key


def written(tmp_path: Path, name: str, *configs: dict[str, Any]) -> tuple[Path, list[Path]]:
    base = write_base(name, tmp_path / "base", save_original_format=False)
    return base, [
        write_adapter(name, base, tmp_path / f"a{k}", seed=k, **config)
        for k, config in enumerate(configs)
    ]


@pytest.mark.parametrize(
    "name,configs",
    [
        ("llama", [dict(target_modules=ATTENTION, r=3, lora_alpha=7)] * 2),
        (  # other modules, ranks, patterns and scalings
            "llama",
            [
                dict(target_modules=ATTENTION, r=3, rank_pattern={"layers.0.*v_proj": 2}),
                dict(target_modules=["q_proj", "up_proj"], r=4, use_rslora=True),
                dict(
                    target_modules=["embed_tokens", "lm_head", "q_proj"],
                    r=2,
                    alpha_pattern={"lm_head": 5},
                ),
            ],
        ),
        ("gpt2", [dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)] * 2),
        ("whisper", [dict(target_modules=["conv1", "q_proj"], r=r) for r in (2, 3)]),
        (
            "qwen3_moe",
            [
                dict(
                    target_modules=["q_proj"],
                    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                    r=r,
                )
                for r in (2, 3)
            ],
        ),
    ],
)
def test_the_sum_is_exact(tmp_path: Path, name: str, configs: list[dict[str, Any]]) -> None:
    base, adapters = written(tmp_path, name, *configs)
    weights = [0.5, 0.3, 0.2] if len(configs) == 3 else [0.7, 0.3]
    summary = merge_models([*adapters], weights, out=tmp_path / "out")
    assert summary["error"] == 0.0
    assert_weighted_sum(name, base, adapters, weights, tmp_path / "out", 1e-6)


def test_weights_need_not_sum_to_one_and_scale_counts(tmp_path: Path) -> None:
    base, adapters = written(tmp_path, "llama", *[dict(target_modules=ATTENTION, r=2)] * 2)
    merge_models(
        [*adapters],
        [1.0, -0.5],
        out=tmp_path / "out",
        method="task_arithmetic",
        normalize=False,
        scale=0.8,
    )
    assert_weighted_sum("llama", base, adapters, [0.8, -0.4], tmp_path / "out", 1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "whisper"])
def test_a_cut_is_the_best_of_its_rank_and_its_error_is_told(tmp_path: Path, name: str) -> None:
    configs = {
        "llama": dict(target_modules=[*ATTENTION, "embed_tokens"], r=3),
        "qwen3_moe": dict(target_modules=[], target_parameters=["experts.down_proj"], r=3),
        "whisper": dict(target_modules=["conv1", "conv2"], r=3),
    }
    base, adapters = written(tmp_path, name, *[configs[name]] * 2)
    summary = merge_models([*adapters], [0.5, 0.5], out=tmp_path / "out", rank=4)
    assert summary["rank"] == [4, 4]
    each = [deltas(name, base, adapter) for adapter in adapters]
    got = deltas(name, base, tmp_path / "out")
    total = lost = best = 0.0
    for key, delta in got.items():
        expected = 0.5 * (each[0][key] + each[1][key])
        lost += float((delta - expected).square().sum())
        total += float(expected.square().sum())
        if expected.any():
            stack = expected if "experts" in key else expected.flatten(1)[None]
            for matrix in stack:
                best += float(torch.linalg.svdvals(matrix)[4:].square().sum())
    assert lost == pytest.approx(best, rel=1e-4)
    assert summary["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert summary["largest_error"][1] >= summary["error"]


def test_equal_factors_keep_their_dtype_and_bytes(tmp_path: Path) -> None:
    """Two bf16 adapters of one scaling and weight are stacked without rounding anything."""
    _, adapters = written(tmp_path, "llama", *[dict(target_modules=ATTENTION, r=2)] * 2)
    for adapter in adapters:
        file = adapter / "adapter_model.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    merge_models([*adapters], out=tmp_path / "out")
    first, second = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        both = torch.cat([first[name], second[name]], 0 if "lora_A" in name else 1)
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, both)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(0.5 * 8 / 2)
    merge_models([*adapters], [0.6, 0.4], out=tmp_path / "uneven")
    uneven = load_file(tmp_path / "uneven" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in uneven.values()} == {torch.float32}


def test_lacking_layers_are_told(tmp_path: Path) -> None:
    _, adapters = written(
        tmp_path,
        "llama",
        dict(target_modules=ATTENTION, r=2),
        dict(target_modules=["q_proj"], r=2),
    )
    summary = merge_models([*adapters], out=tmp_path / "out", dry_run=True)
    assert summary["lacking"] == [(str(adapters[1]), 2)]
    assert not (tmp_path / "out").exists()


def test_modules_to_save_are_averaged_where_all_have_them(tmp_path: Path) -> None:
    config = dict(target_modules=ATTENTION, r=2, modules_to_save=["lm_head"])
    base, adapters = written(tmp_path, "llama", config, config)
    merge_models([*adapters], [0.3, 0.7], out=tmp_path / "out")
    assert_weighted_sum("llama", base, adapters, [0.3, 0.7], tmp_path / "out", 1e-6)


@pytest.mark.parametrize(
    "configs,options,message",
    [
        ([{}, {}], {"method": "ties", "density": 0.5}, "method ties works on whole tensors: give"),
        ([{}, {}], {"stats": True}, "stats needs a base|merge.stats: must be absent"),
        ([{"use_dora": True}, {}], {}, "lora_magnitude_vector: the sum of such changes is no LoRA"),
        ([{"modules_to_save": ["lm_head"]}, {}], {}, "lm_head.weight: is a whole tensor, and not"),
        (
            [{"modules_to_save": ["lm_head"]}] * 2,
            {"normalize": False, "weights": [1.0, 1.0]},
            "is a whole tensor, and weights must sum to 1",
        ),
        ([{"fan_in_fan_out": True}, {}], {}, "fan_in_fan_out: must be as in"),
    ],
)
def test_sums_that_need_the_base_are_refused(
    tmp_path: Path, configs: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    full = [dict(target_modules=ATTENTION, r=2) | config for config in configs]
    _, adapters = written(tmp_path, "llama", *full)
    if "fan_in_fan_out" in configs[0]:  # PEFT corrects it when it wraps linear layers
        file = adapters[0] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | configs[0]))
    weights = options.pop("weights", None)
    with pytest.raises(InputError, match=message):
        merge_models([*adapters], weights, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases_are_refused(tmp_path: Path) -> None:
    config = dict(target_modules=["embed_tokens"], r=2)
    _, adapters = written(tmp_path, "llama", config, config)
    file = adapters[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(InputError, match="adapters of different bases cannot be joined"):
        merge_models([*adapters], out=tmp_path / "out")


def test_a_rank_goes_with_adapters_only(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    with pytest.raises(InputError, match="rank: goes with adapters without a base"):
        merge_models([base, base], out=tmp_path / "out", rank=3)


def test_the_command_prints_the_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["merit-fast", "merge", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    configs = [dict(target_modules=ATTENTION, r=2), dict(target_modules=["q_proj"], r=2)]
    _, adapters = written(tmp_path, "llama", *configs)
    models = [word for path in adapters for word in ("--model", str(path))]
    printed = command(str(tmp_path / "out"), *models)
    assert "an adapter, the linear sum of 2 adapters" in printed
    assert f"{adapters[1]} lacks 2 of the layers; it counts as zero there" in printed
    assert "exact: the ranks add up" in printed and "ranks 2 to 4" in printed
    assert "relative error" in command(str(tmp_path / "cut"), *models, "--rank", "1")
