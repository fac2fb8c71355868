"""Error of AdamW's update under 8-bit codes of its moments: ours, and FlashOptim's.

    python -m bench.train.moment_codes [--steps 400] [--text docs]

The model and words of ``bench.train.low_memory`` learn with exact fp32 moments. Next to them every
code keeps its own moments, from the same gradients, for an embedding, two linear layers and a
norm. The figure is the root of the mean square difference between an update of these and the exact
one, relative to the exact one, over the last two thirds of the steps.

FlashOptim's codes: m by softsign, v by its square root, blocks of 32 with float16 scales, rounded
to nearest; a second row rounds them with random bits, as ours.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.support.measure import machine
from bench.train.low_memory import BATCH, LENGTH, new_model, words_of
from merit_fast.kernels.optimizer import _eager

RATE = 1e-3
BETAS = (0.9, 0.999)
EPSILON = 1e-8
KINDS = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.mlp.down_proj.weight": "linear",
    "model.layers.1.self_attn.q_proj.weight": "linear",
    "model.layers.1.input_layernorm.weight": "norm",
}


def powers(count: int, power: int) -> Tensor:
    return (torch.arange(count + 1, dtype=torch.float64) / count).pow(power).float()


def softsign(count: int) -> Tensor:
    share = torch.arange(count + 1, dtype=torch.float64) / count
    return (share / (2 - share)).float()


def minifloat(mantissa: int, exponents: int) -> Tensor:
    """Values with ``mantissa`` bits, with numbers below the smallest exponent in equal steps."""
    code = torch.arange(exponents << mantissa, dtype=torch.float64)
    exponent = torch.div(code, 1 << mantissa, rounding_mode="floor")
    share = code / (1 << mantissa) - exponent
    values = torch.where(exponent == 0, share * 2, (1 + share) * exponent.exp2())
    return (values / values[-1]).float()


@dataclass(frozen=True)
class Codes:
    """Values that first and second moments may have, as shares of their block's largest."""

    first: Tensor
    second: Tensor
    block: int
    stochastic: bool = True
    half_scales: bool = False

    def rounded(self, values: Tensor, second: bool) -> Tensor:
        rows = F.pad(values.flatten(), (0, -values.numel() % self.block)).view(-1, self.block)
        top = rows.abs().amax(1, keepdim=True)
        if self.half_scales:  # of the root of a second moment, as it is the root that is coded
            top = top.sqrt().half().float().square() if second else top.half().float()
        top = torch.where(top > 0, top, 1.0)
        share = (rows.abs() / top).clamp(max=1)
        grid = self.second if second else self.first
        above = torch.searchsorted(grid, share, right=True).clamp(1, len(grid) - 1)
        low = grid[above - 1]
        gap = grid[above] - low
        draw = torch.rand_like(share) if self.stochastic else torch.full_like(share, 0.5)
        value = low + gap * (draw * gap < share - low)
        if second and self.stochastic:  # never zero
            value = torch.where((value == 0) & (share > 0), grid[1], value)
        return (value * top * rows.sign()).flatten()[: values.numel()].view(values.shape)


class Ours:
    """``FusedAdamW``'s own codes: the second moment is rounded with the bits of the first one."""

    def __init__(self, stochastic: bool = True) -> None:
        self.stochastic = stochastic
        self.bits: Tensor | None = None

    def rounded(self, values: Tensor, second: bool) -> Tensor:
        flat = values.flatten()
        if self.stochastic and not second:
            self.bits = torch.randint(1 << 32, flat.shape)
        codes = torch.empty(len(flat), dtype=torch.uint8 if second else torch.int8)
        scale = torch.empty(-(-len(flat) // _eager.BLOCK))
        _eager.encode(flat, codes, scale, second=second, bits=self.bits)
        return _eager.decoded(codes, scale, second=second).view(values.shape)


CODES: dict[str, Codes | Ours] = {
    "ours: square and 4th power, 256": Ours(),
    "ours, to nearest": Ours(stochastic=False),
    "the same, draws of their own": Codes(powers(127, 2), powers(255, 4), 256),
    "ours, blocks of 64": Codes(powers(127, 2), powers(255, 4), 64),
    "FlashOptim: softsign, root, 32": Codes(softsign(127), powers(255, 2), 32, False, True),
    "FlashOptim's, random bits": Codes(softsign(127), powers(255, 2), 32, True, True),
    "minifloats E2M5 and E4M4, 256": Codes(minifloat(5, 4), minifloat(4, 16), 256),
}


class Moments:
    """Both moments of a parameter, and their update."""

    def __init__(self, parameter: Tensor) -> None:
        self.first = torch.zeros_like(parameter)
        self.second = torch.zeros_like(parameter)

    def update(self, grad: Tensor, step: int, keep: Callable[[Tensor, bool], Tensor]) -> Tensor:
        first = self.first + (1 - BETAS[0]) * (grad - self.first)
        second = BETAS[1] * self.second + (1 - BETAS[1]) * grad * grad
        self.first = keep(first, False)
        self.second = keep(second, True)
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        return first / (1 - BETAS[0] ** step) / root


def measure(words: Tensor, steps: int) -> dict[str, dict[str, float]]:
    model = new_model(0, torch.float32)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    exact = {name: Moments(p) for name, p in parameters.items()}
    coded = {(code, name): Moments(parameters[name]) for code in CODES for name in KINDS}
    errors: dict[str, dict[str, float]] = {
        code: dict.fromkeys((*KINDS.values(), "all"), 0.0) for code in CODES
    }
    sizes = dict.fromkeys((*KINDS.values(), "all"), 0.0)
    numbers = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(words) - LENGTH, (BATCH,), generator=numbers)
        rows = torch.stack([words[start : start + LENGTH] for start in starts.tolist()])
        model.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        for name, p in model.named_parameters():
            update = exact[name].update(p.grad, step, lambda values, _: values)
            for code in CODES if name in KINDS else ():
                other = coded[code, name].update(p.grad, step, CODES[code].rounded)
                if 3 * step > steps:
                    error = float((other - update).square().sum())
                    errors[code][KINDS[name]] += error
                    errors[code]["all"] += error
            if name in KINDS and 3 * step > steps:
                sizes[KINDS[name]] += float(update.square().sum())
                sizes["all"] += float(update.square().sum())
            parameters[name] -= RATE * update
    return {
        code: {kind: round((row[kind] / sizes[kind]) ** 0.5, 4) for kind in row}
        for code, row in errors.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train.moment_codes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--text", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    report: dict[str, Any] = {**machine(), "torch": torch.__version__, "steps": options.steps}
    report["errors"] = measure(words_of(options.text), options.steps)
    for code, row in report["errors"].items():
        print(f"{code:34}" + "".join(f"  {kind} {value:.4f}" for kind, value in row.items()))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
