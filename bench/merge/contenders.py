"""Programs of the merge benchmark: python -m bench.merge.contenders NAME OUT MODEL ...

Each runs in a process of its own and merges once; the seconds it prints leave its imports out. This
file imports nothing that would count as theirs.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Clock = Callable[[], dict[str, float]]


def start_clock() -> Clock:
    """Returns a function that gives the wall and CPU seconds since this call."""
    wall = time.perf_counter()
    cpu = _cpu()
    return lambda: {"inner_wall_s": time.perf_counter() - wall, "inner_cpu_s": _cpu() - cpu}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    """This program's peak; ru_maxrss may hold the peak of the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def call_library(out: Path, models: Sequence[Path], fsync: bool = False) -> dict[str, float]:
    """``merge_models`` called from Python."""
    from merit_fast.merge import MergeConfig, merge_models

    options: dict[str, Any] = {} if fsync else no_fsync()
    config = MergeConfig(weights="uniform", **options)
    imported = peak_mib()
    clock = start_clock()
    merge_models(models, out=out, config=config)
    return {**clock(), "inner_peak_mib": peak_mib(), "imports_mib": imported}


def call_ties(out: Path, models: Sequence[Path]) -> dict[str, float]:
    """``merge_models`` by TIES; the last of the models is the base."""
    from merit_fast.merge import MergeConfig, merge_models

    options: dict[str, Any] = no_fsync()
    config = MergeConfig(weights="uniform", method="ties", density=0.5, **options)
    clock = start_clock()
    merge_models(models[:-1], base=models[-1], out=out, config=config)
    return {**clock(), "inner_peak_mib": peak_mib()}


def no_fsync() -> dict[str, bool]:
    """The option that skips the fsync, if this version has it."""
    from merit_fast.merge import MergeConfig

    return {"fsync": False} if "fsync" in MergeConfig.__dataclass_fields__ else {}


def import_library(out: Path, models: Sequence[Path]) -> dict[str, float]:
    """Imports the library and does nothing else."""
    import merit_fast.merge  # noqa: F401

    return {"inner_peak_mib": peak_mib()}


def loop_safetensors(out: Path, models: Sequence[Path]) -> dict[str, float]:
    """The usual script: tensor by tensor in fp32, a shard at a time."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    open_file: Any = safe_open  # untyped
    clock = start_clock()
    out.mkdir()
    for shard in sorted(path.name for path in models[0].glob("*.safetensors")):
        files = [open_file(model / shard, framework="pt") for model in models]
        merged = {}
        for name in files[0].keys():  # noqa: SIM118
            total = files[0].get_tensor(name).float()
            for file in files[1:]:
                total += file.get_tensor(name).float()
            merged[name] = (total / len(models)).bfloat16()
        save_file(merged, out / shard, {"format": "pt"})
    for index in models[0].glob("*.index.json"):
        (out / index.name).write_bytes(index.read_bytes())
    return clock()


def average_transformers(out: Path, models: Sequence[Path]) -> dict[str, float]:
    """Loads every model, averages the state dicts in fp32, saves."""
    import torch
    from transformers import AutoModelForCausalLM

    clock = start_clock()
    loaded = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16) for model in models]
    states = [model.state_dict() for model in loaded]
    for name, tensor in states[0].items():
        tensor.copy_(sum(state[name].float() for state in states) / len(states))
    loaded[0].save_pretrained(out, max_shard_size="400MB")
    return clock()


PROGRAMS: dict[str, Callable[[Path, Sequence[Path]], dict[str, float]]] = {
    "library": call_library,
    "library-fsync": lambda out, models: call_library(out, models, fsync=True),
    "ties": call_ties,
    "import": import_library,
    "safetensors": loop_safetensors,
    "transformers": average_transformers,
}

if __name__ == "__main__":
    result = PROGRAMS[sys.argv[1]](Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
    print(json.dumps(result))
