"""Units whose outputs meet in a store: machines that share nothing make one process's bytes."""

import json
import random

import pytest
import yaml
from support.checks import tree_bytes
from support.merge.stores import NUMBERS
from support.paths import KILL_AT
from support.runs import MEASURED, Notes
from support.storage.faulty import with_faults
from support.warm import run_python

from merit_fast.errors import InputError, MeritFastError
from merit_fast.execution.board import Board
from merit_fast.execution.command import Ended
from merit_fast.execution.drive import JOURNAL, drive
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.storage import place as place_module
from merit_fast.pipeline.storage.place import list_objects, open_place
from merit_fast.pipeline.storage.store import OutputStore
from merit_fast.pipeline.units import stored
from merit_fast.pipeline.units.doing import do_unit
from merit_fast.pipeline.units.listing import is_done, list_units, missing_units
from merit_fast.pipeline.units.stored import do_stored_unit, take_plan

WEIGHTS = 300_000  # bytes; a model of these tests has more


def machine(folder, finished_run, storage):
    """A run as a fresh process on a machine has it; ``folder`` is that machine's disk."""
    folder.mkdir(exist_ok=True)
    config = read_run_config(finished_run.copy_config(folder))
    return Run(config, Notes(), store=OutputStore(open_place(storage)))


def ready(run):
    take_plan(run)
    units = list_units(run.outputs)
    left = missing_units(units, run.outputs)
    return [name for name, unit in left.items() if not any(n in left for n in unit.needs)]


def forget(storage, name):
    """Removes a unit's output, as if the unit had never been done."""
    place = open_place(storage)
    for path in list_objects(place):
        if path.startswith((f"finished/{name}/", f"outputs/{name}/")):
            place.store.rm_file((place / path).path)


def copy_of(storage):
    """Another store with the same objects."""
    source = open_place(storage)
    copy = open_place(f"memory://run-{next(NUMBERS)}")
    for path in list_objects(source):
        copy.store.pipe_file((copy / path).path, source.store.cat_file((source / path).path))
    return str(copy)


@pytest.fixture(scope="module")
def by_machines(finished_run, tmp_path_factory):
    """A run of which every unit was done on a machine of its own, in a random order.

    A tenth of all requests fails, and all of them are slow.
    """
    storage = f"memory://run-{next(NUMBERS)}"
    order = random.Random(5)
    done = {}
    failed = 0
    head = tmp_path_factory.mktemp("head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_module, "PAUSES_S", (0.0,) * 6)
        while names := ready(machine(head, finished_run, storage)):
            name = order.choice(names)
            run = machine(tmp_path_factory.mktemp("machine"), finished_run, storage)
            faulty = with_faults(run.outputs.store.place, 0.1, 0.01, seed=len(done))
            assert do_stored_unit(run, name)
            done[name] = run.outputs.store.copied_bytes()
            failed += faulty.failed
    assert failed > 10
    return storage, done


@pytest.fixture
def store(by_machines):
    """A store of the finished run, for one test."""
    return copy_of(by_machines[0])


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

    def make_outputs():
        run = machine(tmp_path / "head", finished_run, store)
        take_plan(run)
        return run.outputs

    board = Board(make_outputs)
    assert list(board.missing) == ["split"]
    assert do_stored_unit(machine(tmp_path / "other", finished_run, store), "split")
    board.refresh()
    assert "merge/merit" in board.units and not board.missing


# ---- the command line
def test_the_command_line_does_and_lists_units_of_a_store(
    server, finished_run, tmp_path, call, monkeypatch
):
    """A planted secret stands in no file, object or message."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-word")
    bucket = open_place(f"s3://units-{next(NUMBERS)}")
    bucket.store.mkdir(bucket.path)
    file = finished_run.copy_config(tmp_path)
    there = ["--storage", f"{bucket}/run", "--scratch", tmp_path / "scratch"]
    code, out, error = call("unit", file, "sketch/codes", "--json", *there)
    answer = json.loads(out)
    assert code == 0 and answer["worked"] and answer["downloaded_bytes"] == 0, error
    sizes = list_objects(bucket)
    assert answer["uploaded_bytes"] == sum(
        size
        for name, size in sizes.items()
        if not name.endswith(("stage.json", answer["unit"])) and "finished/" not in name
    )
    code, shown, error = call("unit", file, *there)
    states = dict(line.split()[:2] for line in shown.splitlines())
    assert code == 0 and states["sketch/codes"] == "done", error
    assert states["sketch/plurals"] == "ready" and states["split"] == "waiting"
    code, again, error = call("unit", file, "sketch/codes", *there)
    assert code == 0 and again == "sketch/codes: up to date; 0 B downloaded; 0 B uploaded\n", error
    code, _, said = call("unit", file, "split", *there)
    assert code == 2 and said.endswith("error: split: needs sketch, which is not done\n")
    assert not (tmp_path / "out").exists()
    code, _, refused = call("unit", file, "split", "--storage", "s3://me:planted-word@b/run")
    assert code == 2
    texts = [out, shown, again, error, said, refused]
    texts += [path.read_bytes().decode(errors="replace") for path in files_below(tmp_path)]
    texts += [
        bucket.store.cat_file((bucket / name).path).decode(errors="replace") for name in sizes
    ]
    assert len(texts) > 20 and not any("planted-word" in text for text in texts)


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "words,rule",
    [
        (["unit", "run.yml", "--scratch", "x"], "--scratch: goes with --storage"),
        (["unit", "memory://x/c.yml", "--storage", "memory://x"], "--scratch: is absent"),
        (["run", "run.yml", "--storage", "memory://x"], "--storage: goes with --executor"),
        (["unit", "run.yml", "--storage", "nosuch://x"], "nosuch://x: Protocol not known"),
        (["clean", "run.yml", "--storage", "memory://x"], "run.yml: does not go with --storage"),
    ],
)
def test_flags_that_do_not_go_together(call, finished_run, tmp_path, monkeypatch, words, rule):
    finished_run.copy_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, error = call(*words)
    assert code == 2 and rule in error


def test_clean_of_a_store_that_is_clean(store, call):
    code, out, error = call("clean", "--storage", store)
    assert code == 0 and out == f"{store}: 0 B can be freed\n", error


@pytest.mark.process
def test_a_unit_that_is_killed_before_its_marker_is_sent_by_the_same_command(
    finished_run, tmp_path
):
    shared = tmp_path / "shared"
    file = finished_run.copy_config(tmp_path)
    command = ["unit", file, "sketch/codes", "--storage", shared, "--scratch", tmp_path / "scratch"]
    words = [str(word) for word in command]
    killed = run_python([str(KILL_AT), "finished/units/sketch/codes", "1", *words], timeout=300)
    assert killed.returncode == -9, killed.stderr
    run = machine(tmp_path / "other", finished_run, str(shared))
    assert "sketch/codes" in ready(run)
    again = run_python(["-m", "merit_fast", *words], timeout=300)
    assert again.returncode == 0 and again.stdout.startswith("sketch/codes: up to date; "), again
    assert "sketch/codes" not in ready(machine(tmp_path / "third", finished_run, str(shared)))


# ---- the driver
class InProcess:
    """An executor that runs each unit's command line in this process."""

    threads = None
    processes = 1

    def __init__(self, call):
        self.call = call
        self.started = []
        self.waiting = []

    def room(self):
        return 1 - len(self.waiting)

    def start(self, command):
        self.started.append(command.unit)
        self.waiting.append(command)

    def wait(self):
        command = self.waiting.pop()
        code, out, error = self.call(*command.words[3:])
        answer = json.loads(out.splitlines()[-1]) if code == 0 else None
        return [Ended(command.unit, code, "host", error.strip().rpartition("\n")[2], answer)]

    def stop(self):
        self.waiting.clear()


def test_the_driver_asks_the_store_what_is_done_and_brings_the_results(
    store, finished_run, tmp_path, call
):
    for name in ("split", "units/evaluate/merit", "evaluate", "report"):
        forget(store, name)
    run = machine(tmp_path, finished_run, store)
    executor = InProcess(call)
    summary = drive(
        run.config,
        executor,
        Notes(),
        "merit-fast {stage} run.yml",
        store=OutputStore(open_place(store)),
    )
    assert executor.started == ["split", "evaluate/merit", "evaluate", "report"]
    lines = (run.outputs.root / "units" / JOURNAL).read_text().splitlines()
    ends = [event for event in map(json.loads, lines) if event["event"] == "end"]
    moved = [(e["answer"]["downloaded_bytes"], e["answer"]["uploaded_bytes"]) for e in ends]
    assert all(sent > 0 for _, sent in moved) and moved[1][0] > WEIGHTS
    merged = open_place(summary["merged"])
    assert summary["merged"].startswith(f"{store}/outputs/merged/merit/attempt-")
    assert any(name.endswith(".safetensors") for name in list_objects(merged))
    report = (run.outputs.root / "report" / "report.html").read_bytes()
    assert len(report) > 1000 and not list((run.outputs.root / "branches").glob("*/*.safetensors"))


def test_a_unit_that_fails_by_its_store_is_started_again(store, finished_run, tmp_path, call):
    """A request that fails for good is no bad input; one damaged file ends the run in the end."""
    forget(store, "report")
    place = open_place(store)
    [split] = [
        p
        for p in list_objects(place)
        if p.startswith("outputs/evaluate/") and p.endswith("evaluate.json")
    ]
    place.store.pipe_file((place / split).path, b"other")
    run = machine(tmp_path, finished_run, store)
    executor = InProcess(call)
    with pytest.raises(MeritFastError, match=rf"report: failed: {place / split}: 5 bytes instead"):
        drive(run.config, executor, Notes(), "merit-fast {stage} run.yml", store=OutputStore(place))
    assert executor.started == ["report"] * 3
    assert tree_bytes(run.outputs.root / "split")
