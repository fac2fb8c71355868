"""Projections of per-example gradients by merit_fast, TRAK and dattri, in turn in one process.

    python -m bench.search.projectors [--grad-dim 2000000] [--proj-dim 4096,8192] [--batch 8]
    [--threads 1,2] [--rounds 3] [--theirs 200] [--peers DIR] [--json FILE]

TRAK's and dattri's projectors for the CPU are taken from their packages, which pip puts into DIR
without dependencies at the first use (~/.cache/merit_fast/projectors). Ours is first checked as a
subclass of each library's AbstractProjector. Every table has the median seconds of a call, and the
rms error of the inner products of all pairs of examples, in units of |g| |h| / sqrt(numbers).
Theirs draw grad_dim x proj_dim random signs, block by block of 100 numbers, which takes minutes. So
they project to ``--theirs`` numbers, and their seconds are those times proj_dim / numbers.
``--theirs 0`` measures all.
"""

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import machine
from merit_fast.integrations import Projector

PACKAGES = ("traker==0.3.2", "dattri==0.3.0")
DEFAULT = Path.home() / ".cache/merit_fast/projectors"
LIBRARIES = {"TRAK": "trak.projectors", "dattri": "dattri.func.projection"}
OURS = "merit_fast"
Project = Callable[[Tensor], Tensor]


def load_peers(directory: Path) -> dict[str, Any]:
    """The modules of both libraries that define projectors."""
    if not directory.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*command, "--target", str(directory), *PACKAGES], check=True)
    sys.path.append(str(directory))
    return {name: importlib.import_module(module) for name, module in LIBRARIES.items()}


def check_interface(library: str, module: Any) -> None:
    """Ends the run where ours lacks what the library's base class asks for."""

    class Both(Projector, module.AbstractProjector):  # type: ignore[misc, name-defined]
        """Ours, with the library's abstract methods."""

    grads = torch.randn(2, 35)
    kind = module.ProjectionType.rademacher
    projected = Both(35, 16, 0, kind, torch.device("cpu")).project(grads, 1)
    if not torch.equal(projected, Projector(35, 16).project(grads, 1)):
        raise SystemExit(f"{library}: the projector differs as a subclass")


def contenders(
    peers: dict[str, Any], grad_dim: int, proj_dim: int, theirs_dim: int
) -> dict[str, Project]:
    """Projections with E <out(g), out(h)> = <g, h>, by name."""
    found: dict[str, Project] = {OURS: Projector(grad_dim, proj_dim).project}
    for library, module in peers.items():
        kind = module.ProjectionType.rademacher
        theirs = module.BasicProjector(grad_dim, theirs_dim, 0, kind, torch.device("cpu"))
        scale = theirs_dim**-0.5 if library == "TRAK" else 1.0

        def project(grads: Tensor, theirs: Any = theirs, scale: float = scale) -> Tensor:
            projected: Tensor = theirs.project(grads, 0)
            return scale * projected

        found[f"{library} BasicProjector, {theirs_dim} numbers"] = project
    return found


def gradients(batch: int, grad_dim: int) -> Tensor:
    """Independent random rows, so that the errors of different pairs are nearly independent."""
    return torch.randn(batch, grad_dim, generator=torch.Generator().manual_seed(0))


def rms_error(grads: Tensor, projected: Tensor) -> float:
    """Rms error of the inner products of all pairs, in units of |g| |h| / sqrt(numbers)."""
    wide = grads.double()
    norms = wide.norm(dim=1)
    error = (projected.double() @ projected.double().T - wide @ wide.T) / norms / norms[:, None]
    pairs = itertools.combinations(range(len(grads)), 2)
    squares = [float(error[a, b]) ** 2 for a, b in pairs]
    return float((projected.shape[1] * statistics.mean(squares)) ** 0.5)


def measure(
    projects: dict[str, Project], grads: Tensor, rounds: int, proj_dim: int
) -> dict[str, Any]:
    """Seconds of every round by contender, for ``proj_dim`` numbers, and its rms error."""
    seconds: dict[str, list[float]] = {name: [] for name in projects}
    errors = {}
    for _ in range(rounds):
        for name, project in projects.items():
            begin = time.perf_counter()
            projected = project(grads)
            taken = time.perf_counter() - begin
            seconds[name].append(taken * proj_dim / projected.shape[1])
            errors[name] = rms_error(grads, projected)
            if not errors[name] < 3:
                raise SystemExit(f"{name}: inner products are off by {errors[name]:.1f}")
    return {"seconds": seconds, "errors": errors}


def table(title: str, record: dict[str, Any]) -> list[str]:
    lines = [f"| {title} | s | of ours | rms error |", "|---|---|---|---|"]
    ours = record["seconds"][OURS]
    for name, values in record["seconds"].items():
        ratio = statistics.median(value / base for value, base in zip(values, ours, strict=True))
        error = record["errors"][name]
        lines.append(f"| {name} | {statistics.median(values):.3f} | {ratio:.0f} | {error:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grad-dim", type=int, default=2_000_000)
    parser.add_argument("--proj-dim", default="4096,8192")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs", type=int, default=200)
    parser.add_argument("--peers", type=Path, default=DEFAULT)
    parser.add_argument("--json", type=Path, help="write every second to this file")
    arguments = parser.parse_args()
    peers = load_peers(arguments.peers)
    for library, module in peers.items():
        check_interface(library, module)
    grads = gradients(arguments.batch, arguments.grad_dim)
    print(machine())
    record = {}
    for proj_dim in map(int, arguments.proj_dim.split(",")):
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            title = f"proj_dim {proj_dim}, {threads} thread(s)"
            theirs_dim = arguments.theirs or proj_dim
            projects = contenders(peers, arguments.grad_dim, proj_dim, theirs_dim)
            projects[OURS](grads)  # before the clock starts
            record[title] = measure(projects, grads, arguments.rounds, proj_dim)
            print("", *table(title, record[title]), sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), **record}) + "\n")


if __name__ == "__main__":
    main()
