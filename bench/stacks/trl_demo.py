"""The demo's mixture, split, then trained by TRL in two packed LoRA branches of SmolLM2-135M.

    python -m bench.stacks.trl_demo DIR [--steps 20]

After sketch and split three commands do the rest: train, merge and evaluate. Prints the steps and
target tokens of each branch, the held-out losses of the base, the branches and the merge, and wall
and CPU seconds of each command. DIR is empty, or of an earlier call, which is taken up again. Needs
the demo extra, trl and peft.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench.support.measure import machine
from merit_fast.demo import write_demo

GROUPS = 2


def trl_keys(steps: int) -> dict[str, Any]:
    """Keys of ``trl sft``: steps of two packed rows."""
    return {
        "learning_rate": 1.0e-3,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "packing": True,
        "max_length": 256,
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": "all-linear",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
    }


def run(command: str, *words: str) -> dict[str, float]:
    """Runs a command of merit-fast to its end; returns its wall and CPU seconds."""
    before = os.times()
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "merit_fast", command, *words], check=True)
    after = os.times()
    cpu = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return {"wall_s": round(time.perf_counter() - began, 1), "cpu_s": round(cpu, 1)}


def branches_of(output: Path) -> list[dict[str, Any]]:
    """Counts of each branch, and its first and last logged loss."""
    found = []
    for number in range(GROUPS):
        folder = output / "branches" / f"merit-{number}"
        branch = json.loads((folder / "branch.json").read_text())
        losses = json.loads((folder / "losses.json").read_text())
        names = ("branch", "datasets", "num_examples", "num_target_tokens", "steps")
        found.append({name: branch[name] for name in names} | {"losses": [losses[0], losses[-1]]})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.stacks.trl_demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a branch")
    options = parser.parse_args(arguments)
    folder = options.directory.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = write_demo(folder, quick=True)
    keys = folder / "trl.yml"
    keys.write_text(yaml.safe_dump(trl_keys(options.steps), sort_keys=False))
    words = [
        str(config),
        "train.engine=trl",
        f"train.engine_config={keys}",
        "train.controls={joint: false}",
    ]
    commands = ("sketch", "split", "train", "merge", "evaluate")
    seconds = {command: run(command, *words) for command in commands}
    report: dict[str, Any] = {**machine(), "steps": options.steps, "seconds": seconds}
    report["branches"] = branches_of(folder)
    measured = json.loads((folder / "evaluate" / "evaluate.json").read_text())["arms"]
    report["held_out_losses"] = {name: arm["loss"] for name, arm in measured.items()}
    for branch in report["branches"]:
        print(branch)
    for name, loss in report["held_out_losses"].items():
        print(f"{name:12} {loss:.4f}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
