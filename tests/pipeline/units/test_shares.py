"""Shares of one unit, and the states of all of them: no death, loss or damage costs a bit."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import yaml
from support.execution.units import ready, results, run_of
from support.paths import KILL_AT
from support.runs import Notes
from support.warm import run_python, run_together

from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.manifests.locks import Owner, exclusive, stage_lock
from merit_fast.pipeline.config import read_run_config, write_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.doing import do_unit
from merit_fast.pipeline.units.journal import JOURNAL, write_event
from merit_fast.pipeline.units.sharing import merge_shares, sketch_shares


def test_shares_hold_disjoint_files_and_the_whole_only_links_to_them(by_units):
    file, _ = by_units
    out = file.parent / "out"
    spans = [path.name for path in (out / "units/shares/sketch/codes").rglob("0*.safetensors")]
    assert sorted(spans) == ["00000.safetensors", "00001.safetensors"]
    merged = {path.name: path for path in (out / "merged/merit").glob("*.safetensors")}
    parts = list((out / "units/shares/merge/merit").rglob("*.safetensors"))
    assert sorted(path.name for path in parts) == sorted(merged)
    assert all(path.samefile(merged[path.name]) for path in parts)


@pytest.mark.process
def test_shares_of_a_sketch_that_are_killed_or_lost_or_damaged_cost_no_bit(by_units, tmp_path):
    file, _ = by_units
    out = tmp_path / "out"
    shutil.copytree(file.parent / "out", out)
    shutil.copy(file, tmp_path)
    expected = results(out)
    for gone in ("sketch", "units/sketch", "units/shares/sketch/codes", "split"):
        shutil.rmtree(out / gone)
    command = ["unit", str(tmp_path / "run.yml"), "sketch/codes/2-of-2"]
    killed = run_python([str(KILL_AT), "codes/00001.safetensors", "1", *command], timeout=300)
    assert killed.returncode == -9, killed.stderr
    ended = run_together([["-m", "merit_fast", *command]] * 2, timeout=300)  # twice at once
    assert [process.returncode for process in ended] == [0, 0], ended
    [span] = (out / "units/shares/sketch/capitals/1-of-2").rglob("0*.safetensors")
    span.write_bytes(span.read_bytes()[:-8] + b"damaged!")
    names = [f"sketch/{name}" for name in run_of(file).outputs.contents]
    for name in (*names, "sketch", "split"):  # codes without its first share
        assert do_unit(run_of(tmp_path / "run.yml"), name)
    ours = results(out)
    assert [name for name in expected if ours.get(name) != expected[name]] == []


def test_files_of_a_merge_are_proved_before_they_are_taken_over(by_units, tmp_path):
    file, _ = by_units
    out = tmp_path / "out"
    shutil.copytree(file.parent / "out", out)
    shutil.copy(file, tmp_path)
    expected = results(out)
    shutil.rmtree(out / "merged")
    first, *_ = (out / "units/shares/merge/merit").rglob("*.safetensors")
    first.write_bytes(first.read_bytes()[:-2] + b"??")
    notes = Notes()
    assert do_unit(Run(read_run_config(tmp_path / "run.yml"), notes), "merge/merit")
    assert any("is not as it was written; merging it again" in note for note in notes.notes)
    assert results(out) == expected


def test_kfac_s_factors_are_a_unit_and_its_datasets_give_the_bytes_of_one_process(
    configured, tmp_path
):
    file = configured("kfac")
    values = yaml.safe_load(file.read_text())
    values["split"] |= {"normalize": "kfac", "damping": 0.2}
    values["mixture"] = values["mixture"][:3]
    file.write_text(yaml.safe_dump(values))
    whole = Run(read_run_config(file), Notes())
    whole.sketch()
    whole.split()
    expected = results(file.parent / "out")
    shutil.move(file.parent / "out", tmp_path / "out")
    order = random.Random(1)
    done = []
    while "split" not in done:
        name = order.choice(ready(file))
        assert do_unit(run_of(file), name)
        done.append(name)
    assert done[0] == "factors" and len(done) == 1 + 3 * 3 + 2
    assert results(file.parent / "out") == expected


def test_status_shows_who_does_what_from_the_files(by_units, tmp_path, call):
    file, _ = by_units
    out = tmp_path / "out"
    shutil.copytree(file.parent / "out", out)
    shutil.copy(file, tmp_path)
    code, text, error = call("status", out)
    assert code == 0 and "sketch/codes/1-of-2" not in text, error  # no driver has worked here
    run = run_of(tmp_path / "run.yml")
    write_run_config(run.config, out / UNITS_FOLDER / "config.yml")
    for gone in ("report", "merged/merit", "units/evaluate/merit", "evaluate"):
        shutil.rmtree(out / gone)
    end = {"event": "end", "seconds": 3.0}
    for event in (
        {**end, "unit": "merge/merit", "code": 1, "host": "a"},
        {**end, "unit": "merge/merit", "code": -9, "host": "b"},
        {**end, "unit": "split", "code": 1, "host": "a"},
        {**end, "unit": "split", "code": 0, "host": "b"},
    ):
        write_event(out / UNITS_FOLDER, event)
    with (out / UNITS_FOLDER / JOURNAL).open("a") as journal:
        journal.write('{"event": "end", "unit": "spl')  # a driver died here
    shutil.move(out, tmp_path / "moved")  # another machine may see it elsewhere
    lock = stage_lock(tmp_path / "moved", "merged/merit")
    with exclusive(lock, Owner(1, "node7", "merit-fast unit", "2026-01-02T03:04:05", "")):
        code, text, error = call("status", tmp_path / "moved")
        _, answer, _ = call("status", tmp_path / "moved", "--json")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert code == 0, error
    assert lines["merge/merit"] == "running on node7 since 2026-01-02 03:04:05, failed 2 times"
    assert lines["split"] == "done in 3 s on b"
    assert lines["evaluate/merit"].startswith("waiting for merge/merit")
    assert lines["train/merit-0"] == "done" and lines["report"].startswith("waiting for evaluate")
    states = {unit["name"]: unit for unit in json.loads(answer)["units"]}
    assert states["merge/merit"]["host"] == "node7" and states["merge/merit"]["failures"] == 2
    config = tmp_path / "moved" / UNITS_FOLDER / "config.yml"
    config.write_text(config.read_text().replace(str(run.config.model), str(tmp_path / "absent")))
    code, text, error = call("status", tmp_path / "moved")
    assert code == 0 and "split" in text, error
    assert "units: their states cannot be told here: " in text.splitlines()[-1]


@pytest.mark.parametrize(
    "key",
    ["scale=auto", "stats=true", "dtype=fp8-block128", "shard_size=1G", "form=distcp"],
)
def test_a_merge_of_one_file_or_with_work_of_its_own_is_not_shared(by_units, key):
    file, _ = by_units
    assert merge_shares(Run(read_run_config(file)).outputs) > 2
    assert merge_shares(Run(read_run_config(file, [f"merge.{key}"])).outputs) == 1


def test_no_row_is_read_for_shares_where_no_dataset_can_be_cut(by_units):
    file, _ = by_units
    split = read_run_config(file).split
    run = run_of(file)
    assert set(sketch_shares(split, run.data.rows).values()) == {2}
    for options in ({"span": 6}, {"precision": 0.1}):
        assert sketch_shares(replace(split, **options), rows=None) == {}
