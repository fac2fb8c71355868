"""Whatever dies, fills or shows a wrong time: the run ends with the bytes of an undisturbed one."""

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.execution.processes import is_alive
from support.execution.units import missing, ready, results, run_of
from support.paths import KILL_AT, KILL_DRIVER
from support.warm import run_python

from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.pipeline.units.doing import do_unit
from merit_fast.pipeline.units.journal import JOURNAL

YEAR_S = 365 * 24 * 3600.0
# Each kind of unit, and the units that take its output over.
KINDS = {
    "sketch/codes/2-of-2": ("sketch/codes", "sketch"),
    "sketch/codes": ("sketch",),
    "sketch": (),
    "split": (),
    "train/merit-1": (),
    "merge/merit": (),
    "evaluate/base": ("evaluate",),
    "evaluate": (),
    "report": (),
}


@dataclass(frozen=True)
class Hurt:
    """A copy of a finished run that has lost the output of one unit, and of those after it."""

    file: Path
    unit: str
    undisturbed: Path

    @property
    def out(self) -> Path:
        return self.file.parent / "out"

    @property
    def path(self) -> Path:
        """The unit's output."""
        return missing(self.file)[0][self.unit].path

    @property
    def words(self) -> list[str]:
        return ["unit", str(self.file), self.unit]

    def finish(self) -> None:
        """Does the unit and those after it, in this process."""
        for name in (self.unit, *KINDS[self.unit]):
            do_unit(run_of(self.file), name)

    def check(self) -> None:
        """Every result is that of the undisturbed run, and nothing else is there."""
        ours = results(self.out)
        expected = results(self.undisturbed)
        names = expected.keys() | ours.keys()
        assert [name for name in names if ours.get(name) != expected.get(name)] == []


@pytest.fixture
def hurt(by_units, tmp_path):
    """Makes a ``Hurt`` of a unit; ``others``: further outputs that are lost."""
    file, _ = by_units

    def make(unit, *others):
        shutil.copytree(file.parent / "out", tmp_path / "out")
        shutil.copy(file, tmp_path)
        copied = Hurt(tmp_path / "run.yml", unit, file.parent / "out")
        units = missing(copied.file)[0]
        for path in [units[name].path for name in (unit, *KINDS[unit])]:
            shutil.rmtree(path)
        for name in others:
            shutil.rmtree(copied.out / name)
        return copied

    return make


# ---- deaths
@pytest.mark.process
@pytest.mark.parametrize("unit", KINDS)
def test_a_unit_that_is_killed_before_its_output_has_its_name(hurt, unit):
    run = hurt(unit)
    path = run.path.relative_to(run.out)
    killed = run_python([str(KILL_AT), f"out/{path}$", "1", *run.words], timeout=300)
    assert killed.returncode == -9 and not run.path.exists(), killed.stderr
    run.finish()
    run.check()


@pytest.mark.process
@pytest.mark.parametrize("unit", ["split", "train/merit-1", "evaluate/base", "report"])
def test_a_unit_that_is_killed_in_the_middle(hurt, unit):
    run = hurt(unit)
    path = run.path.relative_to(run.out)
    killed = run_python([str(KILL_AT), f"{path}.tmp/", "2", *run.words], timeout=300)
    assert killed.returncode == -9 and not run.path.exists(), killed.stderr
    run.finish()
    run.check()


@pytest.mark.process
def test_the_units_of_a_driver_that_is_killed_end_with_it(hurt):
    run = hurt("report")
    words = ["run", str(run.file), "--executor", "local", "--workers", "1", "--unit-limit", "10m"]
    killed = run_python([str(KILL_DRIVER), "report", *words], timeout=300)
    assert killed.returncode == -9, killed.stderr
    unit = Path("/proc") / killed.stdout.split()[-1]
    end = time.monotonic() + 60
    while is_alive(unit):
        assert time.monotonic() < end
        time.sleep(0.05)
    again = run_python(["-m", "merit_fast", *words], timeout=300)
    assert again.returncode == 0, again.stderr
    assert (run.out / UNITS_FOLDER / JOURNAL).read_text().count('"start"') == 2
    run.check()


# ---- disks
FULL = """
import resource, sys
from merit_fast.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["merit-fast", *sys.argv[2:]]
main()
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "unit,num_bytes,shares",
    [
        ("sketch/codes", 50_000, ["units/shares/sketch/codes"]),
        ("train/merit-1", 50_000, []),
        ("merge/merit", 30_000, ["units/shares/merge"]),
        ("report", 5000, []),
    ],
)
def test_a_file_that_the_disk_does_not_take_costs_one_line(hurt, unit, num_bytes, shares):
    """The system refuses files that are larger; a full disk fails in the same calls."""
    run = hurt(unit, *shares)
    before = results(run.out)
    full = run_python(["-c", FULL, str(num_bytes), *run.words], timeout=300)
    line = full.stderr.splitlines()[-1]
    assert full.returncode == 1 and line.startswith(f"failed: {run.out}/"), full.stderr
    assert "Traceback" not in full.stderr and not list(run.out.glob("*.json.*"))
    after = results(run.out)
    assert [name for name in before if after.get(name) != before[name]] == []
    run.finish()
    run.check()


# ---- clocks
def test_no_unit_depends_on_clocks_or_on_the_times_of_files(hurt, monkeypatch):
    """Hosts whose clocks differ by years, and a file server with a clock of its own."""
    run = hurt("report", "merged/merit", "units/evaluate/merit", "evaluate")
    order = random.Random(5)

    def skew():
        shift_s = order.uniform(-YEAR_S, YEAR_S)
        now = time.monotonic
        monkeypatch.setattr(time, "time", lambda: 1.8e9 + shift_s + now())
        monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (1.8e9 + shift_s + now())))
        monkeypatch.setattr(time, "strftime", lambda *words: "1999-12-31T23:59:59")
        for path in run.out.rglob("*"):
            stamp = 1.8e9 + order.uniform(-YEAR_S, YEAR_S)
            os.utime(path, (stamp, stamp))

    done = []
    skew()
    while names := ready(run.file):
        assert do_unit(run_of(run.file), names[0])
        done.append(names[0])
        skew()
    assert done == ["merge/merit", "evaluate/merit", "evaluate", "report"]  # each once
    run.check()


def test_a_file_from_the_future_is_hashed_each_time(tmp_path):
    """An edit within one tick of its clock leaves size and time as they were."""
    from merit_fast.manifests.hashes import SMALL_BYTES, HashCache

    file = tmp_path / "base.safetensors"
    for shift_s, is_seen in ((3600.0, True), (-3600.0, False)):
        hashes = HashCache({})
        stamp = time.time() + shift_s
        digests = set()
        for byte in (b"a", b"b"):
            file.write_bytes(byte * SMALL_BYTES)
            os.utime(file, (stamp, stamp))
            digests.add(hashes(file))
        assert (len(digests) == 2) == is_seen
