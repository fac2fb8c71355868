"""Runs a merge that stops before it renames a file, until it is let go.

    python held_merge.py FOLDER STOP ARGUMENTS...

FOLDER holds ``go``, ``reached`` and ``log``. The process touches ``reached`` before it renames a
file whose name ends in STOP, and waits for ``go``. ``log`` gets one line for every shard that any
process writes.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

folder = Path(sys.argv[1])
stop = sys.argv[2]
replace = os.replace


def holding(source: Any, target: Any) -> None:
    if stop != "-" and str(target).endswith(stop):
        (folder / "reached").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
    replace(source, target)


vars(os)["replace"] = holding
sys.argv = ["merit-fast", *sys.argv[3:]]

from merit_fast.cli.main import main  # noqa: E402
from merit_fast.merge.engine.driver import write_shard  # noqa: E402
from merit_fast.merge.write import shards  # noqa: E402


def logging(shard: Any, *arguments: Any, **options: Any) -> Any:
    with open(folder / "log", "a") as log:
        log.write(f"{shard.file}\n")
    return write_shard(shard, *arguments, **options)


vars(shards)["write_shard"] = logging
main()
