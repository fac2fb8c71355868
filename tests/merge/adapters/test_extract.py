"""extract-lora: the adapter loads in PEFT and gives the fine-tune back to the stated error."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.adapters.written import MODELS, load_base, merged_by_peft, write_base

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.merge.lora.extract import ExtractConfig, extract_lora
from merit_fast.merge.lora.singular import cut_matrix
from merit_fast.merge.lora.targets import TURNED_MODELS
from merit_fast.progress import SilentProgress

SAVED = ("norm", "ln_", "embed", "wte", "wpe", "lm_head")


def tuned(
    name: str, base: Path, out: Path, chosen: Callable[[str], bool], rank: int | None = None
) -> Path:
    """A fine-tune: noise on the chosen parameters, of a rank in matrices of layers."""
    model = load_base(name, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not chosen(key):
                continue
            shape = parameter.shape
            if rank and len(shape) >= 2 and not any(word in key for word in SAVED):
                factors = [
                    torch.randn(*shape[:-2], *size, generator=generator).double()
                    for size in ((shape[-2], rank), (rank, shape[-1]))
                ]
                parameter += 0.1 * factors[0] @ factors[1]
            else:
                parameter += 0.1 * torch.randn(shape, generator=generator).double()
    model.save_pretrained(out, save_original_format=False)
    return out


def extract(base: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return extract_lora(base, model, out, ExtractConfig(**options), SilentProgress())


def loss(name: str, base: Path, model: Path, adapter: Path) -> float:
    """The relative error of PEFT's merge against the fine-tune, over all parameters."""
    start, wanted = (load_base(name, path).state_dict() for path in (base, model))
    got = merged_by_peft(name, base, adapter).state_dict()
    assert got.keys() == wanted.keys()
    lost = sum(float((got[key] - wanted[key]).square().sum()) for key in wanted)
    total = sum(float((start[key] - wanted[key]).square().sum()) for key in wanted)
    return float((lost / total) ** 0.5)


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_a_fine_tune_of_low_rank_comes_back_whole(tmp_path: Path, name: str) -> None:
    base = write_base(name, tmp_path / "base", save_original_format=False)
    model = tuned(name, base, tmp_path / "tuned", lambda key: True, rank=3)
    summary = extract(base, model, tmp_path / "adapter", rank=3)
    assert summary["left_out"] == ([] if name != "gpt_oss" else summary["left_out"])
    error = loss(name, base, model, tmp_path / "adapter")
    assert error == pytest.approx(summary["error"], abs=2e-6)
    if not summary["left_out"]:
        assert error < 2e-6


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.8}])
def test_the_stated_error_is_the_one_that_peft_makes(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    base = write_base(name, tmp_path / "base", save_original_format=False)
    chosen = ("q_proj", "down_proj", "layers.1.input_layernorm")
    model = tuned(name, base, tmp_path / "tuned", lambda key: any(c in key for c in chosen))
    summary = extract(base, model, tmp_path / "adapter", **options)
    error = loss(name, base, model, tmp_path / "adapter")
    assert error == pytest.approx(summary["error"], rel=1e-4) and error > 0.1
    if "energy" in options:
        assert summary["error"] ** 2 <= 0.2
        assert summary["rank"][0] < summary["rank"][1] or name == "qwen3_moe"
    assert summary["errors"]["whole"] == 0.0


def test_energy_takes_the_least_ranks(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    model = tuned("llama", base, tmp_path / "tuned", lambda key: "q_proj" in key or "up" in key)
    extract(base, model, tmp_path / "adapter", energy=0.9)
    start, wanted = (load_base("llama", path).state_dict() for path in (base, model))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key in (key for key in factors if "lora_A" in key):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = wanted[f"{module}.weight"] - start[f"{module}.weight"]
        squares = torch.linalg.svdvals(delta).square()
        kept = squares.cumsum(0) / squares.sum()
        assert factors[key].shape[0] == int((kept < 0.9).sum()) + 1


def test_a_tied_base_with_an_untied_fine_tune_saves_the_head(tmp_path: Path) -> None:
    base = write_base("llama tied", tmp_path / "base")
    start = load_base("llama tied", base)
    config = transformers.LlamaConfig(**MODELS["llama"][2])
    model = transformers.LlamaForCausalLM(config).double()
    model.load_state_dict(start.state_dict())
    with torch.no_grad():
        model.lm_head.weight.copy_(start.model.embed_tokens.weight + 0.1)
        model.model.layers[0].self_attn.q_proj.weight[0] += 1
    model.save_pretrained(tmp_path / "tuned")
    extract(base, tmp_path / "tuned", tmp_path / "adapter", rank=1)
    merged = merged_by_peft("llama tied", base, tmp_path / "adapter").state_dict()
    for key, wanted in model.state_dict().items():
        torch.testing.assert_close(merged[key], wanted, rtol=1e-6, atol=1e-6)


def test_the_random_cut_of_a_wide_matrix_is_close_to_the_best() -> None:
    rng = np.random.default_rng(0)
    spectrum = 1.0 / np.arange(1, 401)
    left, _ = np.linalg.qr(rng.standard_normal((600, 400)))
    right, _ = np.linalg.qr(rng.standard_normal((400, 400)))
    matrix = (left * spectrum) @ right

    class Held:
        shape = matrix.shape
        times = staticmethod(lambda x: matrix @ x)
        transposed_times = staticmethod(lambda x: matrix.T @ x)
        square = staticmethod(lambda: float(np.vdot(matrix, matrix)))

    cut = cut_matrix(Held(), 16, 1)  # type: ignore[arg-type]
    best = float(np.sum(spectrum[16:] ** 2))
    lost = float(np.sum((matrix - cut.left @ cut.right) ** 2))
    assert lost == pytest.approx(cut.lost, rel=1e-6)
    assert best <= lost * (1 + 1e-12) and lost < 1.001 * best


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "rank: must be given, or energy, and not both"),
        ({"rank": 2, "energy": 0.5}, "rank: must be given, or energy, and not both"),
        ({"rank": 0}, "rank: must be at least 1"),
        ({"energy": 1.5}, "energy: must be above 0 and at most 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExtractConfig(**options)


def test_models_that_do_not_match_are_named(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    with pytest.raises(InputError, match="base: has no matrix of a layer that differs from"):
        extract(base, base, tmp_path / "out", rank=1)
    norms = tuned("llama", base, tmp_path / "norms", lambda key: "norm" in key)
    with pytest.raises(InputError, match="norms: has no matrix of a layer that differs"):
        extract(base, norms, tmp_path / "out", rank=1)
    other = write_base("qwen2", tmp_path / "other")
    with pytest.raises(InputError, match="k_proj.bias: is missing, .*other has it"):
        extract(base, other, tmp_path / "out", rank=1)
    broken = tuned("llama", base, tmp_path / "broken", lambda key: "q_proj" in key)
    model = load_base("llama", broken)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(InputError, match="model.norm.weight: must be finite here and in"):
        extract(base, broken, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="base: the output must not be one of the inputs"):
        extract(base, norms, base, rank=1)
    with pytest.raises(InputError, match="other: exists and is not an output of merit-fast"):
        extract(base, norms, other, rank=1)


def test_the_models_with_turned_layers_are_transformers_own() -> None:
    models = Path(transformers.__file__).parent / "models"
    named = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if re.search(r"pytorch_utils import .*\bConv1D\b", file.read_text())
    }
    listed = {
        name.replace("openai-gpt", "openai").removesuffix("_decoder") for name in TURNED_MODELS
    }
    assert named == listed


def test_the_command_prints_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base("llama", tmp_path / "base")
    model = tuned("llama", base, tmp_path / "tuned", lambda key: "q_proj" in key or "norm" in key)
    words = ["extract-lora", str(tmp_path / "out"), "--base", str(base), "--model", str(model)]
    monkeypatch.setattr("sys.argv", ["merit-fast", *words, "--rank", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "matrix        2 tensors, relative error" in printed
    assert "whole         5 tensors, relative error 0.000e+00" in printed
    assert "total: relative error" in printed
