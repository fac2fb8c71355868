"""Peak memory of each process that trains one branch, with and without ``train.shard: full``.

    python -m bench.train.shards [--ranks 2 4] [--layers 12] [--hidden 768] [--dtype bf16]

Makes a Llama from its config in a temporary folder, loads it as ``merit-fast train`` does, takes
three steps, writes a checkpoint and the model. Prints one line of JSON for each variant: the
largest of the processes' peaks, above what a process holds before it loads the model, next to
16 bytes (8-bit moments: fewer) of state for each parameter. gloo, one thread a process.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from merit_fast.data import Batch, Example, collate
from merit_fast.model import DTYPES, SettledDtype, peak_memory_bytes, reset_peak_memory
from merit_fast.train.config import TrainConfig
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.prepare import prepare_model
from merit_fast.train.resume import Position, write_checkpoint
from merit_fast.train.step import train_step

_STEPS = 3
_MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """One measurement."""

    shard: str
    ranks: int


def make_base(folder: Path, hidden: int, layers: int, dtype: SettledDtype) -> int:
    """Writes a Llama with an embedding and a head of their own; returns its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(getattr(torch, DTYPES[dtype]))
    model.save_pretrained(folder)
    return int(model.num_parameters())


def make_batches(ranks: int, tokens: int) -> list[Batch]:
    """A row of so many tokens for each process."""
    numbers = np.random.default_rng(0)
    rows = [numbers.integers(2, 32000, tokens).astype(np.int32) for _ in range(ranks)]
    return [collate([Example(row, row)], [0], 0) for row in rows]


def train(ranks: Ranks, folder: Path, config: TrainConfig, tokens: int) -> None:
    trained = prepare_model(str(folder / "base"), config, ranks)
    optimizer = MasterAdamW(trained.model, config, None, ranks)
    batches = make_batches(ranks.size, tokens)
    position = Position()
    for _ in range(_STEPS):
        position, _record = train_step(
            trained, optimizer, batches, ["rows"], _STEPS, config, position, ranks
        )
    if ranks.leads or optimizer.is_divided:
        write_checkpoint(folder, optimizer.state(), position, ranks=ranks)
        trained.write(str(folder / "base"), folder / "out", config, ranks)


def rank_main(rank: int, size: int, folder: Path, config: TrainConfig, tokens: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting{size}{config.shard}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    import transformers.models.llama.modeling_llama  # noqa: F401

    reset_peak_memory()
    before = peak_memory_bytes()
    train(Ranks(rank, size), folder, config, tokens)
    (folder / f"peak{rank}").write_text(str(peak_memory_bytes() - before))
    dist.barrier()
    os._exit(0)  # gloo's threads may otherwise be torn down while they run


def measure(variant: Variant, folder: Path, config: TrainConfig, tokens: int) -> list[int]:
    """Peak bytes of each process."""
    (folder / "out").mkdir(exist_ok=True)
    config = replace(config, shard=variant.shard)  # type: ignore[arg-type]
    arguments = (variant.ranks, folder, config, tokens)
    start: Any = start_processes
    start(rank_main, arguments, nprocs=variant.ranks, start_method="spawn")
    return [int((folder / f"peak{rank}").read_text()) for rank in range(variant.ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    config = TrainConfig(dtype=arguments.dtype)
    variants = [Variant("none", arguments.ranks[0])]
    variants += [Variant("full", ranks) for ranks in arguments.ranks]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        parameters = make_base(base, arguments.hidden, arguments.layers, arguments.dtype)
        for variant in variants:
            peaks = measure(variant, folder, config, arguments.tokens)
            values = {
                "shard": variant.shard,
                "ranks": variant.ranks,
                "parameters": parameters,
                "state_mib": round(16 * parameters / _MIB),
                "peak_mib": [round(peak / _MIB) for peak in peaks],
            }
            print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
