"""Merges four 7B-shaped bf16 checkpoints with the command line; prints seconds and peak memory.

    python -m bench.merge.seven_billion DIR [--keep] [--json]

DIR needs 46 GB: two checkpoints of Qwen2.5-7B's shape (random weights), two more as hard links of
them, one output. The inputs do not fit the page cache of a small machine, so this is a merge from
disk, fsync included.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HIDDEN = 3584
INTERMEDIATE = 18944
LAYERS = 28
VOCABULARY = 152064
KEY_VALUE = 512
SHARD_BYTES = 4_000_000_000


def shapes() -> dict[str, tuple[int, ...]]:
    """Qwen2.5-7B, untied: 7,615,616,512 parameters."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", KEY_VALUE), ("v", KEY_VALUE)):
            tensors[f"{block}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            tensors[f"{block}.self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{block}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        tensors[f"{block}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        tensors[f"{block}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        tensors[f"{block}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        tensors[f"{block}.input_layernorm.weight"] = (HIDDEN,)
        tensors[f"{block}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**tensors, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_checkpoint(directory: Path, seed: int) -> None:
    """Random bf16 weights of standard deviation about 0.02, drawn once per 64 MiB and repeated."""
    directory.mkdir(parents=True)
    values = np.random.default_rng(seed).standard_normal(1 << 25, dtype=np.float32) * np.float32(
        0.02
    )
    pool = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes().items():
        if (
            shards[-1]
            and sum(int(np.prod(s)) * 2 for s in shards[-1].values()) + np.prod(shape) * 2
            > SHARD_BYTES
        ):
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {}
        offset = 0
        for name, shape in shard.items():
            size = int(np.prod(shape)) * 2
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, offset, len(pool)):
                out.write(pool[: min(len(pool), offset - start)])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text("{}")


def merge(root: Path) -> dict[str, float]:
    """Runs the console script in a process of its own."""
    command: list[str | Path] = [
        Path(sys.executable).with_name("merit-fast"),
        "merge",
        root / "out",
        "--weights",
        "uniform",
        "--json",
    ]
    for k in range(4):
        command += ["--model", root / f"m{k}"]
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
    gigabytes = (result["bytes_in"] + result["bytes_out"]) / 1e9
    return {
        "wall_s": seconds,
        "peak_mib": peak_mib,
        "gb_in_and_out": gigabytes,
        "gb_per_s": gigabytes / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    root = arguments.directory / "merge-7b"
    try:
        for k in range(2):
            if not (root / f"m{k}" / "config.json").exists():
                shutil.rmtree(root / f"m{k}", ignore_errors=True)
                write_checkpoint(root / f"m{k}", seed=k)
            shutil.rmtree(root / f"m{k + 2}", ignore_errors=True)
            shutil.copytree(root / f"m{k}", root / f"m{k + 2}", copy_function=os.link)
        figures = merge(root)
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:>14}  {value:,.1f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
