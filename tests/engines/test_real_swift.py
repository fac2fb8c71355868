"""ms-swift trains, in the environment that bench.train.stacks_env makes."""

import json
import os
import subprocess

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from support.stacks.real import interpreter

from merit_fast.integrations.swift import PLUGIN_FILE

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture
def swift_config(tmp_path):
    """A user's configuration: packed LoRA, which ms-swift refuses on a CPU without this plugin.

    It asks for flash attention by name; transformers' sdpa keeps packed examples apart too.
    """
    plugin = tmp_path / "on_cpu.py"
    plugin.write_text(
        "from swift.arguments import SftArguments\n"
        "def check(self):\n"
        "    self.padding_free = self.padding_free or self.packing\n"
        "SftArguments._check_padding_free = check\n"
    )
    values = {
        "external_plugins": [str(plugin)],
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "packing": True,
        "max_length": 64,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "torch_dtype": "float32",
        "fp16": False,
        "bf16": False,
        "use_cpu": True,
        "attn_impl": "sdpa",
        "logging_steps": 1,
        "report_to": ["none"],
        "enable_channel_loss": True,
        "loss_scale": "all",
    }
    file = tmp_path / "swift.yml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def swift_words(swift_config, environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    python = interpreter("swift")
    return [
        "train.engine=swift",
        f"train.engine_config={swift_config}",
        f"train.engine_python={python}",
    ]


def test_swift_trains_packed_adapters_and_they_are_merged(call, split_run, swift_words):
    code, _, error = call("train", split_run, *swift_words)
    assert code == 0, error
    for name, tokens in (("merit-0", 52), ("merit-1", 64)):
        folder = split_run.parent / "out" / "branches" / name
        branch = json.loads((folder / "branch.json").read_text())
        # ms-swift's chatml puts the line break behind an answer into the loss too.
        assert branch["num_target_tokens"] == 2 * (tokens + 16) and branch["num_examples"] == 32
        record = json.loads((folder / "engine.json").read_text())
        assert record["tokens"] == "measured in training (branch.json)"
        assert 0 < branch["steps"] < 32  # packed: fewer rows than examples
        log = (folder / "engine.log").read_text()
        assert "merit_fast: kernels: rms_norm x 5" in log
        assert all(f"loss_{dataset}" in log for dataset in branch["datasets"])
        changed = load_file(folder / "adapter_model.safetensors")
        assert all(value.any() for name, value in changed.items() if "lora_B" in name)
        losses = json.loads((folder / "losses.json").read_text())
        assert len(losses) > 1 and np.isfinite(losses).all()
    code, _, error = call("merge", split_run, *swift_words)
    assert code == 0, error


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"packin": True}, "packin: swift has no such key; did you mean packing?"),
        ({"template": None}, "ms-swift: Failed to automatically match `template_type`"),
        ({"template": "dummy"}, "template: must name the template of"),
        ({"model_type": None}, "model_type and template: ms-swift: Failed to automatically match"),
        ({"save_strategy": "no"}, "save_strategy: must be steps or epoch, got 'no'"),
    ],
)
def test_what_swift_would_guess_or_drop_ends_the_run(
    call, split_run, swift_config, swift_words, change, rule
):
    values = yaml.safe_load(swift_config.read_text()) | change
    kept = {key: value for key, value in values.items() if value is not None}
    swift_config.write_text(yaml.safe_dump(kept))
    code, _, error = call("train", split_run, *swift_words)
    assert code == 2 and rule in error, error
    assert not list((split_run.parent / "out").glob("branches/*"))


def test_swift_trains_exported_rows_with_the_plugin_and_its_losses_per_channel(
    call, split_run, environment, tmp_path, monkeypatch
):
    python = interpreter("swift")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    groups = tmp_path / "groups"
    assert call("export", split_run, "--format", "trl", "--out", groups)[0] == 0
    rows = groups / "train_0.jsonl"
    options = {
        "model": yaml.safe_load(split_run.read_text())["model"],
        "model_type": "llama",
        "template": "chatml",
        "dataset": rows,
        "columns": json.dumps({"dataset": "channel"}),
        "enable_channel_loss": "true",
        "external_plugins": PLUGIN_FILE,
        "callbacks": "merit",
        "output_dir": tmp_path / "out",
        "add_version": "false",
        "tuner_type": "full",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "torch_dtype": "float32",
        "use_cpu": "true",
        "split_dataset_ratio": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "epoch",
        "attn_impl": "sdpa",
        "use_hf": "true",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    process = subprocess.run(
        [python, "-m", "swift.cli.sft", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "merit_fast: kernels: rms_norm x 5" in process.stdout + process.stderr
    branch = json.loads((tmp_path / "out" / "branch.json").read_text())
    count = len(rows.read_text().splitlines())
    assert branch["num_examples"] == 2 * count and branch["num_target_tokens"] > 2 * count
    names = {json.loads(line)["dataset"] for line in rows.read_text().splitlines()}
    assert all(f"loss_{name}" in process.stdout + process.stderr for name in names)
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert (last / "branch.json").is_file() and (last / "model.safetensors").is_file()
