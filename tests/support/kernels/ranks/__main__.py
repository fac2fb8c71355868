"""Forks ranks over gloo that run checks together.

    python -m support.kernels.ranks FOLDER

Writes FOLDER/RANKS.CHECK for every check: empty if it passed on all ranks, else the tracebacks.
"""

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.kernels.ranks.checks import CHECKS
from torch.multiprocessing.spawn import start_processes


def rank_main(rank: int, count: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting{count}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, check in CHECKS[count].items():
        result = outcome(check, folder)
        results: list[Any] = [None] * count
        dist.all_gather_object(results, result)
        if rank == 0:
            (folder / f"{count}.{name}").write_text("\n".join(filter(None, results)))
    dist.barrier()
    os._exit(0)  # gloo's threads may otherwise be torn down while they run


def outcome(check: Callable[[Path], None], folder: Path) -> str:
    try:
        check(folder)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    place = Path(sys.argv[1])
    forked: Any = start_processes
    for ranks in CHECKS:
        forked(rank_main, (ranks, place), nprocs=ranks, start_method="fork")
