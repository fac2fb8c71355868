"""Writes bf16 checkpoints of Qwen2's shape (a base, four fine-tunes); reads safetensors headers.

    python -m bench.merge.checkpoints DIR [--size tiny|mini|0.5b]

The weights are random (seed 0): right for speed, memory and bits, useless as a model. Tied
embeddings, three shards.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODELS = ("base", "m0", "m1", "m2", "m3")
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Size:
    """The dimensions of a model, and the size of its shards."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_value: int
    heads: int
    shard_bytes: int


SIZES = {
    "tiny": Size(2, 64, 128, 1000, 16, 8, 110_000),
    "mini": Size(4, 896, 4864, 16384, 128, 14, 60_000_000),
    "0.5b": Size(24, 896, 4864, 151936, 128, 14, 400_000_000),  # Qwen2.5-0.5B
}


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor's bytes."""

    file: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` 16-bit elements from ``start``, as uint16."""
        return np.fromfile(self.file, np.uint16, count, offset=self.offset + 2 * start)


def layout(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files' order."""
    h = size.hidden
    f = size.intermediate
    kv = size.key_value
    layer = {
        "input_layernorm.weight": (h,),
        "mlp.down_proj.weight": (h, f),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "post_attention_layernorm.weight": (h,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, h),
        "self_attn.q_proj.bias": (h,),
        "self_attn.q_proj.weight": (h, h),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, h),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, h)}
    for number, (name, shape) in itertools.product(range(size.layers), layer.items()):
        shapes[f"model.layers.{number}.{name}"] = shape
    return {**shapes, "model.norm.weight": (h,)}


def ensure_checkpoints(root: Path, size: str) -> list[Path]:
    """The directories of ``MODELS`` under ``root/size``; writes them if they are not complete."""
    folder = root / size
    if not folder.exists():
        partial = root / f"{size}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _write_all(partial, SIZES[size])
        os.replace(partial, folder)
    return [folder / name for name in MODELS]


def read_headers(model: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in ``model``, whatever its sharding."""
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = Tensor(file, 8 + length + begin, end - begin, tuple(entry["shape"]))
    return tensors


def weight_files(*models: Path) -> list[Path]:
    """The safetensors files of the models, model by model."""
    return [file for model in models for file in sorted(model.glob("*.safetensors"))]


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds finite fp32 to bf16 (as uint16), to nearest even; keeps denormals."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16).astype(np.uint16)


def _shards(size: Size) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in layout(size).items():
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and filled + num_bytes > size.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += num_bytes
    return shards


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(folder: Path, size: Size) -> None:
    random = np.random.default_rng(0)
    shards = _shards(size)
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name in MODELS:
        (folder / name).mkdir(parents=True)
        _write_companions(folder / name, size, dict(zip(files, shards, strict=True)))
    for file, shard in zip(files, shards, strict=True):
        streams = [open(folder / name / file, "wb") for name in MODELS]  # noqa: SIM115
        for stream in streams:
            stream.write(_header(shard))
        for name, shape in shard.items():
            for values in _draw(random, name, math.prod(shape)):
                for stream, model in zip(streams, values, strict=True):
                    stream.write(round_to_bf16(model).tobytes())
        for stream in streams:
            stream.close()


def _draw(random: np.random.Generator, name: str, count: int) -> Iterator[list[np.ndarray]]:
    """The values of the base and of the fine-tunes, in pieces of 4 Mi.

    The base is N(0 or 1, 0.02); the fine-tunes take steps of N(0, 0.001) from it.
    """
    center = np.float32(1 if "norm" in name else 0)
    for start in range(0, count, 1 << 22):
        shape = min(1 << 22, count - start)
        base = random.standard_normal(shape, np.float32) * np.float32(0.02) + center
        steps = (random.standard_normal(shape, np.float32) * np.float32(0.001) for _ in MODELS[1:])
        yield [base, *(base + step for step in steps)]


def _write_companions(
    folder: Path, size: Size, shards: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    """Writes the files that tools expect next to the weights, with those of a tokenizer."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": 2,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    words = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    total = sum(2 * math.prod(shape) for shard in shards.values() for shape in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    contents = {
        "config.json": config,
        "generation_config.json": {"do_sample": False},
        "tokenizer.json": {"version": "1.0", "added_tokens": [], "model": words},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
        INDEX_FILE: {"metadata": {"total_size": total}, "weight_map": weight_map},
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    arguments = parser.parse_args()
    for model in ensure_checkpoints(arguments.directory, arguments.size):
        tensors = read_headers(model)
        files = {tensor.file for tensor in tensors.values()}
        num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
        print(f"{model}: {num_bytes // 2:,} parameters, {num_bytes:,} bytes in {len(files)} shards")


if __name__ == "__main__":
    main()
