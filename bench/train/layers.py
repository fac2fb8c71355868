"""Norms, gated activations and rotary positions: python -m bench.train.layers [--rounds N]

Forward and backward of one layer's worth of SmolLM2-135M and of Qwen2-0.5B, against transformers'
code as it is and under torch.compile. Every contender runs once a round in one process, and each
round starts with the next one. Figures are medians of wall and CPU seconds; ratios are those of a
round. The floor is a copy of the bytes that every implementation moves: every input and gradient
read, every result written, once in forward and once in backward. glibc keeps freed memory, as in
merit_fast's training; otherwise fresh pages cost every contender more than the arithmetic. Results
are compared before anything is timed. The last line of standard output is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from bench.support.dtypes import DTYPES
from bench.support.measure import machine, spread
from merit_fast.kernels.layers import add_rms_norm, rms_norm, rope, swiglu
from merit_fast.model import keep_freed_memory

MODELS = {
    "SmolLM2-135M": {
        "batch": 4,
        "tokens": 256,
        "hidden": 576,
        "inner": 1536,
        "heads": (9, 3),
        "width": 64,
    },
    "Qwen2-0.5B": {
        "batch": 1,
        "tokens": 512,
        "hidden": 896,
        "inner": 4864,
        "heads": (14, 2),
        "width": 64,
    },
}
GOALS = {"eager": 3.0, "torch.compile": 1.2}
EPSILON = 1e-6


@dataclass(frozen=True)
class Layer:
    """One layer: our function and transformers', from the same inputs to the outputs."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: list[Tensor]
    moved_bytes: int


def layers(model: dict[str, Any], dtype: torch.dtype) -> list[Layer]:
    batch, tokens, hidden, inner = (model[key] for key in ("batch", "tokens", "hidden", "inner"))
    norm = LlamaRMSNorm(hidden, EPSILON).to(dtype)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return functional_norm(total, weight), total

    def functional_norm(x: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    silu = ACT2FN["silu"]
    x = leaf(batch, tokens, hidden)
    residual = leaf(batch, tokens, hidden)
    weight = leaf(hidden)
    gate = leaf(batch, tokens, inner)
    up = leaf(batch, tokens, inner)
    q, k = (leaf(batch, tokens, heads, model["width"]) for heads in model["heads"])
    angles = torch.rand(1, tokens, model["width"]) * 6
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)

    def our_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    def their_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q, k

    def our_norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPSILON)

    def our_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, EPSILON)

    def their_swiglu(gate: Tensor, up: Tensor) -> Any:
        return silu(gate) * up

    return [
        Layer("rms_norm", our_norm, functional_norm, [x, weight], 5 * x.nbytes),
        Layer("add_rms_norm", our_added, added, [x, residual, weight], 8 * x.nbytes),
        Layer("swiglu", swiglu, their_swiglu, [gate, up], 8 * gate.nbytes),
        Layer("rope", our_rope, their_rope, [q, k], 4 * (q.nbytes + k.nbytes)),
    ]


def step(run: Callable[..., Any], inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Any, ...]:
    outputs = run(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, inputs, gradients)


def contenders(layer: Layer) -> dict[str, Callable[[], Any]]:
    """The contenders' steps, compiled and compared."""
    torch._dynamo.reset()
    outputs = layer.theirs(*layer.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(y) for y in outputs]  # in the outputs' layouts
    functions = {
        "ours": layer.ours,
        "eager": layer.theirs,
        "torch.compile": torch.compile(layer.theirs, dynamic=False),
    }
    runs: dict[str, Callable[[], Any]] = {
        name: partial(step, function, layer.inputs, gradients)
        for name, function in functions.items()
    }
    expected = runs["eager"]()
    bound = 1e-5 if layer.inputs[0].dtype == torch.float32 else 2e-2
    for name, run in runs.items():
        for ours, theirs in zip(run(), expected, strict=True):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < bound, f"{layer.name}, {name}: differs from eager by {float(error):.1e}"
    return runs


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of a call, each a mean over consecutive calls of about 5 ms in all."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(5e-3 / (time.perf_counter() - start)))
    order = list(runs)
    for _ in range(rounds):
        order = [*order[1:], order[0]]
        for name in order:
            wall = time.perf_counter()
            cpu = time.process_time()
            for _ in range(repeats[name]):
                runs[name]()
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            times[name].append((wall / repeats[name], cpu / repeats[name]))
    return times


def copy_of(moved_bytes: int) -> Callable[[], Any]:
    source = torch.ones(max(1, moved_bytes // 8))
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def measured(model: str, dtype: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    for layer in layers(MODELS[model], DTYPES[dtype]):
        times = timed({**contenders(layer), "floor": copy_of(layer.moved_bytes)}, rounds)
        row: dict[str, Any] = {
            "model": model,
            "layer": layer.name,
            "dtype": dtype,
            "threads": threads,
        }
        for name, pairs in times.items():
            row[f"{name}_us"] = 1e6 * statistics.median(wall for wall, _ in pairs)
            row[f"{name}_cpu_us"] = 1e6 * statistics.median(cpu for _, cpu in pairs)
        for name in ("eager", "torch.compile", "floor"):
            for column, clock in enumerate(("", "cpu_")):
                rounds_of_both = zip(times["ours"], times[name], strict=True)
                ratios = [theirs[column] / ours[column] for ours, theirs in rounds_of_both]
                row[f"{clock}ratio_{name}"], row[f"{clock}spread_{name}"] = spread(ratios)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    heads = (
        "ours us",
        "eager",
        "compile",
        "floor",
        "x eager",
        "x compile",
        "of floor",
        "cpu: x eager",
        "x compile",
    )
    print(
        f"{'model':14}{'layer':14}{'dtype':6}{'threads':>8}",
        *(f"{head:>13}" for head in heads),
        sep="",
    )
    for threads in arguments.threads:
        for model in MODELS:
            for dtype in DTYPES:
                for row in measured(model, dtype, threads, arguments.rounds):
                    rows.append(row)
                    ratios = (
                        "ratio_eager",
                        "ratio_torch.compile",
                        "ratio_floor",
                        "cpu_ratio_eager",
                    )
                    cells = [
                        f"{row[f'{name}_us']:13.0f}"
                        for name in ("ours", "eager", "torch.compile", "floor")
                    ]
                    cells += [f"{row[key]:13.2f}" for key in (*ratios, "cpu_ratio_torch.compile")]
                    print(
                        f"{model:14}{row['layer']:14}{dtype:6}{threads:8}",
                        *cells,
                        sep="",
                        flush=True,
                    )
    print(
        json.dumps({"machine": machine(), "torch": torch.__version__, "goals": GOALS, "rows": rows})
    )


if __name__ == "__main__":
    main()
