"""A user's own merge method, through every entrance, against its formula."""

import json
import re
import subprocess
import sys

import numpy as np
import torch
from support.merges import load
from support.paths import ROOT

from merit_fast.kernels.average._eager import float64_to_bf16
from merit_fast.merge import (
    load_merged,
    merge_models,
    merge_state_dicts,
)
from merit_fast.merge.registry import unregister_method

WEIGHTS = [0.5, 0.25, 0.25]


def in_float64(path):
    return {name: tensor.double().numpy() for name, tensor in load(path).items()}


def expected(models, scale=1.0, power=2.0, weights=WEIGHTS):
    """[bits] of theta_0 + scale * power mean; ``power`` may depend on the name."""
    *branches, base = [in_float64(path) for path in models]
    results = {}
    for name, start in base.items():
        exponent = power(name) if callable(power) else power
        deltas = [branch[name] - start for branch in branches]
        total = sum(
            w * np.sign(d) * np.abs(d) ** exponent for w, d in zip(weights, deltas, strict=True)
        )
        step = np.sign(total) * np.abs(total) ** (1 / exponent)
        results[name] = float64_to_bf16(start + scale * step)
    return results


def bits_of(tensors):
    return {name: tensor.view(torch.uint16).numpy() for name, tensor in tensors.items()}


def assert_equal(tensors, wanted):
    assert tensors.keys() == wanted.keys()
    for name, bits in bits_of(tensors).items():
        assert np.array_equal(bits, wanted[name]), name


def test_merge_models_writes_the_formula(models, tmp_path):
    summary = merge_models(
        models[:3],
        WEIGHTS,
        models[3],
        out=tmp_path / "out",
        method="power_mean",
        scale=0.5,
        parameters={"power": 3.0},
    )
    assert summary["method"] == "power_mean" and summary["finished"]
    assert [number for _, number in summary["coefficients"]] == [None] * 4
    assert_equal(load(tmp_path / "out"), expected(models, scale=0.5, power=3.0))


def test_threads_chunks_and_shares_change_no_byte(models, tmp_path):
    options = {"method": "power_mean", "checksum": True}
    merge_models(models[:3], WEIGHTS, models[3], out=tmp_path / "one", threads=1, **options)
    for share in ((1, 2), (2, 2)):
        merge_models(
            models[:3],
            WEIGHTS,
            models[3],
            out=tmp_path / "two",
            threads=3,
            chunk_kib=4,
            share=share,
            **options,
        )
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_method_without_a_base_sees_the_models(models, tmp_path):
    merge_models(models[:3], out=tmp_path / "out", method="largest")
    inputs = [in_float64(path) for path in models[:3]]
    wanted = {
        name: float64_to_bf16(np.maximum.reduce([model[name] for model in inputs]))
        for name in inputs[0]
    }
    assert_equal(load(tmp_path / "out"), wanted)


def test_parameters_may_differ_from_tensor_to_tensor(models, tmp_path):
    cases = [{"filter": "mlp", "value": 1.0}, {"value": 4.0}]
    merge_models(
        models[:3],
        WEIGHTS,
        models[3],
        out=tmp_path / "out",
        method="power_mean",
        parameters={"power": cases},
    )
    wanted = expected(models, power=lambda name: 1.0 if "mlp" in name else 4.0)
    assert_equal(load(tmp_path / "out"), wanted)


def test_models_may_have_weights_of_their_own(models, tmp_path):
    settings = [{"weight": 2.0}, {"weight": 1.0}, {"weight": 1.0}]
    merge_models(
        models[:3], base=models[3], out=tmp_path / "out", method="power_mean", models=settings
    )
    assert_equal(load(tmp_path / "out"), expected(models))


def test_load_merged_and_merge_state_dicts_have_the_bits_of_the_file_merge(models):
    loaded = load_merged(models[:3], WEIGHTS, models[3], method="power_mean")
    wanted = expected(models)
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name in wanted}
    assert_equal(state, wanted)
    *states, base = [load(path) for path in models]
    assert_equal(merge_state_dicts(states, WEIGHTS, base, method="power_mean"), wanted)


def test_the_command_finds_a_method_that_a_package_offers(models, tmp_path, site):
    words = [f"--model={path}:{weight}" for path, weight in zip(models, WEIGHTS, strict=False)]
    script = "from merit_fast.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script, "merge", tmp_path / "out", *words, "--base", models[3]]
        + ["--method", "offered", "--param", "gain=0.5", "--json"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{site}:{ROOT}", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "offered"
    wanted = {name: float64_to_bf16(value) for name, value in _linear(models, 0.5).items()}
    assert_equal(load(tmp_path / "out"), wanted)
    stage = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert stage["config"]["parameters"] == {"gain": 0.5} and "method" in stage["inputs"]


def _linear(models, gain):
    *branches, base = [in_float64(path) for path in models]
    weights = np.array(WEIGHTS)
    results = {}
    for name, start in base.items():
        deltas = np.stack([(branch[name] - start).reshape(-1) for branch in branches])
        step = gain * (weights[:, None] * deltas).sum(axis=0)
        results[name] = start + step.reshape(start.shape)
    return results


def test_the_worked_example_of_the_page_runs(models, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "merge.md").read_text()
    section = page.split("## Your own method")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for path, name in zip(models, ("model-a", "model-b", "model-c", "start"), strict=True):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    try:
        space = {}
        for block in blocks:
            exec(block, space)
    finally:
        unregister_method("trimmed_mean")
    *branches, base = [in_float64(path) for path in models]
    merged = load(tmp_path / "merged")
    for name, start in base.items():
        middle = np.median([branch[name] - start for branch in branches], axis=0)
        assert np.array_equal(bits_of(merged)[name], float64_to_bf16(start + middle)), name
    assert space["model"].config.model_type == "llama"
