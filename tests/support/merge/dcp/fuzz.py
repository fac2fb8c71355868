"""Fuzzing of the reader of distributed checkpoints, run from the root with PYTHONPATH=tests.

    python -m support.merge.dcp.fuzz --minutes 10 [--seed 0]

Damages a .metadata or a shard that torch wrote, some bytes, opcodes or numbers at a time. The
reader must take it or refuse it on one line within two seconds. What it takes and torch loads too
must have the same values. An input for which that does not hold is kept in the current directory.
test_fuzz_distributed.py runs it for some hundred inputs.
"""

import argparse
import random
import shutil
import struct
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import DTYPES
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.dcp.checkpoint import DistributedCheckpoint, read_distributed
from merit_fast.merge.read.entries import stored_entries

SECONDS = 2.0  # of CPU time
NUMBERS = (0, 1, 2, 3, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
PIECES = (
    b"(", b")", b"]", b"}", b"\x85", b"\x86", b"t", b"a", b"e", b"s", b"u", b"R", b"b", b"\x81",
    b"N", b"0", b"2", b".", b"\x94", b"h\x00", b"h\x01", b"h\x10", b"K\x00", b"K\xff", b"q\x00",
    b"\x8a\x09" + b"\xff" * 9, b"J\xff\xff\xff\xff", b"\x93", b"Q", b"cos\nsystem\n",
    b"cbuiltins\neval\n", b"X\x01\x00\x00\x00w", b"\x8c\x04Size", b"\x8c\x05torch",
)  # fmt: skip


def write_seed(folder: Path) -> None:
    """A small checkpoint with tensors of several dtypes, and values that are none."""
    state = {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5).bfloat16()},
        "optimizer": {"m": torch.zeros(2)},
        "step": 3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, no_dist=True)


def damage(data: bytes, rng: random.Random) -> bytes:
    """One change: bytes flipped, cut, repeated, moved, or replaced by an opcode or a number."""
    at = rng.randrange(len(data) + 1)
    end = min(at + rng.choice((1, 1, 2, 4, 16, 64)), len(data))
    act = rng.randrange(7)
    if act == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if act == 1:
        return data[:at] + data[end:]
    if act == 2:
        return data[:end] + data[at:end] * rng.choice((1, 2, 100)) + data[end:]
    if act == 3:
        return data[:at] + rng.choice(PIECES) + data[at if rng.random() < 0.5 else end :]
    if act == 4:
        form = rng.choice(("<B", "<H", "<I", "<Q"))
        number = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
        return data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]
    if act == 5:
        return data[:at]
    other = rng.randrange(len(data) + 1)
    return data[:other] + data[at:end] + data[other:]


def check(folder: Path) -> str:
    """Reads a checkpoint and says what came of it: "refused", "taken" or "agrees"."""
    started = time.process_time()
    try:
        checkpoint = read_distributed(folder, folder, None)
    except InputError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 3000, text
        checkpoint = None
    assert time.process_time() - started < SECONDS
    return "refused" if checkpoint is None else agree(checkpoint)


def agree(checkpoint: DistributedCheckpoint) -> str:
    """Compares the values of every tensor with torch's."""
    wanted: dict[str, Any] = {}
    for name, entry in checkpoint.tensors.items():
        if entry.num_elements > 1 << 20:
            return "taken"
        dtype = getattr(torch, DTYPES[entry.dtype].torch_name)
        wanted[checkpoint.saved[name].name] = torch.zeros(entry.shape, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(wanted, checkpoint_id=checkpoint.folder, no_dist=True)
    except (Exception, CheckpointException):  # torch checks more, or less, and fails in many ways
        return "taken"
    files = {stored.file for e in checkpoint.tensors.values() for stored in stored_entries(e)}
    with open_files(files, None) as opened:
        for name, entry in checkpoint.tensors.items():
            theirs = wanted[checkpoint.saved[name].name].reshape(-1).view(torch.uint8).numpy()
            if entry.num_elements:
                mine, _ = values(entry, 0, entry.num_elements, opened)
                assert np.array_equal(mine.view(np.uint8), theirs), name
    return "agrees"


def fuzz(root: Path, rng: random.Random, rounds: int, seconds: float) -> Counter[str]:
    """Damages and checks until one of the limits; counts what came of the inputs."""
    folder = root / "seed"
    if not folder.exists():
        write_seed(folder)
    seeds = {file: file.read_bytes() for file in folder.iterdir()}
    counts: Counter[str] = Counter()
    started = time.monotonic()
    while sum(counts.values()) < rounds and time.monotonic() - started < seconds:
        file = rng.choice(sorted(seeds))
        data = seeds[file]
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            data = damage(data, rng)
        file.write_bytes(data)
        try:
            counts[check(folder)] += 1
        except BaseException:
            found = Path(tempfile.mkdtemp(prefix="finding", dir=Path.cwd())) / "checkpoint"
            print(f"seen in {shutil.copytree(folder, found)}, {file.name} is damaged")
            raise
        file.write_bytes(seeds[file])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        rng = random.Random(arguments.seed)
        print(dict(fuzz(Path(root), rng, 1 << 60, 60 * arguments.minutes)))


if __name__ == "__main__":
    main()
