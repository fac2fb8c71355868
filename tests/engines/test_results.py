"""An engine takes whole checkpoints and their counts from a stack, and keeps rivals out."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support.paths import ROOT

from merit_fast.engines.files import COUNTS_FILES, last_checkpoint
from merit_fast.engines.options import minimal_keys
from merit_fast.engines.process import only_stack, run_logged
from merit_fast.engines.tokens import trained_of
from merit_fast.errors import MeritFastError
from merit_fast.integrations.per_dataset.sums import COUNTS_FILE as OF_DATASETS
from merit_fast.integrations.stacks.counts import COUNTS_FILE as OF_STACKS
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.config import TrainConfig

GROUP = SimpleNamespace(num_examples=10, num_tokens=100, num_target_tokens=50)


def checkpoint(out, step, *files):
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", *files):
        (folder / name).write_text(json.dumps({"epoch": 1.0, "global_step": step}))
    return folder


def put_branch(folder, steps):
    counts = {"num_examples": 7, "num_target_tokens": 70, "num_tokens": 90, "steps": steps}
    names = {"branch": "x", "arm": "merit", "group": 0, "datasets": [], "seed": 0}
    prints = {"base_fingerprint": "0" * 32, "start_fingerprint": "1" * 32}
    text = json.dumps({**names, **counts, **prints, "schema_version": 3})
    (folder / "branch.json").write_text(text)


def test_a_checkpoint_that_lacks_the_counts_of_the_others_is_not_whole(tmp_path):
    assert set(COUNTS_FILES) == {OF_DATASETS, OF_STACKS}
    assert last_checkpoint(tmp_path / "none") is None
    for name in COUNTS_FILES:
        out = tmp_path / name
        first = checkpoint(out, 2)
        assert last_checkpoint(out) == first  # no callback counts
        second = checkpoint(out, 4, name)
        checkpoint(out, 10)  # killed before the callback wrote
        assert last_checkpoint(out) == second


def test_the_counts_of_an_earlier_checkpoint_are_not_those_of_the_model(tmp_path):
    folder = checkpoint(tmp_path, 4)
    put_branch(folder, 4)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 2.0, "global_step": 9}))
    found = trained_of(tmp_path, GROUP, 3.0, "1" * 32)
    assert (found.num_target_tokens, found.steps) == (100, 9)
    assert found.source == "of the rows, times 2 epochs of trainer_state.json"
    put_branch(tmp_path, 9)
    assert trained_of(tmp_path, GROUP, 3.0, "1" * 32).num_target_tokens == 70
    (tmp_path / "branch.json").unlink()
    (tmp_path / "trainer_state.json").unlink()  # the model is the checkpoint's
    assert trained_of(tmp_path, GROUP, 3.0, "1" * 32).num_target_tokens == 70


ORPHANED = """
import sys
from pathlib import Path
from merit_fast.engines.process import only_stack, run_logged
folder = Path(sys.argv[1])
with only_stack(folder) as lock:
    run_logged([sys.executable, "-c", "import time; time.sleep(120)"], folder / "log", lock)
"""


@pytest.mark.process
def test_a_stack_that_outlives_a_killed_run_keeps_others_out(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", ORPHANED, str(tmp_path)], env=environment)
    lock = tmp_path / "engine.lock"
    log = tmp_path / "second.log"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    stack = int(lock.read_text())
    run.kill()
    run.wait()
    try:
        rule = f"process {stack} still trains here"
        with pytest.raises(MeritFastError, match=rule), only_stack(tmp_path):
            pass
    finally:
        os.killpg(stack, signal.SIGKILL)
    while True:
        try:
            with only_stack(tmp_path) as free:
                assert run_logged([sys.executable, "-c", "raise SystemExit(3)"], log, free) == 3
            return
        except MeritFastError:  # the kernel still ends the stack
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_every_stack_gets_an_adapter_under_its_own_names():
    adapter = {"kind": "dora", "rank": 4, "alpha": 8, "targets": ("q_proj", "down_proj")}
    for engine, expected in {
        "trl": {
            "use_peft": True,
            "lora_target_modules": ["q_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": False,
        },
        "axolotl": {"adapter": "lora", "lora_target_modules": ["q_proj", "down_proj"]},
        "llamafactory": {"finetuning_type": "lora", "lora_target": "q_proj,down_proj"},
        "swift": {"tuner_type": "lora", "target_modules": ["q_proj", "down_proj"]},
    }.items():
        recipe = TrainConfig(engine=engine, adapter=AdapterConfig(**adapter))
        keys = minimal_keys(recipe)
        assert {key: keys[key] for key in expected} == expected
        assert keys["lora_alpha"] == 8 and 4 in (keys.get("lora_r"), keys.get("lora_rank"))
