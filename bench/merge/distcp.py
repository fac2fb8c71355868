"""Averages torch's distributed checkpoints, against torch's own load, average and save.

    python -m bench.merge.distcp [DIR] [--models 4] [--mib 256] [--rounds 5]

Four ranks of torch.distributed write the checkpoints: one dimension of every matrix is sharded, in
bfloat16. Both sides run in one process each, in turns, on the warm page cache and without fsync:
torch loads each checkpoint into one state dict, adds it to a sum in float32, rounds and saves; the
merge writes the same chunks. Prints medians of the seconds, of the ratio of every round, of CPU
seconds, and each side's peak memory. The outputs must agree to one rounding.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RANKS = 4
ROWS = 4096
COLUMNS = 2048
THREADS = 2


def shapes(mib: int) -> dict[str, tuple[int, int]]:
    """Matrices of 16 MiB, whose rows the ranks do not divide evenly in every second one."""
    return {f"layers.{n}.weight": (ROWS + n % 2, COLUMNS) for n in range(mib // 16)}


def write_rank(rank: int, folder: Path, count: int, mib: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for number in range(count):
        made = torch.Generator().manual_seed(number)
        state = {}
        for name, shape in shapes(mib).items():
            tensor = torch.randn(shape, generator=made).bfloat16()
            state[name] = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        writer = FileSystemWriter(folder / f"step-{number}", sync_files=False)
        save(state, storage_writer=writer)
    dist.destroy_process_group()


def average_by_torch(folder: Path, count: int, out: Path) -> None:
    """Loads, sums and saves as a script that uses torch only does."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    torch.set_num_threads(THREADS)
    metadata: Any = FileSystemReader(folder / "step-0").read_metadata()
    sizes = {name: entry.size for name, entry in metadata.state_dict_metadata.items()}
    state = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in sizes.items()}
    total = {name: torch.zeros(size) for name, size in sizes.items()}
    for number in range(count):
        load(state, checkpoint_id=folder / f"step-{number}", no_dist=True)
        for name, tensor in state.items():
            total[name].add_(tensor, alpha=1 / count)
    merged = {name: tensor.bfloat16() for name, tensor in total.items()}
    save(merged, storage_writer=FileSystemWriter(out, sync_files=False), no_dist=True)


def average_by_merge(folder: Path, count: int, out: Path) -> None:
    from merit_fast.merge import merge_models

    models = [folder / f"step-{number}" for number in range(count)]
    merge_models(models, out=out, form="distcp", fsync=False, threads=THREADS)


SIDES: dict[str, Callable[[Path, int, Path], None]] = {
    "torch": average_by_torch,
    "merge": average_by_merge,
}


def serve(side: str, folder: Path, count: int) -> None:
    """Averages once for every line of the standard input."""
    out = folder / f"out-{side}"
    for _ in sys.stdin:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        cpu = time.process_time()
        SIDES[side](folder, count, out)
        seconds = time.perf_counter() - started
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        print(json.dumps([seconds, time.process_time() - cpu, peak / 1024]), flush=True)


class Side:
    """A process that averages when it is asked."""

    def __init__(self, name: str, folder: Path, count: int) -> None:
        words = [sys.executable, "-W", "ignore", "-m", "bench.merge.distcp", str(folder)]
        self.process = subprocess.Popen(
            [*words, "--models", str(count), "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> list[float]:
        """Seconds, CPU seconds, peak MiB."""
        stdin = self.process.stdin
        stdout = self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write("\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit("a side ended before its time")
        values: list[float] = json.loads(line)
        return values


def largest_difference(folder: Path, mib: int) -> int:
    """Between the outputs, in units of the last place of bfloat16."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    states = []
    for side in SIDES:
        state = {name: torch.empty(shape).bfloat16() for name, shape in shapes(mib).items()}
        load(state, checkpoint_id=folder / f"out-{side}", no_dist=True)
        states.append(state)
    worst = 0
    for name, mine in states[1].items():
        bits = [each.view(torch.int16).int() for each in (mine, states[0][name])]
        worst = max(worst, int((bits[0] - bits[1]).abs().max()))
    return worst


def measure(folder: Path, count: int, mib: int, rounds: int) -> None:
    from torch.multiprocessing.spawn import start_processes

    forked: Any = start_processes
    if not (folder / f"step-{count - 1}" / ".metadata").exists():
        forked(write_rank, (folder, count, mib), nprocs=RANKS, start_method="fork")
    sides = {name: Side(name, folder, count) for name in SIDES}
    for side in sides.values():
        side.run()  # imports, and the page cache
    results = [{name: side.run() for name, side in sides.items()} for _ in range(rounds)]
    for side in sides.values():
        assert side.process.stdin is not None
        side.process.stdin.close()
        side.process.wait()
    print(f"{count} checkpoints of {mib} MiB in {RANKS} shards, {THREADS} threads, {rounds} rounds")
    print("| side | seconds | CPU seconds | peak MiB |\n|---|---|---|---|")
    for name in SIDES:
        seconds, cpu, peak = (median(r[name][k] for r in results) for k in range(3))
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} | {peak:.0f} |")
    for label, k in (("wall time", 0), ("CPU time", 1)):
        ratios = sorted(r["torch"][k] / r["merge"][k] for r in results)
        print(f"{label}: {median(ratios):.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    print(f"largest difference: {largest_difference(folder, mib)} units of bfloat16's last place")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="kept; absent: a temporary one")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--mib", type=int, default=256, help="of a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=tuple(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.folder, arguments.models)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(folder, arguments.models, arguments.mib, arguments.rounds)


if __name__ == "__main__":
    main()
