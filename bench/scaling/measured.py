"""Share of sketch, split and merge in the seconds of a finished run, from its run.json.

python -m bench.scaling.measured RUN [--arm merit]
"""

import argparse
import json
from pathlib import Path

from merit_fast.manifests.ledger import Ledger, read_ledger
from merit_fast.manifests.stages import MERGE, SKETCH, SPLIT, TRAIN


def shares(ledger: Ledger, arm: str = "merit") -> dict[str, float]:
    """Seconds of an arm's stages, and the overhead: (sketch + split + merge) / training."""

    def seconds(name: str) -> float:
        value = ledger.outputs[name].seconds
        if value is None:
            raise SystemExit(f"{name}: its seconds are not known")
        return value

    training = sum(seconds(f"{TRAIN.folder}/{name}") for name, _ in ledger.branches[arm])
    stages = {
        "sketch_s": seconds(SKETCH.folder),
        "split_s": seconds(SPLIT.folder),
        "merge_s": seconds(f"{MERGE.folder}/{arm}"),
    }
    return {"training_s": training, **stages, "overhead": sum(stages.values()) / training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--arm", default="merit")
    arguments = parser.parse_args()
    print(json.dumps(shares(read_ledger(arguments.run), arguments.arm)))


if __name__ == "__main__":
    main()
