"""Quantised tensors packed by hand in NumPy integers, and their values in float64."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.merge.merges import write
from torch import Tensor

Array = NDArray[np.float64]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Stored:
    """Stored tensors of a model, the values that they mean, and the model's quantization_config."""

    tensors: dict[str, Tensor]
    values: dict[str, Array]
    config: dict[str, Any] = field(default_factory=dict)


def spread(grid: Array, block: Sequence[int], shape: Sequence[int]) -> Array:
    """Each number of [..., rows, columns] over its block, cut to a shape."""
    wide = np.repeat(np.repeat(grid, block[0], -2), block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def pack_bits(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """[rows, bytes] of [rows, columns] codes; code j of a row lies at bit j * bits."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * j) for j, code in enumerate(row))
        rows.append(list(number.to_bytes(-(-len(row) * bits // 8), "little")))
    return np.array(rows, np.uint8)


def pack_words(codes: NDArray[np.integer], bits: int) -> NDArray[np.int32]:
    """[rows, words]: the same in whole 32-bit words."""
    packed = pack_bits(codes, bits)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view(np.int32)


def finite_codes(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Codes that are numbers in every 8-bit float: none is 0x80."""
    codes = rng.integers(1, 124, shape) + 128 * rng.integers(0, 2, shape)
    return torch.from_numpy(codes.astype(np.uint8))


def powers(bytes_: NDArray[np.integer]) -> Array:
    """Values of E8M0 bytes."""
    return 2.0 ** (bytes_.astype(np.float64) - 127)


def integer_model(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    *,
    zero: bool = False,
    order: bool = False,
) -> Stored:
    """compressed-tensors pack-quantized. ``group`` 0: one scale a row."""
    groups = -(-columns // group) if group else 1
    codes = rng.integers(0, 1 << bits, (rows, columns))
    scale = torch.from_numpy(rng.random((rows, groups)) + 0.1).bfloat16()
    half = 1 << (bits - 1)
    tensors = {
        "l.weight_packed": torch.from_numpy(pack_words(codes, bits)),
        "l.weight_scale": scale,
        "l.weight_shape": torch.tensor([rows, columns]),
    }
    zeros = np.zeros((rows, groups))
    if zero:
        stored = rng.integers(0, 1 << bits, (rows, groups))
        zeros = (stored - half).astype(np.float64)
        words = np.ascontiguousarray(pack_words(stored.T, bits).T)
        tensors["l.weight_zero_point"] = torch.from_numpy(words)
    place = np.arange(columns) // (group or columns)
    if order:
        place = rng.permutation(place)
        tensors["l.weight_g_idx"] = torch.from_numpy(place.astype(np.int32))
    values = (codes - half - zeros[:, place]) * scale.double().numpy()[:, place]
    weights = {"num_bits": bits, "type": "int", "group_size": group or -1}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return Stored(tensors, {"l.weight": values}, config)


def nvfp4_model(rng: np.random.Generator, rows: int, columns: int, writer: str) -> Stored:
    """NVFP4 as ModelOpt or compressed-tensors stores it."""
    codes = rng.integers(0, 16, (rows, columns))
    scale = torch.from_numpy(rng.random((rows, columns // 16)) * 300 + 1).to(torch.float8_e4m3fn)
    second = torch.tensor([float(rng.random()) + 0.5])
    packed = torch.from_numpy(pack_bits(codes, 4))
    products = E2M1[codes] * spread(scale.double().numpy(), (1, 16), codes.shape)
    if writer == "modelopt":
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": second[0]}
        tensors["input_scale"] = torch.tensor(2.0)
        values = products * second.double().item()
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    else:
        tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": second}
        values = products / second.double().item()
        config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Stored(
        {f"l.{name}": each for name, each in tensors.items()}, {"l.weight": values}, config
    )


def gpt_oss_model(rng: np.random.Generator, experts: int, rows: int, columns: int) -> Stored:
    """MXFP4 as gpt-oss stores its experts; the values are [experts, columns, rows]."""
    codes = rng.integers(0, 16, (experts, rows, columns))
    scales = rng.integers(120, 132, (experts, rows, columns // 32))
    blocks = np.stack([pack_bits(matrix, 4) for matrix in codes])
    blocks = blocks.reshape(experts, rows, columns // 32, 16)
    values = E2M1[codes] * spread(powers(scales), (1, 32), codes.shape)
    tensors = {
        "l.mlp.experts.down_proj_blocks": torch.from_numpy(blocks),
        "l.mlp.experts.down_proj_scales": torch.from_numpy(scales.astype(np.uint8)),
    }
    return Stored(
        tensors, {"l.mlp.experts.down_proj": values.swapaxes(1, 2)}, {"quant_method": "mxfp4"}
    )


def write_model(
    path: Path, stored: Stored, more: Mapping[str, Tensor] | None = None, **config: Any
) -> Path:
    """A model directory; ``more``: other tensors, ``config``: other keys of config.json."""
    write(path, stored.tensors | dict(more or {}))
    values = config | ({"quantization_config": stored.config} if stored.config else {})
    (path / "config.json").write_text(json.dumps(values))
    return path
