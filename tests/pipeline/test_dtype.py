"""dtype auto: bf16 only where the machine multiplies it fast; outputs name the dtype used."""

import pytest
import torch
import yaml

from merit_fast import model
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
