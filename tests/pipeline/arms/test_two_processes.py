"""merit-fast train in two processes, as torchrun starts them: the branches of one process."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import run_values
from support.warm import run_together

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.model import load_model
from merit_fast.pipeline.branches import _job
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_mixture):
    """One split, its branches trained in this process, and in a copy by two processes."""
    folder = tmp_path_factory.mktemp("two")
    values = run_values(tiny_model, tiny_mixture[:2])
    values["train"] |= {
        "learning_rate": 5e-3,
        "evaluate_steps": 2,
        "patience": 3,
        "controls": {},
        "packing": True,
        "adapter": {"kind": "lora", "rank": 2, "targets": ["q_proj", "down_proj"]},
    }
    (folder / "one").mkdir()
    (folder / "one" / "run.yml").write_text(yaml.safe_dump(values))
    with contextlib.chdir(folder / "one"):
        run = Run(read_run_config(Path("run.yml")))
        run.sketch()
        run.split()
        shutil.copytree(folder / "one", folder / "two")
        run.train()
    return folder, train_in_two(folder / "two" / "run.yml")


def train_in_two(file, *words, **variables):
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
        **variables,
    }
    results = run_together(
        [["-m", "merit_fast", "train", str(file), *words]] * 2,
        environments=[{**os.environ, **common, "RANK": str(rank)} for rank in range(2)],
        timeout=240,
    )
    assert [result.returncode for result in results] == [0, 0], results
    return results


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_none(values):
    return [value or 0 for value in values] if isinstance(values, list) else values


@pytest.mark.process
def test_two_processes_train_the_branches_of_one(runs):
    folder, results = runs
    assert [result.stdout.count("train: done") for result in results] == [1, 0]
    names = sorted(path.name for path in (folder / "one" / "out" / "branches").iterdir())
    assert names
    for name in names:
        one, two = (folder / run / "out" / "branches" / name for run in ("one", "two"))
        assert sorted(path.name for path in one.iterdir()) == sorted(
            path.name for path in two.iterdir()
        )
        assert (one / "branch.json").read_text() == (two / "branch.json").read_text()
        assert len(metrics(one)) == len(metrics(two))
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"seconds"}:
                assert without_none(ours[key]) == pytest.approx(without_none(theirs[key]), rel=1e-4)
        ends = [load_model(str(path), "fp32").state_dict() for path in (one, two)]
        for key, tensor in ends[0].items():
            torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.process
def test_auto_divides_a_model_where_whole_ones_do_not_fit(runs):
    folder, _ = runs
    shutil.copytree(folder / "two", folder / "auto")
    shutil.rmtree(folder / "auto" / "out" / "branches")
    many = str(10**9)  # processes on this machine
    file = folder / "auto" / "run.yml"
    results = train_in_two(file, "train.shard=auto", LOCAL_WORLD_SIZE=many)
    assert "train.shard auto is full: whole models need" in results[0].stderr
    assert "train.shard auto" not in results[1].stderr
    names = [path.name for path in (folder / "auto/out/branches").iterdir() if path.is_dir()]
    assert names
    for name in names:
        ends = [
            load_model(str(folder / run / "out/branches" / name), "fp32").state_dict()
            for run in ("one", "auto")
        ]
        for key, tensor in ends[0].items():
            torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_hands_the_division_to_its_branches_and_trains_none_again(runs, monkeypatch):
    folder, _ = runs
    monkeypatch.chdir(folder / "one")
    run = Run(read_run_config(Path("run.yml"), ["train.shard=full"]))
    for branch in run.outputs.plan.trained:
        _, recipe = _job(branch, run.outputs, run.data)
        assert recipe.shard == "full"
    assert not run.train()
    warmup = Run(read_run_config(Path("run.yml"), ["train.shard=full", "split.warmup=0.25"]))
    assert _job(warmup.outputs.warmup, warmup.outputs, warmup.data)[1].shard == "none"


def test_a_base_that_cannot_be_divided_is_refused_before_processes_join(
    tmp_path, tiny_model, tiny_mixture, monkeypatch, capsys
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    values = run_values(base, tiny_mixture)
    values["train"]["shard"] = "full"
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["merit-fast", "train", "run.yml"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "train.shard: must be none" in error and "have no model.layers.2." in error
    assert not (tmp_path / "out" / "branches").exists()


@pytest.mark.parametrize("command", ["run", "split", "evaluate"])
def test_other_commands_refuse_several_processes(
    tmp_path, tiny_model, tiny_mixture, monkeypatch, capsys, command
):
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["merit-fast", command, str(file)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert f"{command}: WORLD_SIZE must be 1, got 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_stack_refuses_several_processes_before_they_join(
    tmp_path, tiny_model, tiny_mixture, monkeypatch
):
    """Each process is refused; one that waited for a refused leader would end in a traceback."""
    values = run_values(tiny_model, tiny_mixture)
    values["train"]["engine"] = "trl"
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="train.engine trl: WORLD_SIZE must be 1, got 2"):
        Run(read_run_config(Path("run.yml"))).train()


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    from merit_fast.train.parallel.world import world_size

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK: must be below WORLD_SIZE 2, got 2"):
        world_size()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE: must be a number, got 'two'"):
        world_size()


def test_processes_on_gpus_add_cpu_tensors_too(monkeypatch):
    """Sums of losses and counts are CPU tensors, which nccl refuses."""
    from torch import distributed

    from merit_fast.train.parallel import ranks

    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        distributed, "init_process_group", lambda *words, timeout: asked.append((*words, timeout))
    )
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with ranks.joined_ranks():
        pass
    ((backend, timeout),) = asked
    assert timeout.days >= 1  # the others wait while the leader writes a large model
    backends = distributed.distributed_c10d.BackendConfig(distributed.Backend(backend))
    devices = backends.get_device_backend_map()
    assert devices["cpu"] == "gloo" and devices["cuda"] == "nccl"
