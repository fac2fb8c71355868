"""dtype auto: bf16 only where the machine multiplies it fast; outputs name the dtype used."""

import pytest
import torch
import yaml
from support.merge.merges import load
from support.runs import run_values

from merit_fast.merge import load_merged
from merit_fast.model import dtype as model
from merit_fast.model import load_model, settle_dtype
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

ZEN5 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
ZEN3 = "processor\t: 0\nflags\t\t: fpu avx avx2 fma\nbugs\t\t: bf16\n"
NEOVERSE = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"


@pytest.mark.parametrize(
    "text,fast",
    [
        (ZEN5, True),
        (ZEN3, False),
        (NEOVERSE, True),
        ("flags : avx512f amx_bf16", True),
        ("", False),
    ],
)
def test_the_cpu_is_known_by_its_instructions(tmp_path, text, fast):
    (tmp_path / "cpuinfo").write_text(text)
    assert model._cpu_multiplies_bf16(tmp_path / "cpuinfo") is fast
    assert not model._cpu_multiplies_bf16(tmp_path / "absent")


@pytest.mark.parametrize(
    "cpu,gpu,dtype", [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_follows_the_machine_and_what_is_asked_for_stays(
    monkeypatch, tiny_model, cpu, gpu, dtype
):
    monkeypatch.setattr(model, "_cpu_multiplies_bf16", lambda cpuinfo: cpu)
    monkeypatch.setattr(model, "_gpu_multiplies_bf16", lambda: gpu)
    assert settle_dtype("auto") == dtype
    assert [settle_dtype(d) for d in ("bf16", "fp32")] == ["bf16", "fp32"]
    loaded = load_model(str(tiny_model), "auto")
    assert next(loaded.parameters()).dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def test_outputs_say_which_dtype_made_them_and_repeat_it_elsewhere(
    monkeypatch, tmp_path, tiny_model, tiny_mixture
):
    file = tmp_path / "run.yml"
    options = {"groups": 2, "examples": 4, "proj_dim": 4096}
    made = {
        "model": str(tiny_model),
        "mixture": tiny_mixture,
        "output": str(tmp_path / "out"),
        "split": options,
    }
    file.write_text(yaml.safe_dump(made))
    monkeypatch.setattr(model, "_cpu_multiplies_bf16", lambda cpuinfo: False)
    monkeypatch.setattr(model, "_gpu_multiplies_bf16", lambda: False)
    assert Run(read_run_config(file)).sketch()
    written = tmp_path / "out" / "sketch" / "config.yml"
    config = yaml.safe_load(written.read_text())
    assert [config[stage]["dtype"] for stage in ("split", "train", "evaluate")] == ["fp32"] * 3
    monkeypatch.setattr(model, "_cpu_multiplies_bf16", lambda cpuinfo: True)
    assert not Run(read_run_config(written)).sketch()  # up to date there, too
    assert Run(read_run_config(file)).sketch()  # the same YAML means another dtype here


def test_bf16_branches_of_an_fp32_base_merge_by_every_entrance(
    monkeypatch, tmp_path, tiny_model, tiny_mixture, call
):
    """tiny_model is fp32; branches that start from it are trained and saved in bf16."""
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"] |= {"dtype": "bfloat16", "epochs": 1, "controls": {}}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    for stage in ("sketch", "split", "train"):
        getattr(Run(read_run_config(file)), stage)()
    branches = [tmp_path / f"out/branches/merit-{group}" for group in range(2)]
    dtypes = {tensor.dtype for path in branches for tensor in load(path).values()}
    assert dtypes == {torch.bfloat16}

    ties = ["merge.method=ties", "merge.density=0.5"]
    for assignments in ([], ["merge.scale=0.5"], ties):
        run = Run(read_run_config(file, assignments))
        run.preflight()
        assert run.merge()
        merged = load(tmp_path / "out/merged/merit")
        assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
        card = (tmp_path / "out/merged/merit/README.md").read_text()
        assert "bf16 (the models' own; the base is fp32 and is read as it is)" in card
        assert "| capitals |" in card and "merit-fast run config.yml" in card

    flags = ("--method", "ties", "--density", "0.5")
    code, out, err = call("merge", "again", "--run", "out", "--base", tiny_model, *flags)
    assert code == 0 and "dtype: bf16, the models' own; the base is fp32" in out, err
    again = load(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    assert "| capitals |" in (tmp_path / "again/README.md").read_text()
    loaded = load_merged(branches, base=tiny_model, method="ties", density=0.5).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())
