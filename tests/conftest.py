"""Fixtures that several folders share."""

import json
import os
import sys
from pathlib import Path

# Before torch is imported: workers of pytest-xdist share the cores, and threads that wait for work
# by spinning take the time of those that have some.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MERIT_FAST_BACKEND", None)

import pytest
import torch
from support.tiny import make_model, make_tokenizer, write_tasks

GIB_PER_WORKER = 6  # the demo takes 3.5
MAX_WORKERS = 8


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for -n auto
def pytest_xdist_auto_num_workers() -> int:
    memory_gib = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) >> 30
    cores = len(os.sched_getaffinity(0))
    # One more than cores: a worker often waits for a process that it has started.
    return max(1, min(cores + 1, memory_gib // GIB_PER_WORKER, MAX_WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the demo first and slow tests next, so that no worker begins one as the last."""
    marks = ("demo", "slow")
    slow_files = {
        mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in marks
    }

    def rank(item: pytest.Item) -> int:
        return next(
            (i for i, mark in enumerate(marks) if item.path in slow_files[mark]), len(marks)
        )

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty():
    """torch.empty gives NaN in tests, so that a result that was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model directory with tokenizer, in several fp32 shards."""
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer(directory)
    make_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory) -> list[dict]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def native_levels() -> list[str]:
    """The ISA levels this machine can run, of the native module."""
    import platform
    from pathlib import Path as File

    levels = ["generic"]
    flags = File("/proc/cpuinfo").read_text() if File("/proc/cpuinfo").exists() else ""
    if platform.machine() == "x86_64":
        levels += ["avx2"] if " avx2 " in flags and " fma " in flags else []
        avx512 = all(f" {f} " in flags for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq"))
        levels += ["avx512"] if avx512 else []
        levels += ["avx512_bf16"] if avx512 and " avx512_bf16 " in flags else []
    return levels


@pytest.fixture(scope="session")
def branches(tmp_path_factory):
    """Four tied bf16 models in several shards, with tokenizer-like companions."""
    root = tmp_path_factory.mktemp("branches")
    for k in range(4):
        make_model(root / f"b{k}", dtype=torch.bfloat16, shard="60KB", seed=k)
        (root / f"b{k}" / "tokenizer.json").write_text(json.dumps({"of": k}))
    return [root / f"b{k}" for k in range(4)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs merit-fast in this process; returns (exit code, standard output, standard error)."""

    from merit_fast.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merit-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
