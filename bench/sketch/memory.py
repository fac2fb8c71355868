"""Peak memory of one kind of step in a process of its own; with ``7b``, of a sketch of a 7B model.

    python -m bench.sketch.memory plain|frozen|sketch|7b [--dtype fp32] [--tokens 128] [--threads 1]
    [--quick]

Prints one line of JSON. Every child imports the sketcher, so the difference contains no import.
The 7B model has 15.2 GB of random bf16 weights, filled tensor by tensor in place.
"""

import argparse
import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.merge.from_disk import SHAPES
from bench.sketch.work import DTYPES, Work, frozen, plain, sketched, small_model, token_work
from bench.support.measure import Results, run_child

VARIANTS = {"plain": plain, "frozen": frozen, "sketch": sketched}
BIG = SHAPES["7b"]
BATCH = 8
ROUNDS = 3
BIG_BATCH = 2
BIG_TOKENS = 32
# Each buffer of 64 KiB and more is mapped by itself: else glibc's leftovers differ by 20 MiB from
# run to run.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ROOM_GIB = 18.0  # 15.2 GB of weights, 2 GiB over them, and what the system needs


def big_config(quick: bool) -> Any:
    from transformers import Qwen2Config

    sizes: dict[str, Any] = dict(
        hidden_size=BIG.hidden,
        intermediate_size=BIG.intermediate,
        num_hidden_layers=BIG.layers,
        vocab_size=BIG.vocabulary,
    )
    if quick:
        sizes = dict(hidden_size=512, intermediate_size=640, num_hidden_layers=2, vocab_size=1000)
    heads = sizes["hidden_size"] // 128
    kv_heads = 1 if quick else BIG.key_value // 128
    return Qwen2Config(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        use_cache=False,
    )


def big_model(quick: bool) -> nn.Module:
    """Builds the model without memory, then allocates and fills one tensor after the other."""
    from transformers import Qwen2ForCausalLM

    config = big_config(quick)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
        model.to(torch.bfloat16)
    model.to_empty(device="cpu")
    # Its buffer is computed; it is no weight.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for piece in flat.split(len(pool)):
                piece.copy_(pool[: len(piece)])
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
    trained: nn.Module = model.train()
    return trained


def status_mib(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def available_gib() -> float:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 2**20


def run_small(arguments: argparse.Namespace) -> dict[str, float]:
    importlib.import_module("merit_fast.sketch.gradients")
    work = token_work(small_model(arguments.dtype, arguments.quick), BATCH, arguments.tokens)
    before = status_mib("VmHWM")
    for _ in range(ROUNDS):
        with VARIANTS[arguments.variant](work) as step:
            kept = step()  # a sketch is alive when its peak is taken
        work.model.zero_grad()
    assert (kept is not None) == (arguments.variant == "sketch")
    return {"before_mib": before, "high_mib": status_mib("VmHWM")}


def run_big(arguments: argparse.Namespace) -> dict[str, float]:
    if not arguments.quick and available_gib() < ROOM_GIB:
        sys.exit(f"needs {ROOM_GIB} GiB of free memory, got {available_gib():.1f}")
    model = big_model(arguments.quick)
    work: Work = token_work(model, BIG_BATCH, BIG_TOKENS)
    result = {
        "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "built_mib": status_mib("VmHWM"),
    }
    for name in ("frozen", "sketch"):
        with VARIANTS[name](work) as step:
            start = time.perf_counter()
            sketches = step()
            result[f"{name}_s"] = time.perf_counter() - start
    assert sketches is not None and sketches.isfinite().all() and bool(sketches.any(1).all())
    return result | {"high_mib": status_mib("VmHWM")}


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Runs children for the results that are still missing."""
    quick = ["--quick"] if arguments.quick else []
    base = [sys.executable, "-m", "bench.sketch.memory"]
    lengths = (16,) if arguments.quick else (128, 512)
    cases = itertools.product(lengths, DTYPES, arguments.threads)
    for tokens, dtype, threads in cases if "memory" in arguments.only else ():
        case = f"{dtype}, T={tokens}, {threads} thread(s)"
        finished = sum(entry["case"] == case for entry in results.of("memory"))
        options = ["--dtype", dtype, "--tokens", str(tokens), "--threads", str(threads), *quick]
        for number in range(finished, 1 if quick else ROUNDS):
            rows = {name: run_child([*base, name, *options], EXACT) for name in VARIANTS}
            results.add({"memory": {"case": case, "rows": rows, "threads": threads}})
            print(f"memory {number + 1}, {case}: {_words(rows)}", file=sys.stderr, flush=True)
    if "7b" in arguments.only and not any("error" not in row for row in results.of("7b")):
        options = ["7b", "--threads", str(max(arguments.threads)), *quick]
        results.add({"7b": run_child([*base, *options])})


def _words(rows: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} {row.get('error') or round(row['high_mib'], 1)}" for name, row in rows.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", choices=[*VARIANTS, "7b"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(run_big(arguments) if arguments.variant == "7b" else run_small(arguments)))


if __name__ == "__main__":
    main()
