"""Stands in for a stack: moves every weight of the base, and saves what a Trainer saves.

    python fake_trainer.py BASE OUT KIND [WORD ...]

KIND: whole, crash, crash-once, nothing, untrained, other-shape, foreign-branch, adapter,
other-base, in-checkpoint. Every call appends its words to $FAKE_TRAINER_CALLS.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

EPOCHS = 3.0


def save_model(base: Path, folder: Path, shift: float, cut: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors |= load_file(file)
    for name in tensors:
        tensors[name] = np.ascontiguousarray(tensors[name] + np.float32(shift))
    if cut:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:-cut])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")


def save_adapter(base: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": np.full((2, 72), 0.1, np.float32),
        f"{stem}.lora_B.weight": np.full((72, 2), 0.1, np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def save_state(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"loss": 3.5, "step": 1}, {"loss": 2.5, "step": 2}]
    state = {"epoch": EPOCHS, "global_step": 12, "max_steps": 12, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def main(base: Path, out: Path, kind: str) -> int:
    with open(os.environ["FAKE_TRAINER_CALLS"], "a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    print("a line of the log\n 50%|#####     | 1/2\ntraining")
    checkpoint = out / "checkpoint-6"
    if kind == "crash" or (kind == "crash-once" and not checkpoint.exists()):
        save_state(checkpoint)
        (out / "checkpoint-7").mkdir()  # a kill left it without its state
        print("CUDA out of memory, or so", flush=True)
        return 3
    if kind == "nothing":
        return 0
    if kind in ("adapter", "other-base"):
        save_adapter(base if kind == "adapter" else base.parent / "other", out)
    elif kind == "in-checkpoint":
        save_model(base, out / "checkpoint-12", 0.5)
        save_state(out / "checkpoint-12")
        return 0
    else:
        shift = 0.0 if kind == "untrained" else 0.01 + 0.01 * ("merit-1" in str(out))
        save_model(base, out, shift, cut=kind == "other-shape")
    if kind == "foreign-branch":
        counts = dict.fromkeys(("num_examples", "num_target_tokens", "num_tokens", "steps"), 5)
        names = {"branch": "x", "arm": "merit", "group": 0, "datasets": [], "seed": 0}
        prints = {"base_fingerprint": "0" * 32, "start_fingerprint": "1" * 32}
        text = json.dumps({**names, **counts, **prints, "schema_version": 3})
        (out / "branch.json").write_text(text)
    save_state(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
