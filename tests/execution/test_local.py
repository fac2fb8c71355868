"""Units as processes of this machine: slots, GPUs, logs, deaths and the end of the driver."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.execution.processes import is_alive

from merit_fast.execution.command import UnitCommand, unit_command
from merit_fast.execution.local import LocalExecutor, workers_here
from merit_fast.model.memory import available_memory_bytes

ANSWER = 'print("noise"); print(\'{"worked": true}\')'

pytestmark = pytest.mark.process


def command(tmp_path, unit, script):
    return UnitCommand(unit, (sys.executable, "-c", script), str(tmp_path / f"{unit}.log"))


def run(executor, *commands):
    for each in commands:
        executor.start(each)
    ended = []
    while len(ended) < len(commands):
        ended += executor.wait()
    return {result.unit: result for result in ended}


def test_the_result_is_the_exit_code_the_last_line_of_the_log_and_the_answer(tmp_path):
    failing = 'import sys; print("first\\nlast", file=sys.stderr); sys.exit(3)'
    large = "import sys; sys.stdout.write('x' * 300_000 + '\\n');" + ANSWER
    killed = "import os; os.kill(os.getpid(), 9)"
    units = {"good": ANSWER, "large": large, "bad": failing, "killed": killed, "mute": "pass"}
    ended = run(LocalExecutor(4), *(command(tmp_path, *unit) for unit in units.items()))
    assert {name: result.code for name, result in ended.items()} == {
        "good": 0,
        "large": 0,
        "bad": 3,
        "killed": -9,
        "mute": 0,
    }
    assert ended["mute"].answer == {}
    assert ended["good"].answer == {"worked": True} == ended["large"].answer
    assert ended["bad"].text == "last" and ended["killed"].text == "was ended by SIGKILL"


def test_a_message_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path):
    (tmp_path / "mute.log").write_text("failed: no such file\n")
    result = run(LocalExecutor(1), command(tmp_path, "mute", "import sys; sys.exit(1)"))["mute"]
    assert result.code == 1 and result.text == ""


# ---- units that hang, crawl or leave processes behind
HANGS = "import signal, sys, time; print('step 7', file=sys.stderr, flush=True);"


@pytest.mark.parametrize(
    "script",
    [
        HANGS + "time.sleep(60)",
        HANGS + "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        HANGS + "import os; os.kill(os.getpid(), signal.SIGSTOP)",
        HANGS + "import os; os.close(1); time.sleep(60)",
    ],
    ids=["sleeps", "ignores SIGTERM", "stopped", "closed output"],
)
def test_a_unit_that_takes_longer_than_its_limit_is_ended(tmp_path, monkeypatch, script):
    monkeypatch.setattr("merit_fast.execution.process._STOP_S", 0.3)
    executor = LocalExecutor(2, limit_s=1)
    ended = run(executor, command(tmp_path, "hangs", script), command(tmp_path, "good", ANSWER))
    assert ended["good"].code == 0 and ended["good"].answer == {"worked": True}
    assert ended["hangs"].text == "took longer than its limit of 1 s, after: step 7"
    assert ended["hangs"].code == -signal.SIGTERM and executor.room() == 2


def test_a_unit_that_ends_well_in_its_last_moment_is_done(tmp_path):
    script = "import signal, sys, time\n"
    script += "def end(*words):\n    print('{\"worked\": true}', flush=True); sys.exit(0)\n"
    script += "signal.signal(signal.SIGTERM, end)\ntime.sleep(60)"
    [result] = run(LocalExecutor(1, limit_s=1), command(tmp_path, "a", script)).values()
    assert result.code == 0 and result.answer == {"worked": True}


def test_the_death_of_a_unit_ends_the_children_that_hold_its_output(tmp_path):
    """Else they work on next to its second attempt, and the driver waits for them."""
    script = "import os, subprocess, sys;"
    script += f"p = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)']);"
    script += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); os.kill(os.getpid(), 9)"
    begin = time.monotonic()
    [result] = run(LocalExecutor(1), command(tmp_path, "a", script)).values()
    assert result.code == -signal.SIGKILL and time.monotonic() - begin < 30
    assert not is_alive(Path("/proc") / (tmp_path / "pid").read_text())


def test_units_at_a_time_have_gpus_of_their_own(tmp_path):
    script = 'import os, json; print(json.dumps({"gpus": os.environ["CUDA_VISIBLE_DEVICES"]}))'
    executor = LocalExecutor(2, gpus=["0", "1", "2", "3"], processes=2)
    first = run(executor, *(command(tmp_path, unit, script) for unit in ("a", "b")))
    assert executor.room() == 2
    again = run(executor, command(tmp_path, "c", script))
    assert {result.answer["gpus"] for result in first.values()} == {"0,1", "2,3"}
    assert again["c"].answer["gpus"] in ("0,1", "2,3")


def test_the_end_of_the_driver_ends_its_units_and_their_children(tmp_path):
    child = "import subprocess, sys, time;"
    child += f"p = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)']);"
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    executor = LocalExecutor(1)
    executor.start(command(tmp_path, "a", child))
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    executor.stop()
    child_process = Path("/proc") / (tmp_path / "pid").read_text()
    while is_alive(child_process):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_training_of_several_processes_starts_by_torchrun(tmp_path):
    words = unit_command("train/merit-0", tmp_path / "c.yml", tmp_path / "log", 1, 4).words
    assert "torch.distributed.run" in words and words[words.index("--nproc-per-node") + 1] == "4"
    assert "torch.distributed.run" not in unit_command("split", tmp_path, tmp_path, 1, 4).words


def test_as_many_units_as_the_machine_holds():
    cores = len(os.sched_getaffinity(0))
    assert workers_here(0, 1, []) == max(1, cores // 4)
    assert workers_here(available_memory_bytes(), 1, []) == 1  # six times a model, or one at a time
    assert workers_here(1 << 50, 2, ["0", "1", "2", "3"]) == 2  # GPUs bring their own memory


def test_signals_reach_a_group_of_its_own(tmp_path):
    """An interruption of the driver's terminal does not reach its units; the driver ends them."""
    executor = LocalExecutor(1)
    executor.start(command(tmp_path, "a", "import os; os.kill(0, 15)"))  # its own group only
    [result] = executor.wait()
    assert result.code == -signal.SIGTERM


def test_a_unit_ends_with_a_driver_that_is_killed(tmp_path):
    """Nothing of the driver's own runs at its end."""
    script = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()));"
    script += "import time; time.sleep(300)"
    driver = (
        "import os; from pathlib import Path;"
        "from merit_fast.execution.command import UnitCommand;"
        "from merit_fast.execution.process import UnitProcess;"
        f"unit = UnitProcess(UnitCommand('a', ({sys.executable!r}, '-c', {script!r}), "
        f"{str(tmp_path / 'log')!r}));\n"
        f"while not (Path({str(tmp_path / 'pid')!r}).exists()\n"
        f"           and Path({str(tmp_path / 'pid')!r}).read_text()): pass\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", driver], timeout=60).returncode == -9
    unit = Path("/proc") / (tmp_path / "pid").read_text()
    end = time.monotonic() + 30
    while is_alive(unit):
        assert time.monotonic() < end
        time.sleep(0.05)
