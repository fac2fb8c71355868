"""Units of a run: any process does any of them, in any order, to the bytes of one process."""

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.checks import tree_bytes
from support.execution.units import missing, results, run_of
from support.paths import KILL_AT
from support.runs import Notes
from support.warm import run_python, run_together

from merit_fast.errors import InputError
from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.doing import do_unit
from merit_fast.pipeline.units.states import unit_states


def test_units_in_any_order_give_the_bytes_of_one_process(by_units, finished_run):
    file, done = by_units
    ours = results(file.parent / "out")
    theirs = results(finished_run.out)
    assert ours.keys() == theirs.keys()
    evaluated = {"evaluate/evaluate.json"}  # holds the seconds of every training
    assert [name for name in ours if ours[name] != theirs[name] and name not in evaluated] == []
    assert done.index("split") > max(i for i, name in enumerate(done) if name.startswith("sketch"))
    run_of(file).summary()  # the run is finished for every other command too


def test_every_stage_and_part_is_a_unit(by_units):
    file, done = by_units
    units, left = missing(file)
    assert set(done) == set(units) and not left
    stages = {"sketch", "split", "train", "merge", "evaluate", "report"}
    assert {unit.stage for unit in units.values()} == stages
    assert {f"sketch/{name}" for name in run_of(file).outputs.contents} < set(units)
    assert {"evaluate/base", "evaluate/merit", "evaluate/merit-0"} < set(units)
    assert {"sketch/codes/1-of-2", "sketch/codes/2-of-2"} < set(units)
    shares = [name for name in units if name.startswith("merge/merit/")]
    count = len(shares)
    assert count > 2 and shares == [f"merge/merit/{i + 1}-of-{count}" for i in range(count)]
    assert done.index("merge/merit") > max(map(done.index, shares))


def test_a_unit_that_is_done_stays_as_it_is(by_units):
    file, done = by_units
    before = tree_bytes(file.parent / "out")
    assert not any(do_unit(run_of(file), name) for name in done)
    assert tree_bytes(file.parent / "out") == before


def test_a_run_of_one_process_leaves_no_unit_to_do(finished_run, tmp_path):
    finished_run.copy_to(tmp_path)
    units, left = missing(tmp_path / "run.yml")
    assert not left and "sketch/codes" in units
    states = {
        state.name: state.state for state in unit_states(run_of(tmp_path / "run.yml").outputs)
    }
    assert states["sketch/codes"] == "not needed" and states["report"] == "done"


def test_rows_that_change_ask_for_the_units_that_read_them(by_units, tmp_path):
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    values = yaml.safe_load(file.read_text())
    rows = (tmp_path / "codes.jsonl").resolve()
    entry = next(entry for entry in values["mixture"] if entry["name"] == "codes")
    lines = Path(entry["path"]).read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    entry["path"] = str(rows)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    _, left = missing(tmp_path / "run.yml")
    assert "sketch/codes" in left and list(left)[-1] == "split"
    notes = Notes()
    assert do_unit(Run(read_run_config(tmp_path / "run.yml"), notes), "sketch/capitals")
    assert any("their sketches are reused" in note for note in notes.notes)  # not sketched again


@pytest.mark.parametrize(
    "name,rule",
    [
        ("train/merit-9", "train/merit-9: must be a unit of this run: sketch/"),
        ("sketch/code", "sketch/code: must be a unit of this run"),
        ("merge/merit", "must be a unit"),  # before the split nobody knows the merges
        ("split", "split: needs sketch, which is not done"),
    ],
)
def test_a_unit_that_cannot_be_done_is_bad_input(configured, name, rule):
    file = configured("none")
    with pytest.raises(InputError, match=rule):
        do_unit(run_of(file), name)
    assert not (file.parent / "out").exists()


MODULES = """
import sys
sys.argv = ["merit-fast", *sys.argv[1:]]
from merit_fast.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("torch" in sys.modules)
"""


def test_a_merge_starts_without_torch_whatever_its_threads(by_units, tmp_path):
    """Torch takes seconds to load, and a merge may have a unit for each of its files."""
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    shutil.copy(file, tmp_path)
    shutil.rmtree(tmp_path / "out/merged/merit")
    words = ["unit", str(tmp_path / "run.yml"), "merge/merit", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", MODULES, *words], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False", done
    assert "done in" in done.stdout and "merge/merit" not in missing(tmp_path / "run.yml")[1]


@pytest.mark.parametrize("unit", ["sketch", "split", "train/merit-0", "evaluate/base", "evaluate"])
def test_torch_gets_its_threads_before_a_unit_computes(by_units, tmp_path, monkeypatch, unit):
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    shutil.copy(file, tmp_path)
    shutil.rmtree(missing(tmp_path / "run.yml")[0][unit].path)
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr("merit_fast.pipeline.run.sys", SimpleNamespace(modules={}))  # no torch yet
    run = Run(read_run_config(tmp_path / "run.yml", ["threads=1"]), Notes())
    assert threads == []
    assert do_unit(run, unit) and threads == [1]


def test_the_command_line_does_and_lists_units(by_units, configured, call, tmp_path):
    file, _ = by_units
    code, out, error = call("unit", file)
    assert code == 0 and "train/merit-0" in out, error
    code, out, error = call("unit", file.parent / "out", "split")
    assert code == 0 and out == "split: up to date\n", error
    code, _, error = call("unit", tmp_path, "split")
    assert code == 2 and "must be the output of a run; it has no units/config.yml" in error
    code, _, error = call("unit", file, "no/such")
    assert code == 2 and error.splitlines()[-1].startswith("error: no/such: must be a unit")


@pytest.mark.process
@pytest.mark.parametrize(
    "pattern,unit",
    [
        ("sketch.tmp/codes.safetensors", "sketch"),
        ("units/evaluate/merit-0$", "evaluate/merit-0"),
        ("shares/merge/merit/1-of-", "merge/merit/1-of-*"),
    ],
)
def test_a_unit_that_is_killed_is_done_by_the_same_command(by_units, tmp_path, pattern, unit):
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    shutil.copy(file, tmp_path)
    units, _ = missing(tmp_path / "run.yml")
    expected = results(tmp_path / "out")
    [unit] = fnmatch.filter(units, unit)
    shutil.rmtree(units[unit].path)
    command = ["unit", str(tmp_path / "run.yml"), unit]
    killed = run_python([str(KILL_AT), pattern, "1", *command], timeout=300)
    assert killed.returncode == -9, killed.stderr
    again = run_python(["-m", "merit_fast", *command], timeout=300)
    assert again.returncode == 0, again.stderr
    ours = results(tmp_path / "out")
    assert [name for name in expected if ours.get(name) != expected[name]] == []


@pytest.mark.process
@pytest.mark.parametrize("unit", ["train/merit-0", "merge/merit", "evaluate/base"])
def test_the_same_unit_twice_at_once_is_done_once(by_units, tmp_path, unit):
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    shutil.copy(file, tmp_path)
    expected = results(tmp_path / "out")
    shutil.rmtree(missing(tmp_path / "run.yml")[0][unit].path)
    command = ["-m", "merit_fast", "unit", str(tmp_path / "run.yml"), unit]
    ended = run_together([command] * 2, timeout=300)
    assert [process.returncode for process in ended] == [0, 0], ended
    states = sorted(process.stdout.split(":")[1].split()[0] for process in ended)
    assert states == ["done", "up"]
    assert results(tmp_path / "out") == expected


def test_status_shows_the_parts_and_clean_removes_them(by_units, tmp_path, call):
    file, _ = by_units
    shutil.copytree(file.parent / "out", tmp_path / "out")
    shutil.copy(file, tmp_path)
    code, out, error = call("status", tmp_path / "run.yml")
    [line] = [line for line in out.splitlines() if line.startswith("units")]
    assert code == 0 and "not in force" in line, error
    code, _, error = call("clean", tmp_path / "out", "--yes")
    assert code == 0 and not (tmp_path / "out" / UNITS_FOLDER).exists(), error
    code, _, error = call("verify", tmp_path / "out")
    assert code == 0, error
    assert not missing(tmp_path / "run.yml")[1]
