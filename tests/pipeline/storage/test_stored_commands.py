"""The commands on a store: units by hand, the driver, and no secret anywhere."""

import json
import os

import pytest
from support.checks import tree_bytes
from support.merge.stores import NUMBERS
from support.paths import KILL_AT
from support.runs import Notes
from support.storage.machines import WEIGHTS, copy_of, forget, machine, ready
from support.warm import run_python, run_together

from merit_fast.errors import MeritFastError
from merit_fast.execution.command import Ended
from merit_fast.execution.drive import drive
from merit_fast.pipeline.storage.place import list_objects, open_place
from merit_fast.pipeline.storage.store import OutputStore
from merit_fast.pipeline.units.journal import JOURNAL


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
    assert states["sketch/plurals/1-of-2"] == "ready" and states["split"] == "waiting"
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


@pytest.mark.process
def test_processes_of_a_training_that_is_done_end_together(store, finished_run, tmp_path):
    file = finished_run.copy_config(tmp_path)
    shared = copy_of(store, str(tmp_path / "shared"))
    there = ["--storage", shared, "--scratch", str(tmp_path / "scratch")]
    command = ["-m", "merit_fast", "unit", str(file), "train/merit-0", *there]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21500 + os.getpid() % 2000)}
    environments = [{**os.environ, **ranks, "WORLD_SIZE": "2", "RANK": rank} for rank in "01"]
    ended = run_together([command] * 2, environments=environments, timeout=120)
    assert [process.returncode for process in ended] == [0, 0], ended
    assert ended[0].stdout.startswith("train/merit-0: up to date; ") and not ended[1].stdout


# ---- the driver
class InProcess:
    """An executor that runs each unit's command line in this process."""

    threads = None
    processes = 1
    workers = 1

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
