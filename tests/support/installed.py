"""Checks an installed merit_fast from outside the repository: `python installed.py [FOLDER]`.

Runs `merit-fast doctor` and merges two tiny models in FOLDER (default: a temporary folder). Prints
one JSON object with the package's folder, its version and the state of the native module. Fails
unless the merge is exact and, without MERIT_FAST_NO_NATIVE, the native module is there.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import merit_fast

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SHAPES = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,)}


def write_model(folder: Path, seed: int) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def command(*words: str) -> dict[str, Any]:
    """The JSON object that the installed command prints."""
    isolation = ["-S"] if sys.flags.no_site else []
    line = [
        sys.executable,
        *isolation,
        "-c",
        "from merit_fast.cli.main import main; main()",
        *words,
        "--json",
    ]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def check(folder: Path) -> dict[str, Any]:
    first = write_model(folder / "first", seed=1)
    second = write_model(folder / "second", seed=2)
    models = ("--model", f"{folder / 'first'}:0.25", "--model", f"{folder / 'second'}:0.75")
    command("merge", str(folder / "merged"), *models)
    merged = load_file(folder / "merged" / "model.safetensors")
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        exact = 0.25 * first[name].astype(np.float64) + 0.75 * second[name].astype(np.float64)
        np.testing.assert_array_equal(tensor, exact.astype(np.float32))

    diagnosis = command("doctor")
    assert diagnosis["ops"], diagnosis
    if not os.environ.get("MERIT_FAST_NO_NATIVE"):
        assert diagnosis["native"]["built"], diagnosis["native"]
    return {
        "package": str(Path(merit_fast.__file__).parent),
        "version": version("merit_fast"),
        "native": diagnosis["native"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(check(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))))
