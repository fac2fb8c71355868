"""Units whose outputs meet in a store: machines that share nothing make one process's bytes."""

import json

import pytest
import yaml
from support.checks import tree_bytes
from support.runs import MEASURED, Notes
from support.storage.machines import WEIGHTS, forget, machine, ready

from merit_fast.errors import InputError, MeritFastError
from merit_fast.execution.board import Board
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.storage.place import list_objects, open_place
from merit_fast.pipeline.storage.store import OutputStore
from merit_fast.pipeline.units import stored
from merit_fast.pipeline.units.doing import do_unit, units_for
from merit_fast.pipeline.units.listing import is_done, list_units
from merit_fast.pipeline.units.stored import do_stored_unit, take_plan


def test_machines_that_share_nothing_make_the_bytes_of_one_process(
    by_machines, finished_run, tmp_path
):
    storage, done = by_machines
    run = machine(tmp_path, finished_run, storage)
    take_plan(run)
    units = list_units(run.outputs)
    assert set(done) == set(units)
    there = run.outputs.store
    results = 0
    for unit in units.values():
        key = run.outputs.records.name(unit.path), unit.manifest.fingerprint
        files = there.manifest(*key).files
        folder = there.folder(*key)
        for name in files.keys() - {*MEASURED, "evaluate.json"}:  # these hold seconds
            if unit.path.is_relative_to(run.outputs.root / "units"):
                continue
            file = finished_run.out / unit.path.relative_to(run.outputs.root) / name
            assert there.place.store.cat_file((folder / name).path) == file.read_bytes(), file
            results += 1
    assert results > 40


def test_a_unit_fetches_what_it_reads_and_no_weights_for_their_json(by_machines):
    _, done = by_machines
    fetched = {name: copied["downloaded_bytes"] for name, copied in done.items()}
    assert fetched["sketch/codes"] == 0
    assert fetched["train/merit-0"] == fetched["evaluate/base"] < 20_000  # the split
    assert fetched["merge/merit"] > 2 * WEIGHTS
    assert WEIGHTS < fetched["evaluate/merit"] < 2 * WEIGHTS
    assert fetched["evaluate"] < WEIGHTS and fetched["report"] < WEIGHTS
    assert done["merge/merit"]["uploaded_bytes"] > WEIGHTS


def test_a_unit_that_is_done_moves_no_file(store, finished_run, tmp_path):
    before = list_objects(open_place(store))
    run = machine(tmp_path, finished_run, store)
    assert not do_stored_unit(run, "merge/merit")
    assert not (run.outputs.root / "merged").exists()
    assert list_objects(open_place(store)) == before


def test_the_same_unit_twice_at_once_is_one_output(store, finished_run, tmp_path, monkeypatch):
    """The other machine finishes while this one has the trained branch and has not sent it."""
    forget(store, "branches/merit-1")
    slow = machine(tmp_path / "slow", finished_run, store)
    fast = machine(tmp_path / "fast", finished_run, store)

    def work_and_wait(run, name):
        worked = do_unit(run, name)
        if run is slow:
            assert do_stored_unit(fast, name)
        return worked

    monkeypatch.setattr(stored, "do_unit", work_and_wait)
    before = set(list_objects(open_place(store)))
    assert do_stored_unit(slow, "train/merit-1")
    assert "train/merit-1: another process was faster; its output counts" in slow.progress.notes
    new = set(list_objects(open_place(store))) - before
    assert len({path.split("attempt-")[1].split("/")[0] for path in new if "attempt-" in path}) == 1
    reader = machine(tmp_path / "reader", finished_run, store)
    take_plan(reader)
    unit = list_units(reader.outputs)["train/merit-1"]
    reader.take(unit.path, unit.manifest)
    weights = "*.safetensors"
    assert all(
        file.read_bytes() == (finished_run.out / "branches/merit-1" / file.name).read_bytes()
        for file in unit.path.glob(weights)
    )


def test_shares_of_a_merge_come_from_other_machines(store, finished_run, tmp_path):
    forget(store, "merged/merit")
    forget(store, "units/shares")
    for i in (1, 2):
        share = machine(tmp_path / f"share-{i}", finished_run, store)
        take_plan(share)
        units = units_for(share, "merge/merit")
        name = next(name for name in units if name.startswith(f"merge/merit/{i}-of-"))
        assert do_stored_unit(share, name)
        assert share.outputs.store.uploaded > 10_000
    run = machine(tmp_path / "whole", finished_run, store)
    assert do_stored_unit(run, "merge/merit")
    assert (run.outputs.root / "units" / "shares").exists()
    ours, theirs = tree_bytes(run.outputs.root / "merged"), tree_bytes(finished_run.out / "merged")
    assert [name for name in theirs if ours[name] != theirs[name]] in ([], ["merit/stage.json"])


def test_shares_of_a_sketch_come_from_other_machines(store, finished_run, tmp_path):
    forget(store, "units/sketch/codes")
    assert do_stored_unit(machine(tmp_path / "a", finished_run, store), "sketch/codes/1-of-2")
    run = machine(tmp_path / "b", finished_run, store)
    assert do_stored_unit(run, "sketch/codes")
    assert run.outputs.store.downloaded > 10_000  # the share's sums
    file = "codes.safetensors"
    ours = (run.outputs.root / "units/sketch/codes" / file).read_bytes()
    assert ours == (finished_run.out / "sketch" / file).read_bytes()


def test_a_unit_whose_needs_are_absent_or_damaged_does_nothing(store, finished_run, tmp_path):
    forget(store, "merged/merit")
    run = machine(tmp_path / "a", finished_run, store)
    with pytest.raises(InputError, match=r"evaluate/x: must be a unit of this run"):
        do_stored_unit(run, "evaluate/x")
    forget(store, "units/evaluate/merit")
    with pytest.raises(InputError, match="evaluate/merit: needs merge/merit, which is not done"):
        do_stored_unit(machine(tmp_path / "b", finished_run, store), "evaluate/merit")
    place = open_place(store)
    [shard] = [p for p in list_objects(place) if "merit-0/attempt" in p and "00001-of" in p][:1]
    place.store.pipe_file((place / shard).path, b"other")
    run = machine(tmp_path / "c", finished_run, store)
    with pytest.raises(MeritFastError, match=rf"{shard}: 5 bytes instead of [\d,]+$"):
        do_stored_unit(run, "merge/merit")
    assert not (run.outputs.root / "merged").exists()
    assert not (run.outputs.root / "branches" / "merit-0").exists()


def test_a_disk_that_is_too_small_is_bad_input_before_the_first_file(
    store, finished_run, tmp_path, monkeypatch
):
    forget(store, "merged/merit")
    monkeypatch.setattr(stored, "free_bytes", lambda path: 1000)
    run = machine(tmp_path, finished_run, store)
    with pytest.raises(InputError, match=r"must have .* free for the unit's inputs, the disk has"):
        do_stored_unit(run, "merge/merit")
    assert not (run.outputs.root / "branches").exists()


def test_a_dataset_with_another_name_takes_the_branches_over(store, finished_run, tmp_path):
    values = yaml.safe_load(finished_run.copy_config(tmp_path).read_text())
    for entry in values["mixture"]:
        entry["name"] = f"new-{entry['name']}"
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))

    def renamed():
        config = read_run_config(tmp_path / "run.yml")
        return Run(config, Notes(), store=OutputStore(open_place(store)))

    for name in ("sketch", "split"):
        for part in [p for p in ready(renamed()) if p.startswith(name)]:
            do_stored_unit(renamed(), part)
        if name == "sketch":
            do_stored_unit(renamed(), name)
    run = renamed()
    take_plan(run)
    units = list_units(run.outputs)
    assert is_done(units["train/merit-0"], run.outputs)
    stored._take_inputs(run, units["merge/merit"], units)
    branch = json.loads((units["train/merit-0"].path / "branch.json").read_text())
    assert branch["datasets"] and all(name.startswith("new-") for name in branch["datasets"])


def test_a_driver_sees_the_split_that_another_one_has_finished(store, finished_run, tmp_path):
    forget(store, "split")

    def make_data():
        run = machine(tmp_path / "head", finished_run, store)
        take_plan(run)
        return run.data

    board = Board(make_data)
    assert list(board.missing) == ["split"]
    assert do_stored_unit(machine(tmp_path / "other", finished_run, store), "split")
    board.refresh()
    assert "merge/merit" in board.units and not board.missing
