"""The streaming merge of four 0.25 GB bf16 files, against a loop and the floor of its file I/O."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merit_fast.kernels.average import average_arrays
from merit_fast.merge import MergeConfig
from merit_fast.merge.engine.driver import write_shard
from merit_fast.merge.engine.layout import lay_out
from merit_fast.merge.engine.plan import plan_merge
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.model import peak_memory_bytes, reset_peak_memory

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    root = tmp_path_factory.mktemp("models")
    for k in range(4):
        generator = torch.Generator().manual_seed(k)
        tensors = {
            f"layer.{i}": torch.randn(2048, 2048, generator=generator).bfloat16() for i in range(30)
        }
        (root / f"m{k}").mkdir()
        save_file(tensors, root / f"m{k}/model.safetensors", {"format": "pt"})
    yield [root / f"m{k}" for k in range(4)]
    shutil.rmtree(root)


def streaming(models: list[Path], out: Path, threads: int) -> None:
    files = lay_out([read_checkpoint(model) for model in models], None, None)
    plan = plan_merge(files, lambda entry: tuple(WEIGHTS))
    write_shard(plan.shards[0], MergeConfig(threads=threads), out, lambda _: None)


def safetensors_loop(models: list[Path], out: Path) -> None:
    """Averages one tensor at a time in fp32, as the usual script does."""
    open_file: Any = safe_open  # untyped
    files = [open_file(model / "model.safetensors", framework="pt") for model in models]
    merged = {}
    for name in files[0].keys():  # noqa: SIM118
        total = WEIGHTS[0] * files[0].get_tensor(name).float()
        for weight, file in zip(WEIGHTS[1:], files[1:], strict=True):
            total = total + weight * file.get_tensor(name).float()
        merged[name] = total.bfloat16()
    save_file(merged, out, {"format": "pt"})


def file_floor(models: list[Path], out: Path) -> None:
    """Reads every input and writes one output in 512 KiB pieces on one thread, no arithmetic."""
    buffer = bytearray(512 * 1024)
    source = [os.open(model / "model.safetensors", os.O_RDONLY) for model in models]
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    size = os.fstat(source[0]).st_size
    for at in range(0, size, len(buffer)):
        for descriptor in source:
            count = os.preadv(descriptor, [buffer], at)
        os.pwrite(target, memoryview(buffer)[:count], at)
    for descriptor in (*source, target):
        os.close(descriptor)


def in_cache(arrays: list[np.ndarray], out: np.ndarray) -> None:
    average_arrays(arrays, WEIGHTS, dtypes=["BF16"] * 4, out_dtype="BF16", out=out)


def bench_average_of_bf16_in_cache(benchmark: Any) -> None:
    """Only the arithmetic, on one thread, of 128 Ki elements: us / 131 is ns per element."""
    torch.manual_seed(0)
    arrays = [(torch.randn(1 << 17) * 0.02).bfloat16().view(torch.uint16).numpy() for _ in WEIGHTS]
    out = np.empty(1 << 17, np.uint16)
    benchmark.group = "4-way average of 128 Ki bf16 in cache, 1 thread"
    benchmark.pedantic(in_cache, args=(arrays, out), rounds=200, warmup_rounds=20)


RUNS: dict[str, Callable[[list[Path], Path], None]] = {
    "merit_fast, 1 thread": lambda models, out: streaming(models, out, 1),
    "merit_fast, 2 threads": lambda models, out: streaming(models, out, 2),
    "safetensors loop": safetensors_loop,
    "pread + pwrite floor": file_floor,
}


@pytest.mark.parametrize("name", RUNS)
def bench_merge_4_way(benchmark: Any, models: list[Path], tmp_path: Path, name: str) -> None:
    torch.set_num_threads(2)
    out = tmp_path / "out.safetensors"
    if "floor" not in name:
        RUNS[name](models, out)
        inputs = [load_file(model / "model.safetensors")["layer.7"].double() for model in models]
        truth = torch.stack([w * x for w, x in zip(WEIGHTS, inputs, strict=True)]).sum(0)
        error = (load_file(out)["layer.7"].double() - truth).abs().max()
        assert error <= truth.abs().max() * 2**-8
        del inputs, truth
    reset_peak_memory()
    before = peak_memory_bytes()
    RUNS[name](models, tmp_path / "memory.safetensors")
    benchmark.extra_info["extra_peak_mib"] = (peak_memory_bytes() - before) >> 20
    benchmark.group = "4-way average of 0.25 GB bf16, page cache warm, no fsync"
    benchmark.pedantic(RUNS[name], args=(models, out), rounds=7, warmup_rounds=1)


def read_floor(models: list[Path]) -> None:
    """Reads every input byte once, in 8 MiB pieces, with the kernel's sequential readahead."""
    buffer = bytearray(8 << 20)
    for model in models:
        descriptor = os.open(model / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


COLD: dict[str, Callable[[list[Path], Path], None]] = {
    "merit_fast, 2 threads": lambda models, out: streaming(models, out, 2),
    "safetensors loop": safetensors_loop,
    "read floor": lambda models, out: read_floor(models),
}


@pytest.mark.parametrize("name", COLD)
def bench_merge_4_way_cold(benchmark: Any, models: list[Path], tmp_path: Path, name: str) -> None:
    """Drops the inputs from the page cache first; a host or controller may still hold them."""
    out = tmp_path / "out.safetensors"

    def drop_inputs() -> None:
        for model in models:
            descriptor = os.open(model / "model.safetensors", os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    benchmark.group = "4-way average of 0.25 GB bf16, inputs not in the page cache, no fsync"
    benchmark.pedantic(
        COLD[name], args=(models, out), setup=drop_inputs, rounds=11, warmup_rounds=0
    )
