"""The cost per tensor within one file: a linear merge of two models of many tiny tensors.

    python -m bench.merge.scale.one_file DIR [--tensors 100000] [--rounds 3]

Prints CPU seconds of the library call, imports left out, and the peak memory of its process, for
half of the tensors and for all of them.
"""

import argparse
import json
import math
import shutil
import statistics
import struct
import sys
from pathlib import Path

import numpy as np

from bench.merge.checkpoints import round_to_bf16
from bench.merge.scale.many_tensors import config_of, run
from bench.support.measure import machine

SHAPE = (8, 8)
PER_LAYER = 768


def write_model(folder: Path, tensors: int, seed: int) -> Path:
    """A bf16 model of so many experts' matrices in one file, named as a Mixtral's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_bytes = 2 * math.prod(SHAPE)
    header: dict[str, object] = {}
    for i in range(tensors):
        expert = f"model.layers.{i // PER_LAYER}.block_sparse_moe.experts.{i % PER_LAYER // 3}"
        offsets = [i * num_bytes, (i + 1) * num_bytes]
        values = {"dtype": "BF16", "shape": SHAPE, "data_offsets": offsets}
        header[f"{expert}.w{i % 3 + 1}.weight"] = values
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    numbers = random.standard_normal(tensors * math.prod(SHAPE), np.float32)
    data = round_to_bf16(numbers).tobytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(config_of(-(-tensors // PER_LAYER))))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = arguments.directory.absolute() / "one-file"
    for tensors in (arguments.tensors // 2, arguments.tensors):
        models = [write_model(root / f"m{seed}", tensors, seed) for seed in range(2)]
        out = root / "out"
        command = [sys.executable, "-m", "bench.merge.contenders", "library", out, *models]
        rounds = [run(command, [out]) for _ in range(arguments.rounds)]
        seconds = statistics.median(figures["inner_cpu_s"] for figures in rounds)
        peak = max(figures["inner_peak_mib"] for figures in rounds)
        print(f"{tensors} tensors: {seconds:.2f} CPU s, {peak:.0f} MiB", flush=True)
    print(machine())
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
