"""The script of ``--to shell`` does the units in order, in parallel where the user says so."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from support.execution.launches import CONFIG, check_order, write_config
from support.paths import ROOT
from support.runs import run_values


def test_units_run_in_order_with_hard_names(project, programs, make_jobs):
    result = programs.run(make_jobs("shell") / "run.sh")
    assert result.returncode == 0, result.stderr
    calls = programs.calls()
    check_order([call.unit for call in calls])
    for call in calls:
        assert call.folder == str(project)
        assert call.words == ["unit", CONFIG, "train.engine_config=null", call.unit]


def test_a_unit_that_fails_ends_the_script(project, programs, make_jobs):
    result = programs.run(make_jobs("shell") / "run.sh", FAILS="sketch")
    assert result.returncode != 0
    assert programs.units()[-1] == "sketch" and "split" not in programs.units()


def test_a_branch_that_fails_leaves_the_others(project, programs, make_jobs):
    jobs = make_jobs("shell", "--workers", 3)
    result = programs.run(jobs / "run.sh", FAILS="train/merit-0")
    assert result.returncode != 0
    units = programs.units()
    assert {"train/merit-0", "train/merit-1", "train/joint"} <= set(units)
    assert not any(unit.startswith("merge/") for unit in units)


def test_branches_at_a_time_have_gpus_of_their_own(project, programs, make_jobs):
    for name in ("merit-fast", "torchrun"):
        programs.add(name, body="time.sleep(0.3)")
    result = programs.run(make_jobs("shell", "--workers", 2, "--gpus", 2) / "run.sh")
    assert result.returncode == 0, result.stderr
    check_order(programs.units())
    calls = programs.calls("torchrun")
    assert {call.unit for call in calls} == {"train/merit-0", "train/merit-1", "train/joint"}
    for call in calls:
        start = ["--standalone", "--nproc-per-node", "2", "-m", "merit_fast", "unit"]
        assert call.words == [*start, CONFIG, "train.engine_config=null", call.unit]
    devices = {call.unit: call.environment["CUDA_VISIBLE_DEVICES"] for call in calls}
    assert set(devices.values()) == {"0,1", "2,3"}
    both = [
        (a, b) for a in calls for b in calls if a is not b and a.times[0] < b.times[0] < a.times[1]
    ]
    assert both, "no two branches ran at a time"
    assert all(devices[a.unit] != devices[b.unit] for a, b in both)
    parts = [call for call in programs.calls() if call.unit.startswith("sketch/")]
    assert {call.environment["CUDA_VISIBLE_DEVICES"] for call in parts} == {"0", "1", "2"}


def test_where_the_split_decides_the_script_runs_the_rest(project, programs, make_jobs):
    write_config(Path(CONFIG), split={"groups": "auto"})
    jobs = make_jobs("shell", "--workers", 2)
    assert programs.run(jobs / "run.sh").returncode == 0
    *units, rest = programs.calls()
    assert [call.unit for call in units[-2:]] == ["sketch", "split"]
    inputs = [CONFIG, "train.engine_config=null"]
    assert rest.words == ["run", *inputs, "--executor", "local", "--workers", "2"]


@pytest.mark.process
def test_a_real_unit_is_done(call, tmp_path, monkeypatch, programs, tiny_model, tiny_mixture):
    """All units are stand-ins but the sketch of one dataset, which is real."""
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"]["controls"] = {}
    Path("run.yml").write_text(yaml.safe_dump(values))
    name = tiny_mixture[0]["name"]
    program = [sys.executable, "-m", "merit_fast"]
    real = f"if words[-1] == 'sketch/{name}':\n    code = subprocess.call({program!r} + words)"
    programs.add("merit-fast", body=real)
    code, script, error = call("launch", "run.yml", "--to", "shell")
    assert code == 0, error
    Path("run.sh").write_text(script)
    result = programs.run(Path("run.sh"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    code, states, _ = call("unit", "run.yml", "--json")
    assert f'{{"name": "sketch/{name}", "state": "done"' in states
    assert states.count('"done"') == 1
    assert os.listdir(f"out/units/sketch/{name}")
