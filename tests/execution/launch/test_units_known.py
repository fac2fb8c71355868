"""Launch knows the units of a run before the split where the config decides them."""

import json

import pytest
import yaml
from support.runs import run_values

from merit_fast.execution.launch import prepare
from merit_fast.execution.launch.steps import predicted_units, steps_of, undecided
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.listing import list_units


@pytest.fixture(scope="module")
def split_run(tmp_path_factory, tiny_model, tiny_mixture):
    """The YAML of a run that is split into two groups."""
    folder = tmp_path_factory.mktemp("launch")
    values = run_values(tiny_model, tiny_mixture)
    values["split"]["examples"] = 4
    values["train"]["controls"] = {}
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(values))
    run = Run(read_run_config(file))
    run.sketch()
    run.split()
    return file


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["train.controls.joint=true", "train.controls.iid=2", "evaluate.audit=true"],
        ["train.controls.joint_low=0.5", "train.controls.joint_short=true", "train.seeds=2"],
    ],
)
def test_predicted_units_are_those_of_the_split(split_run, assignments):
    config = read_run_config(split_run, assignments)
    assert undecided(config) == ""
    units = list_units(Outputs(config, "merit-fast"))
    assert set(predicted_units(config)) == set(units)
    steps = steps_of(config, list(units), 0)
    position = {unit: i for i, step in enumerate(steps) for unit in step.units}
    before = {}
    for i, step in enumerate(steps):
        earlier = [j for j, other in enumerate(steps) if other.name in step.after]
        before[i] = set(earlier).union(*(before[j] for j in earlier))
    for name, unit in units.items():
        mine = position[name]
        for need in unit.needs:  # in an earlier step that is waited for, or earlier in a sequence
            if position[need] != mine:
                assert position[need] in before[mine], f"{name} does not wait for {need}"
            else:
                order = steps[mine].units
                assert not steps[mine].is_parallel
                assert order.index(need) < order.index(name)


def test_with_kfac_the_datasets_wait_for_one_job_that_collects_the_factors(split_run):
    config = read_run_config(split_run, ["split.normalize=kfac"])
    known = list(list_units(Outputs(config, "merit-fast")))  # up to the split
    predicted = predicted_units(config)
    assert predicted[: len(known)] == known and known[0] == "factors"
    first, second, *_ = steps_of(config, predicted, 4)
    assert (first.name, first.units, first.gpus) == ("factors", ("factors",), 1)
    assert (second.name, second.after, second.is_parallel) == ("sketch", ("factors",), True)


@pytest.mark.parametrize(
    "assignment, key",
    [
        ("split.groups=auto", "split.groups: auto"),
        ("train.controls.random=2", "train.controls.random: 2"),
    ],
)
def test_where_the_split_decides_the_files_end_with_it(call, split_run, tmp_path, assignment, key):
    words = ["--to", "slurm", f"output={tmp_path / 'new'}", *_dtypes(split_run)]
    code, shown, error = call("launch", split_run, *words, assignment, "--json")
    assert code == 0
    files = json.loads(shown)["files"]
    assert set(files) == {"sketch.sbatch", "split.sbatch", "submit.sh"}
    for text in files.values():
        assert f"# The split decides the branches ({key}), so the jobs end with it." in text
    assert f"the split decides the branches ({key}): these files end with it" in error


def test_after_the_split_the_files_have_the_rest(call, split_run):
    code, shown, error = call("launch", split_run, "--to", "slurm", *_dtypes(split_run), "--json")
    assert (code, error) == (0, "")
    files = json.loads(shown)["files"]
    assert "sketch.sbatch" not in files and "split.sbatch" not in files
    lines = [line.strip() for line in files["train.sbatch"].splitlines()]
    assert [line for line in lines if line.startswith("train/")] == [
        "train/merit-0",
        "train/merit-1",
    ]
    assert "train=$(submit train.sbatch)" in files["submit.sh"].splitlines()


def test_a_finished_run_has_nothing_to_launch(call, split_run, monkeypatch):
    monkeypatch.setattr(prepare, "missing_units", lambda units, outputs: {})
    code, shown, _ = call("launch", split_run, "--to", "shell", "--out", split_run.parent / "jobs")
    assert code == 0
    assert shown == f"{split_run.parent}/out: every unit is done; there is nothing to launch\n"
    assert not (split_run.parent / "jobs").exists()


def _dtypes(file):
    config = read_run_config(file)
    sections = ("split", "train", "evaluate")
    return [f"{name}.dtype={getattr(config, name).dtype}" for name in sections]
