"""``merit-fast sketch`` under torchrun: processes share the passes, and may divide the model."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from support.runs import run_values
from support.warm import run_together

from merit_fast.cli.main import main
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

ROWS = {"parts": {"mlp": "mlp"}, "store": True, "store_dim": 4096, "examples": 7, "batch_size": 2}


def sums_and_rows(folder):
    files = (file for file in (folder / "out" / "sketch").rglob("*") if file.is_file())
    kept = {str(f.relative_to(folder)): f.read_bytes() for f in files if f.suffix == ".safetensors"}
    return kept | {
        name: (folder / "out" / "sketch" / name).read_text() for name in ("datasets.json",)
    }


@pytest.mark.process
def test_two_processes_write_the_bytes_of_one(tmp_path, tiny_model, tiny_mixture):
    values = run_values(tiny_model, tiny_mixture)
    values["split"] |= ROWS
    for number, memory in enumerate(("auto", "whole", "divided")):
        folder = tmp_path / memory
        folder.mkdir()
        values["split"]["memory"] = memory
        (folder / "run.yml").write_text(yaml.safe_dump(values))
        if memory == "auto":
            with contextlib.chdir(folder):
                assert Run(read_run_config(Path("run.yml"))).sketch()
            continue
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(29500 + (os.getpid() + 61 * number) % 2000),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        results = run_together(
            [["-m", "merit_fast", "sketch", "run.yml"]] * 2,
            cwd=folder,
            environments=[{**os.environ, **common, "RANK": str(rank)} for rank in range(2)],
            timeout=240,
        )
        assert [result.returncode for result in results] == [0, 0], results
        assert [result.stdout.count("sketch: done") for result in results] == [1, 0]
        assert sums_and_rows(folder) == sums_and_rows(tmp_path / "auto")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"warmup": 0.25}, "split.warmup 0.25: WORLD_SIZE must be 1, got 2"),
        ({"normalize": "kfac"}, "split.normalize kfac: WORLD_SIZE must be 1, got 2"),
        ({"memory": "divided"}, "split.memory: must not be divided, transformers converts"),
    ],
)
def test_what_one_process_must_do_is_refused_before_processes_join(
    tmp_path, tiny_model, tiny_mixture, monkeypatch, capsys, options, message
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    values = run_values(base, tiny_mixture)
    values["split"] |= options
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["merit-fast", "sketch", "run.yml"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "sketch").exists()
