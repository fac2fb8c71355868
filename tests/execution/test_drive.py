"""The driver: it starts what can start, starts again what dies, and trusts only the files."""

import io
import json

import pytest
import yaml
from rich.console import Console
from support.runs import Notes, run_values

from merit_fast.errors import InputError, MeritFastError
from merit_fast.execution.board import Board
from merit_fast.execution.command import Ended
from merit_fast.execution.drive import Driver
from merit_fast.execution.drive import drive as run_by_units
from merit_fast.execution.view import Row, View
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.journal import JOURNAL
from merit_fast.progress import TerminalProgress


class FakeBoard(Board):
    """a and b come first, c needs both; a unit is done when its name is in ``files``."""

    def __init__(self):
        self.files = set()
        self.needs = {"a": (), "b": (), "c": ("a", "b")}
        self.refresh()

    def refresh(self, ended=None):
        self.units = dict.fromkeys(self.needs)
        self.missing = {name: None for name in self.needs if name not in self.files}

    def is_done(self, name):
        return name in self.files

    def ready(self, running):
        free = [name for name in self.missing if name not in running]
        return [name for name in free if not any(n in self.missing for n in self.needs[name])]


class FakeExecutor:
    """Ends every unit by the next code that ``script`` has for it; 0 leaves its file."""

    threads = 1
    processes = 1

    def __init__(self, board, script=None, workers=2):
        self.board = board
        self.script = script or {}
        self.workers = workers
        self.running = []
        self.started = []
        self.most = 0

    def room(self):
        return self.workers - len(self.running)

    def start(self, command):
        self.running.append(command.unit)
        self.started.append(command.unit)
        self.most = max(self.most, len(self.running))

    def wait(self):
        name = self.running.pop(0)
        codes = self.script.get(name, [])
        code = codes.pop(0) if codes else 0
        if code == 0:
            self.board.files.add(name)
        text = {0: "", 2: "error: run.yml: model: must be there", -9: ""}.get(code, "failed: x")
        return [Ended(name, 0 if code == "nothing" else code, "host", text)]

    def stop(self):
        self.running.clear()


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Runs the driver's loop on a fake board."""
    monkeypatch.setattr("merit_fast.execution.drive.PATIENCE_S", 0.0)

    def drive(script=None, workers=2, board=None, **options):
        board = board or FakeBoard()
        executor = FakeExecutor(board, script, workers)
        progress = Notes()
        Driver(board, executor, progress, tmp_path, **{"retries": 2, **options}).run()
        return executor, progress.notes

    return drive


def test_units_start_when_their_needs_are_met_and_no_more_than_there_is_room_for(drive, tmp_path):
    executor, notes = drive()
    assert executor.started == ["a", "b", "c"] and executor.most == 2
    assert drive(workers=1)[0].most == 1
    assert notes[-1].startswith("c: done in ") and notes[-1].endswith("3 of 3 units")
    events = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert [(e["event"], e["unit"]) for e in events[:3]] == [
        ("start", "a"),
        ("start", "b"),
        ("end", "a"),
    ]
    assert events[2]["code"] == 0 and events[2]["host"] == "host" and "seconds" in events[2]


class Terminal(TerminalProgress):
    """A terminal of so many columns and rows, whose text is kept."""

    def __init__(self):
        super().__init__()
        self.text = io.StringIO()
        self.console = Console(file=self.text, force_terminal=True, width=70, height=8)


def test_on_a_terminal_one_table_shows_the_units_that_run(tmp_path):
    board = FakeBoard()
    board.needs = {"x/a": (), "x/b": (), "y": ("x/a", "x/b")}
    board.host = {"x/a": "node1", "x/b": ""}.get
    board.refresh()
    driver = Driver(board, FakeExecutor(board), Terminal(), tmp_path, retries=2)
    driver.running = {"x/a": 10.0, "x/b": 70.0}
    driver.failures = {"x/b": 2}
    view = View(driver)
    assert view.rows(now=130.0) == [
        Row("x", "0 of 2 done, 2 running"),
        Row("  x/a", "running", "node1", "2 min 0 s"),
        Row("  x/b", "running, failed 2x", "", "1 min 0 s"),
        Row("y", "0 of 1 done"),
    ]
    driver.running = {}
    driver.failures = {}
    board.host = {}.get
    driver.run()
    text = driver.progress.text.getvalue()
    assert "1 of 1 done" in text and "done in" not in text  # the table only, no line for each


def test_a_table_that_is_taller_than_the_terminal_says_how_much_is_left_out(tmp_path):
    board = FakeBoard()
    board.needs = {f"x/{number}": () for number in range(20)}
    board.host = dict.fromkeys(board.needs, "").get
    board.refresh()
    driver = Driver(board, FakeExecutor(board), Terminal(), tmp_path, retries=2)
    driver.running = dict.fromkeys(board.needs, 0.0)
    driver.progress.console.print(View(driver))
    assert "and 16 more lines" in driver.progress.text.getvalue()


def test_a_unit_that_dies_is_started_again(drive):
    executor, notes = drive({"a": [-9, 1]})
    assert executor.started == ["a", "b", "a", "a", "c"]
    assert "a: ended with exit code -9; starting it again" in notes


def test_a_unit_that_dies_too_often_ends_the_run_with_its_log(drive, tmp_path):
    with pytest.raises(MeritFastError, match=rf"a: failed: x; its log: {tmp_path}/logs/a.log"):
        drive({"a": [1, 1, 1]})


def test_bad_input_ends_the_run_at_once(drive):
    with pytest.raises(InputError, match=r"^a: run.yml: model: must be there$"):
        drive({"a": [2]})


def test_a_unit_without_its_output_is_not_done(drive):
    executor, notes = drive({"b": ["nothing"]})
    assert executor.started.count("b") == 2
    assert any("ended on host without its output" in note for note in notes)


def test_a_driver_that_is_started_again_takes_what_is_there(drive):
    board = FakeBoard()
    with pytest.raises(MeritFastError):
        drive({"b": [1]}, board=board, retries=0)
    executor, _ = drive(board=board)
    assert executor.started == ["b", "c"]


def test_a_run_without_a_unit_that_can_start_ends(drive):
    board = FakeBoard()
    board.needs = {"a": ("b",), "b": ("a",)}
    board.refresh()
    with pytest.raises(MeritFastError, match="no unit can start; missing: a, b"):
        drive(board=board)


def test_a_driver_of_another_config_leaves_the_first_one_s_file(tmp_path, tiny_model, tiny_mixture):
    """Its units would read another config in the middle of the run."""
    values = run_values(tiny_model, tiny_mixture) | {"output": str(tmp_path / "out")}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    config = tmp_path / "out" / "units" / "config.yml"
    with Run(read_run_config(file)).claim():
        other = read_run_config(file, ["train.epochs=3"])
        executor = FakeExecutor(FakeBoard())
        executor.running.append("a")
        with pytest.raises(InputError, match="works here with another config"):
            run_by_units(other, executor, Notes(), "merit-fast {stage} run.yml")
    assert not config.exists() and not executor.running  # the executor is stopped
