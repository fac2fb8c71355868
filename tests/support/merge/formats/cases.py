"""One model of every quantised form, with the values that it means."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from support.merge.formats.quantised import (
    E2M1,
    Stored,
    finite_codes,
    gpt_oss_model,
    integer_model,
    nvfp4_model,
    pack_bits,
    powers,
    spread,
)
from torch import Tensor


def fp8_model(
    shape: Sequence[int],
    scale: Tensor,
    block: Sequence[int],
    name: str,
    config: dict[str, Any] | None = None,
    kind: torch.dtype = torch.float8_e4m3fn,
    weight: str = "l.weight",
) -> Stored:
    """fp8 codes with a scale of any shape; ``block`` spreads the scale's last two dimensions."""
    rng = np.random.default_rng(5)
    codes = finite_codes(rng, shape).view(kind)
    grid = scale.double().numpy() if scale.dtype != torch.uint8 else powers(scale.numpy())
    lead = shape[:-2]
    grid = grid.reshape(*lead, -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    values = codes.double().numpy() * spread(grid, block, shape)
    return Stored({weight: codes, name: scale}, {weight: values}, config or {})


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.1


def e8m0(*shape: int) -> Tensor:
    return torch.randint(118, 134, shape, dtype=torch.uint8)


DEEPSEEK: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [4, 6]}
UE8M0: dict[str, Any] = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [4, 6]}
EXPERTS = "l.experts.gate_up_proj"


def cases() -> Iterator[tuple[str, Stored]]:
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    yield (
        "V3 blocks, cut",
        fp8_model((10, 15), uniform(3, 3), (4, 6), "l.weight_scale_inv", DEEPSEEK),
    )
    yield "V4 .scale, E8M0 dtype", fp8_model((8, 12), e8m0(2, 2), (4, 6), "l.scale", UE8M0)
    yield (
        ".scale_inv in bf16",
        fp8_model((8, 12), uniform(2, 2).bfloat16(), (4, 6), "l.scale_inv", DEEPSEEK),
    )
    yield (
        "Mistral, per tensor",
        fp8_model((3, 5), uniform(), (3, 5), "l.qscale_weight", {"quant_method": "fp8"}),
    )
    yield (
        "default block of 128",
        fp8_model(
            (130, 140), uniform(2, 2), (128, 128), "l.weight_scale_inv", {"quant_method": "fp8"}
        ),
    )
    yield (
        "FBGEMM rows",
        fp8_model((6, 4), uniform(6, 1), (1, 4), "l.weight_scale", {"quant_method": "fbgemm_fp8"}),
    )
    yield (
        "FBGEMM experts, a scale a column",
        fp8_model((3, 4, 6), uniform(3, 1, 6), (4, 1), f"{EXPERTS}_scale", None, weight=EXPERTS),
    )
    yield (
        "MXFP8 bytes",
        fp8_model(
            (3, 96),
            e8m0(3, 3),
            (1, 32),
            "l.weight_scale_inv",
            {"quant_method": "mxfp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]},
        ),
    )
    yield (
        "experts in cut blocks",
        fp8_model(
            (3, 10, 15), uniform(3, 3, 3), (4, 6), f"{EXPERTS}_scale_inv", DEEPSEEK, weight=EXPERTS
        ),
    )
    yield (
        "one scale an expert",
        fp8_model((3, 10, 15), uniform(3), (10, 15), f"{EXPERTS}_scale", None, weight=EXPERTS),
    )
    yield (
        "ModelOpt blocks of four dimensions",
        fp8_model(
            (8, 12), uniform(2, 1, 2, 1), (4, 6), "l.weight_scale", {"quant_method": "modelopt"}
        ),
    )
    for kind in (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        yield str(kind), fp8_model((4, 6), uniform(), (4, 6), "l.weight_scale", None, kind)
    for width, (columns, group) in itertools.product(
        (2, 3, 4, 5, 8), ((64, 32), (37, 0), (70, 32))
    ):
        yield f"int{width}, {columns} by {group}", integer_model(rng, 5, columns, width, group)
    for width in (3, 4, 8):
        yield f"int{width} with zeros", integer_model(rng, 13, 70, width, 16, zero=True)
    yield "int4, ordered columns", integer_model(rng, 5, 64, 4, 16, zero=True, order=True)
    yield "NVFP4, ModelOpt", nvfp4_model(rng, 5, 48, "modelopt")
    yield "NVFP4, compressed-tensors", nvfp4_model(rng, 5, 48, "compressed-tensors")
    yield "gpt-oss", gpt_oss_model(rng, 3, 6, 64)
    yield "MXFP4, MXFP6", micro_model(rng)
    yield "FP4 experts of V4", fp4_experts(rng)
    yield "int8", int8_model(rng)


def micro_model(rng: np.random.Generator) -> Stored:
    """compressed-tensors mxfp4-pack-quantized and mxfp6-pack-quantized."""
    four = rng.integers(0, 16, (3, 64))
    six = rng.integers(0, 64, (3, 64))
    e2m3 = np.array(
        [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
    )
    scales = rng.integers(120, 130, (3, 2)).astype(np.uint8)
    wide = spread(powers(scales), (1, 32), four.shape)
    tensors = {
        "a.weight_packed": torch.from_numpy(pack_bits(four, 4)),
        "a.weight_scale": torch.from_numpy(scales),
        "b.weight_packed": torch.from_numpy(pack_bits(six, 6)),
        "b.weight_scale": torch.from_numpy(scales.copy()),
    }
    values = {
        "a.weight": E2M1[four] * wide,
        "b.weight": np.concatenate([e2m3, -e2m3])[six] * wide,
    }
    return Stored(tensors, values, {"quant_method": "compressed-tensors"})


def fp4_experts(rng: np.random.Generator) -> Stored:
    """fp8 linears of [4, 6] blocks next to experts of two E2M1 codes a byte."""
    stored = fp8_model((8, 12), uniform(2, 2), (4, 6), "l.weight_scale_inv", DEEPSEEK)
    codes = rng.integers(0, 16, (3, 64))
    scales = rng.integers(120, 130, (3, 2)).astype(np.uint8)
    stored.tensors |= {
        "e.0.w1.weight": torch.from_numpy(pack_bits(codes, 4).view(np.int8)),
        "e.0.w1.scale": torch.from_numpy(scales).view(torch.float8_e8m0fnu),
    }
    stored.values["e.0.w1.weight"] = E2M1[codes] * spread(powers(scales), (1, 32), codes.shape)
    stored.config |= {"expert_dtype": "fp4"}
    return stored


def int8_model(rng: np.random.Generator) -> Stored:
    codes = rng.integers(-128, 128, (5, 6)).astype(np.int8)
    zeros = rng.integers(-5, 5, (5, 1)).astype(np.int8)
    scale = uniform(5, 1)
    tensors = {
        "l.weight": torch.from_numpy(codes),
        "l.weight_scale": scale,
        "l.weight_zero_point": torch.from_numpy(zeros),
    }
    values = (codes.astype(float) - zeros) * scale.double().numpy()
    return Stored(tensors, {"l.weight": values}, {"quant_method": "compressed-tensors"})


CASES = dict(cases())
