"""CPU seconds of the split stage by the number of datasets, start included.

    OMP_NUM_THREADS=1 python -m bench.split.cost [--datasets 8 100 400 1000] [--groups 4|auto]
    [--proj-dim 4096] [--steps 4000] [--json]

Every number is a process of its own: it starts, reads the sketch states, splits, writes split.json
and makes the lines for the terminal. CPU seconds count both cores. The mixture has twelve conflict
axes of falling strength, noise and unequal token counts. Goals: 12 s for 400 datasets in 4 groups,
120 s for 1000.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.support.measure import machine

BLOCKS = 8
EXAMPLES = 25  # per block
NOISE = 20.0  # tr(Sigma) / |g|^2
AXES = np.linspace(1.0, 0.2, 12)
GOALS_S = {400: 12.0, 1000: 120.0}


def write_states(directory: Path, datasets: int, proj_dim: int) -> None:
    import torch

    from merit_fast.kernels.sketch import CountSketch
    from merit_fast.manifests.sketch_state import SketchIdentity, SketchState

    generator = np.random.default_rng(0)
    basis = generator.standard_normal((len(AXES), proj_dim)) / proj_dim**0.5
    identity = SketchIdentity(CountSketch(proj_dim), "bench", ("w",))
    for i in range(datasets):
        mean = (generator.choice([-1.0, 1.0], len(AXES)) * AXES) @ basis
        mean += generator.standard_normal(proj_dim) / proj_dim**0.5
        noise = generator.standard_normal((BLOCKS, proj_dim)) * (EXAMPLES * NOISE / proj_dim) ** 0.5
        state = SketchState.zeros(identity, BLOCKS)
        state.block_sums += torch.from_numpy(EXAMPLES * mean + noise)
        state.block_square_norms += EXAMPLES * (NOISE + float(mean @ mean))
        state.block_counts += EXAMPLES
        state.block_weights += EXAMPLES
        state.block_square_weights += EXAMPLES
        state.loss_sum = 1.0
        state.num_target_tokens = 1
        (directory / f"d{i:04}.safetensors").write_bytes(state.to_bytes())


def split_states(directory: Path, groups: str, steps: int) -> None:
    """Splits the states of a folder as ``merit-fast split`` does."""
    from merit_fast.data import Dataset, Example
    from merit_fast.manifests.io import write_manifest
    from merit_fast.report import split_lines
    from merit_fast.split import SplitConfig, split_mixture

    generator = np.random.default_rng(1)
    row = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))
    names = sorted(file.stem for file in directory.glob("*.safetensors"))
    rows = np.exp(0.5 * generator.standard_normal(len(names))) * 100
    datasets = [Dataset(name, (row,) * int(n)) for name, n in zip(names, rows, strict=True)]
    manifest = split_mixture(
        directory,
        datasets,
        "mixture",
        SplitConfig(groups="auto" if groups == "auto" else int(groups)),
        base_fingerprint="base",
        steps=steps,
        sketched_at="at the base model",
        texts=dict,
    )
    write_manifest(manifest, directory / "split.json")
    print("\n".join(split_lines(manifest)))


def measure(datasets: int, proj_dim: int, groups: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_states(Path(folder), datasets, proj_dim)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        command = [sys.executable, "-m", "bench.split.cost", "--child", folder]
        command += ["--groups", groups, "--steps", str(steps)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = (Path(folder) / "split.json").stat().st_size
        chosen = json.loads((Path(folder) / "split.json").read_text())["groups"]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "datasets": datasets,
        "groups": chosen,
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
        "peak_mib": round(after.ru_maxrss / 1024),
        "split_json_mib": round(size / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", type=int, nargs="+", default=[8, 100, 400, 1000])
    parser.add_argument("--groups", default="4", help="a number, or auto")
    parser.add_argument("--proj-dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4000, help="of the joint run, for auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        split_states(arguments.child, arguments.groups, arguments.steps)
        return
    rows = []
    for datasets in arguments.datasets:
        row = measure(datasets, arguments.proj_dim, arguments.groups, arguments.steps)
        rows.append(row)
        goal = GOALS_S.get(datasets) if arguments.groups == "4" else None
        verdict = "" if goal is None else f"  goal {goal:.0f}: {row['cpu_s'] <= goal}"
        if not arguments.json:
            print("  ".join(f"{key} {value}" for key, value in row.items()) + verdict, flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "machine": machine()}))


if __name__ == "__main__":
    main()
