"""Merges four large bf16 checkpoints from disk with the command line, fsync included.

    python -m bench.merge.from_disk DIR [--shape 7b | 3b | 1.5b] [--distinct] [--keep] [--json]

DIR needs five times the size of a model for ``--distinct`` (15 GB for 1.5b, 31 for 3b); without it
two checkpoints and hard links of them (46 GB for 7b). The weights are random. Prints seconds, peak
memory, and the rate at which the inputs were read next to the disk's own rate: the same files, out
of the page cache, read in order just before. A host below may still hold their bytes.
"""

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.merge.checkpoints import weight_files
from bench.merge.floors import MIB, read
from bench.support.measure import cached_share, drop

SHARD_BYTES = 4_000_000_000
MODELS = 4


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model of Qwen2.5's form."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    key_value: int
    is_tied: bool


SHAPES = {
    "mini": Shape(256, 512, 4, 4096, 64, True),  # for a trial
    "1.5b": Shape(1536, 8960, 28, 151936, 256, True),  # 1,543,714,304 parameters
    "3b": Shape(2048, 11008, 36, 151936, 256, True),  # 3,085,938,688 parameters
    "7b": Shape(3584, 18944, 28, 152064, 512, False),  # 7,615,616,512
}


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the files' order."""
    h = shape.hidden
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        for name, rows in (("q", h), ("k", shape.key_value), ("v", shape.key_value)):
            tensors[f"{block}.self_attn.{name}_proj.weight"] = (rows, h)
            tensors[f"{block}.self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{block}.self_attn.o_proj.weight"] = (h, h)
        tensors[f"{block}.mlp.gate_proj.weight"] = (shape.intermediate, h)
        tensors[f"{block}.mlp.up_proj.weight"] = (shape.intermediate, h)
        tensors[f"{block}.mlp.down_proj.weight"] = (h, shape.intermediate)
        tensors[f"{block}.input_layernorm.weight"] = (h,)
        tensors[f"{block}.post_attention_layernorm.weight"] = (h,)
    tensors["model.norm.weight"] = (h,)
    return tensors if shape.is_tied else {**tensors, "lm_head.weight": (shape.vocabulary, h)}


def shards_of(tensors: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors by file, each of at most 4 GB."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def write_checkpoint(directory: Path, shape: Shape, seed: int) -> None:
    """Random bf16 weights of standard deviation about 0.02, drawn once per 64 MiB and repeated."""
    directory.mkdir(parents=True)
    values = np.random.default_rng(seed).standard_normal(1 << 25, dtype=np.float32) * np.float32(
        0.02
    )
    pool = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards = shards_of(tensors_of(shape))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {}
        offset = 0
        for name, dims in shard.items():
            end = offset + 2 * math.prod(dims)
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
            offset = end
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, offset, len(pool)):
                out.write(pool[: min(len(pool), offset - start)])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text("{}")


def make_models(root: Path, shape: Shape, is_distinct: bool) -> list[Path]:
    """Four models; without ``is_distinct`` the last two are links of the first two."""
    models = [root / f"m{k}" for k in range(MODELS)]
    made = models if is_distinct else models[:2]
    for seed, model in enumerate(made):
        if not (model / "config.json").exists():
            shutil.rmtree(model, ignore_errors=True)
            write_checkpoint(model, shape, seed)
    for model, other in zip(models[len(made) :], made, strict=False):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(other, model, copy_function=os.link)
    return models


def disk_rate(root: Path, models: list[Path], is_distinct: bool) -> float:
    """GB/s at which two threads read every byte of the models on the disk, in order, 8 MiB each."""
    files = weight_files(*(models if is_distinct else models[:2]))
    os.sync()
    drop(files)
    seconds = read(root / "unused", 0, models if is_distinct else models[:2], 8 * MIB, 2)
    return sum(file.stat().st_size for file in files) / 1e9 / seconds["inner_wall_s"]


def merge(root: Path, models: list[Path]) -> dict[str, float]:
    """Runs the console script in a process of its own; the inputs are out of the page cache."""
    files = weight_files(*models)
    os.sync()
    drop(files)
    cached = cached_share(files)
    command: list[str | Path] = [
        Path(sys.executable).with_name("merit-fast"),
        "merge",
        root / "out",
        "--weights",
        "uniform",
        "--json",
    ]
    for model in models:
        command += ["--model", model]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_mib = 0.0
    # VmHWM belongs to the command; ru_maxrss would count this process before exec
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmHWM:" in status:
            peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.returncode)
    assert process.stdout is not None
    result = json.loads(process.stdout.read())
    return {
        "wall_s": seconds,
        "peak_mib": peak_mib,
        "gb_in": result["bytes_in"] / 1e9,
        "gb_out": result["bytes_out"] / 1e9,
        "gb_read_per_s": result["bytes_in"] / 1e9 / seconds,
        "cached_share": cached or 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--distinct", action="store_true", help="four files of their own")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    root = arguments.directory / f"merge-{arguments.shape}"
    try:
        models = make_models(root, SHAPES[arguments.shape], arguments.distinct)
        disk = disk_rate(root, models, arguments.distinct)
        figures = {**merge(root, models), "disk_gb_per_s": disk}
        figures["of_disk_rate"] = figures["gb_read_per_s"] / disk
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:>14}  {value:,.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
