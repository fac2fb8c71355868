"""Conflicts per part of SmolLM2-135M on the demo's tasks, and what the parts cost.

    OMP_NUM_THREADS=1 python -m bench.split.parts [--examples 48] [--all] [--json]

All pairs of the demo's 8 quick tasks (with --all, of all its tasks), at the base model. The cost is
the median of the ratios of CPU seconds with and without parts, in turns, of passes of 8 rows each
of 3 tasks.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import merit_fast
from merit_fast.data import collate
from merit_fast.demo.config import write_demo
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.stages import SPLIT
from merit_fast.model import load_model, target_losses
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

PARTS = {
    "embeddings": "embed_tokens",
    "attention": "self_attn",
    "mlp": "mlp",
    "norms": "norm",
}
LAYERS = {
    "layers 0-9": r"layers\.\d\.",
    "layers 10-19": r"layers\.1\d\.",
    "layers 20-29": r"layers\.2\d\.",
}


def split_by(config: Path, parts: dict[str, str], examples: int) -> SplitManifest:
    named = {name.replace(" ", "-"): pattern for name, pattern in parts.items()}
    options = [
        "split.preset=debiased",
        "split.groups=2",
        "split.tolerance=0.5",
        "split.proj_dim=65536",
        f"split.examples={examples}",
        f"split.parts={json.dumps(named)}",
        f"output={config.parent / next(iter(named))}",
    ]
    run = Run(read_run_config(config, options))
    run.sketch()
    run.split()
    return read_manifest(SplitManifest, run.outputs.file(SPLIT))


def row_of(name: str, found: Any, shares: list[float]) -> dict[str, Any]:
    """One line of the table: of the whole or of a part."""
    cosine = np.array(found.similarity, float)
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    known = pairs[~np.isnan(pairs)]
    return {
        "part": name,
        "share": statistics.mean(shares),
        "pairs": len(known),
        "below zero": int((known < 0).sum()),
        "surely": found.sure_conflicts,
        "mean cosine": float(known.mean()) if len(known) else None,
        "lowest": float(known.min()) if len(known) else None,
    }


def rows_of(split: SplitManifest) -> list[dict[str, Any]]:
    rows = [row_of("whole", split, [1.0])]
    for name, part in split.parts.items():
        shares = [share for share in part.norm_shares if share is not None]
        rows.append(row_of(name, part, shares or [float("nan")]))
    return rows


def cost(config: Path, rounds: int) -> float:
    """Median of CPU seconds with parts / without, of passes of 8 rows."""
    run = Run(read_run_config(config))
    model = load_model(str(run.outputs.base), "bf16")
    batches = [
        collate([dataset.examples[row] for row in range(8)], [0] * 8, run.data.pad_token_id)
        for dataset in run.data.branch[:3]
    ]

    def seconds(parts: dict[str, str] | None) -> float:
        with merit_fast.sketch_gradients(model, check="never", parts=parts) as sketcher:
            begun = 0.0
            for number, batch in enumerate((batches[0], *batches)):
                if number == 1:  # the first pass warms up
                    begun = time.process_time()
                target_losses(model, batch).loss.sum().backward()  # type: ignore[no-untyped-call]
                sketcher.update(["d"] * 8)
            return time.process_time() - begun

    return statistics.median(seconds(PARTS) / seconds(None) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--all", action="store_true", help="all tasks of the demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = write_demo(Path(folder), quick=not arguments.all)
        tables = [rows_of(split_by(config, p, arguments.examples)) for p in (PARTS, LAYERS)]
        ratio = cost(config, arguments.rounds)
    if arguments.json:
        print(json.dumps({"tables": tables, "seconds_ratio": ratio}, indent=1))
        return
    for table in tables:
        print(" | ".join(table[0]))
        for row in table:
            cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
            print(" | ".join(cells))
        print()
    print(f"CPU seconds of a pass with parts / without: {ratio:.3f}")


if __name__ == "__main__":
    main()
