"""axolotl and LLaMA-Factory train, in environments that bench.train.stacks_env makes."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from support.docs.pages import ROOT, blocks_of
from support.stacks.real import interpreter

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture
def axolotl_config(tmp_path):
    """The page's keys, with what a CPU needs."""
    page = ROOT / "docs" / "integrations" / "axolotl.md"
    block = next(block for block in blocks_of(page) if "MeritPlugin" in block.code)
    values = yaml.safe_load(block.code) | {
        "sequence_len": 128,
        "chat_template": "tokenizer_default",
        "num_epochs": 2,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "sample_packing": True,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "logging_steps": 1,
        **dict.fromkeys(("bf16", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
    }
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_axolotl_trains_packed_adapters_with_the_plugin(
    call, split_run, axolotl_config, environment
):
    python = interpreter("axolotl")
    words = [
        "train.engine=axolotl",
        f"train.engine_config={axolotl_config}",
        f"train.engine_python={python}",
    ]
    code, _, error = call("train", split_run, *words)
    assert code == 0, error
    for name, tokens in (("merit-0", 52), ("merit-1", 64)):
        folder = split_run.parent / "out" / "branches" / name
        branch = json.loads((folder / "branch.json").read_text())
        assert branch["num_target_tokens"] == 2 * tokens and branch["num_examples"] == 32
        record = json.loads((folder / "engine.json").read_text())
        assert record["tokens"] == "measured in training (branch.json)"
        log = (folder / "engine.log").read_text()
        assert "merit_fast: the plugin is registered in axolotl" in log
        assert "merit_fast: kernels: rms_norm x 5" in log
        own = re.findall(r"'tokens/trainable': (\d+)", log)  # axolotl's own count at its last log
        assert own and int(own[-1]) == branch["num_target_tokens"]
        losses = json.loads((folder / "losses.json").read_text())
        assert len(losses) > 1 and np.isfinite(losses).all()
        changed = load_file(folder / "adapter_model.safetensors")
        assert all(value.any() for name, value in changed.items() if "lora_B" in name)  # trained
        assert not (folder / "config.json").exists()
    code, _, error = call("merge", split_run, *words)
    assert code == 0, error


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"merit_kernel": "auto"}, "merit_kernel: axolotl has no such key; did you mean"),
        ({"sample_packin": True}, "sample_packin: axolotl has no such key; did you mean"),
    ],
)
def test_keys_that_nobody_reads_end_the_run(
    call, split_run, axolotl_config, environment, change, rule
):
    python = interpreter("axolotl")
    values = yaml.safe_load(axolotl_config.read_text()) | change
    axolotl_config.write_text(yaml.safe_dump(values))
    words = ["train.engine=axolotl", f"train.engine_config={axolotl_config}"]
    code, _, error = call("train", split_run, *words, f"train.engine_python={python}")
    assert code == 2 and rule in error, error


def test_axolotl_alone_refuses_a_misspelt_key_of_ours(axolotl_config, environment, tmp_path):
    script = "import sys, yaml; from axolotl.cli.config import load_cfg; load_cfg(sys.argv[1])"
    values = yaml.safe_load(axolotl_config.read_text())
    values |= {"merit_optimiser": {}, "base_model": "x", "output_dir": str(tmp_path / "out")}
    axolotl_config.write_text(yaml.safe_dump(values))
    process = subprocess.run(
        [interpreter("axolotl"), "-c", script, axolotl_config],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode and "merit_optimiser: unknown key" in process.stderr


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_axolotl_tells_losses_per_dataset(call, split_run, axolotl_config, environment, packed):
    python = interpreter("axolotl")
    values = yaml.safe_load(axolotl_config.read_text())
    values |= {"merit_losses": True, "sample_packing": packed, "learning_rate": 0.0}
    values |= {"num_epochs": 1, "seed": 1, "merit_column": "dataset"}
    del values["merit_datasets"], values["merit_optimizer"]
    axolotl_config.write_text(yaml.safe_dump(values))
    words = ["train.engine=axolotl", f"train.engine_config={axolotl_config}"]
    code, _, error = call("train", split_run, *words, f"train.engine_python={python}")
    assert code == 0, error
    for name in ("merit-0", "merit-1"):
        folder = split_run.parent / "out" / "branches" / name
        branch = json.loads((folder / "branch.json").read_text())
        counts = json.loads((folder / "dataset_counts.json").read_text())["datasets"]
        assert set(counts) == set(branch["datasets"])
        targets = [each["num_target_tokens"] for each in counts.values()]
        assert sum(targets) == branch["num_target_tokens"]
        assert {each["num_examples"] for each in counts.values()} == {8}
        losses = json.loads((folder / "losses.json").read_text())
        mean = sum(each["loss_sum"] for each in counts.values()) / sum(targets)
        assert mean == pytest.approx(np.mean(losses), rel=0.05)
        log = (folder / "engine.log").read_text()
        assert all(f"merit/loss/{dataset}" in log for dataset in counts)


def test_axolotl_runs_our_commands_as_its_own(environment, tmp_path, monkeypatch):
    """The entry point is read from pyproject.toml, as an install writes it."""
    python = interpreter("axolotl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "merit_fast-99.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: merit_fast\nVersion: 99\n")
    points = project["entry-points"]["axolotl.cli_commands"]
    lines = [f"{name} = {target}\n" for name, target in points.items()]
    (folder / "entry_points.txt").write_text("[axolotl.cli_commands]\n" + "".join(lines))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    def axolotl(*words):
        command = [python, "-m", "axolotl.cli.main", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert "merit-fast" in axolotl("--help").stdout
    version = axolotl("merit-fast", "--version")
    assert version.returncode == 0 and "merit-fast 0." in version.stdout
    refused = axolotl("merit-fast", "merge", tmp_path / "out", "--model", tmp_path / "absent")
    assert refused.returncode == 2 and "absent" in refused.stderr
    assert "--weights" in axolotl("merit-fast", "merge", "--help").stdout


def test_llamafactory_trains_branches_and_counts_by_the_launcher(
    call, split_run, environment, tmp_path
):
    python = interpreter("llamafactory")
    words = ["train.engine=llamafactory", f"train.engine_python={python}"]
    code, _, error = call("train", split_run, *words)
    assert code == 0, error
    branch = json.loads((split_run.parent / "out/branches/merit-0/branch.json").read_text())
    assert branch["num_target_tokens"] == 3 * 52 and branch["num_examples"] == 3 * 16
    out = tmp_path / "groups"
    assert call("export", split_run, "--format", "llamafactory", "--out", out)[0] == 0
    config = yaml.safe_load((out / "llamafactory_1.yml").read_text()) | {"bf16": False}
    (out / "llamafactory_1.yml").write_text(yaml.safe_dump(config))
    module = "merit_fast.integrations.llamafactory"
    process = subprocess.run(
        [python, "-m", module, out / "llamafactory_1.yml"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "merit_fast: kernels: rms_norm x 5" in process.stdout
    counted = json.loads(Path(config["output_dir"], "branch.json").read_text())
    # LLaMA-Factory's own template puts the line break behind each answer into the loss too.
    assert counted["num_examples"] == 48
    assert counted["num_target_tokens"] == 3 * 64 + 48
