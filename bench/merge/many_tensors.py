"""The cost per tensor: a linear merge of two mixtures of many small experts, against mergekit.

    python -m bench.merge.many_tensors DIR [--layers 52] [--rounds 3]

Every layer has 128 experts of three matrices, 391 tensors in all; the matrices are tiny, so that
the time goes into names, headers and calls. Both sides run in turn; the seconds leave out imports
and, for mergekit, a first merge of a small model.
"""

import argparse
import json
import math
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.merge import mergekit_env
from bench.merge.checkpoints import round_to_bf16, weight_files
from bench.merge.rows import ROOT
from bench.support.measure import machine, read_all

EXPERTS = 128
HIDDEN = 32
LAYERS_PER_SHARD = 8


def layer(number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer of a Mixtral."""
    start = f"model.layers.{number}."
    square = (HIDDEN, HIDDEN)
    shapes = {f"{start}self_attn.{name}_proj.weight": square for name in "qkvo"}
    shapes[f"{start}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{start}{norm}.weight"] = (HIDDEN,)
    for expert in range(EXPERTS):
        for name in ("w1", "w2", "w3"):
            shapes[f"{start}block_sparse_moe.experts.{expert}.{name}.weight"] = square
    return shapes


def write_model(folder: Path, layers: int, seed: int) -> None:
    """A bf16 checkpoint with an index and a config."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    ends = {"model.embed_tokens.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shards = [{**ends, "lm_head.weight": (64, HIDDEN)}]
    for first in range(0, layers, LAYERS_PER_SHARD):
        numbers = range(first, min(first + LAYERS_PER_SHARD, layers))
        shards.append({name: size for n in numbers for name, size in layer(n).items()})
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        values = random.standard_normal(offset // 2, np.float32) * np.float32(0.02)
        data = round_to_bf16(values).tobytes()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(layers)))


def config_of(layers: int) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "num_local_experts": EXPERTS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 64,
    }


def ensure_models(root: Path, layers: int) -> list[Path]:
    models = [root / f"many-{layers}" / f"m{seed}" for seed in range(2)]
    for seed, model in enumerate(models):
        if not (model / "config.json").exists():
            shutil.rmtree(model, ignore_errors=True)
            write_model(model, layers, seed)
    return models


def run(command: Sequence[str | Path], outputs: Sequence[Path]) -> dict[str, float]:
    """The figures that a program prints; removes the outputs first."""
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    figures: dict[str, float] = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = arguments.directory.absolute()
    models = ensure_models(root, arguments.layers)
    small = ensure_models(root, 1)
    out = root / "out"
    small_out = root / "small"
    python, words = mergekit_env.find_or_make()
    if python is None:
        raise SystemExit(words)
    recipes = [root / "small.yml", root / "many.yml"]
    for recipe, inputs in zip(recipes, (small, models), strict=True):
        recipe.write_text(mergekit_env.config("linear", inputs, [0.5, 0.5]))
    ours = [sys.executable, "-m", "bench.merge.contenders", "library", out, *models]
    theirs = [python, "-P", "-c", mergekit_env.DRIVER, recipes[0], small_out, recipes[1], out]
    walls = []
    cpus = []
    for number in range(1, arguments.rounds + 1):
        read_all(weight_files(*models))
        mine = run(ours, [out])
        other = run(theirs, [out, small_out])
        walls.append(other["inner_wall_s"] / mine["inner_wall_s"])
        cpus.append(other["inner_cpu_s"] / mine["inner_cpu_s"])
        seconds = f"{mine['inner_wall_s']:.2f} s, mergekit {other['inner_wall_s']:.2f} s"
        print(f"round {number}: {seconds}: {walls[-1]:.1f}x wall, {cpus[-1]:.1f}x CPU", flush=True)
    tensors = 391 * arguments.layers + 3
    print(f"{tensors} tensors, median {statistics.median(walls):.1f}x wall (", end="")
    print(f"{min(walls):.1f} to {max(walls):.1f}), {statistics.median(cpus):.1f}x CPU; ", end="")
    print(machine())
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(small_out, ignore_errors=True)


if __name__ == "__main__":
    main()
