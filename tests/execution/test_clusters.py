"""Ray and submitit run unit commands: results, deaths of workers and nodes, interruptions."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import TESTS

from merit_fast.execution.command import UnitCommand

pytestmark = pytest.mark.process

ANSWER = "import os, json; print(json.dumps({'pid': os.getpid()}))"
FAILS = 'import sys; print("error: the rule", file=sys.stderr); sys.exit(2)'


def command(folder, unit, script):
    words = (sys.executable, "-c", script)
    return UnitCommand(unit, words, str(folder / "logs" / f"{unit.replace('/', '.')}.log"))


def all_results(executor, commands):
    """Starts commands as there is room, and collects their ends."""
    left = list(commands)
    results = {}
    end = time.monotonic() + 120
    while len(results) < len(commands):
        while left and executor.room() > 0:
            executor.start(left.pop(0))
        results |= {result.unit: result for result in executor.wait()}
        assert time.monotonic() < end
    return results


def wait_for(file):
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return file.read_text()


# ---- submitit, by its executor of local processes
@pytest.fixture
def jobs(tmp_path):
    from merit_fast.execution.on_slurm import SubmititExecutor

    executor = SubmititExecutor(tmp_path / "submitit", 2, cluster="local")
    yield executor
    executor.stop()


def test_jobs_give_their_results(jobs, tmp_path):
    units = {"a": ANSWER, "train/b": ANSWER, "c": FAILS, "d": ANSWER}
    results = all_results(jobs, [command(tmp_path, *unit) for unit in units.items()])
    assert {name: result.code for name, result in results.items()} == {
        "a": 0,
        "train/b": 0,
        "c": 2,
        "d": 0,
    }
    assert results["c"].text == "error: the rule" and results["a"].answer["pid"] > 0


def test_a_job_that_is_killed_is_a_unit_that_failed(jobs, tmp_path):
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getppid()));"
    jobs.start(command(tmp_path, "a", script + "time.sleep(60)"))
    jobs.submit()
    os.kill(int(wait_for(tmp_path / "pid")), 9)
    [result] = jobs.wait()
    assert result.unit == "a" and result.code != 0 and "job " in result.text


def test_an_option_that_submitit_does_not_know_is_bad_input(tmp_path):
    from merit_fast.errors import InputError
    from merit_fast.execution.on_slurm import SubmititExecutor

    with pytest.raises(InputError, match="--executor-option: .*no_such"):
        SubmititExecutor(tmp_path, 1, cluster="local", options={"no_such": 1})


def test_a_job_that_takes_longer_than_its_limit_is_ended(tmp_path):
    from merit_fast.execution.on_slurm import SubmititExecutor

    executor = SubmititExecutor(tmp_path / "submitit", 1, cluster="local", limit_s=1)
    executor.start(command(tmp_path, "a", "import time; time.sleep(60)"))
    [result] = executor.wait()
    assert (result.unit, result.code) == ("a", -15)
    assert result.text == "took longer than its limit of 1 s"


def test_a_job_of_slurm_needs_a_limit(tmp_path, monkeypatch):
    """Without one submitit ends every job after five minutes."""
    from merit_fast.errors import InputError
    from merit_fast.execution.on_slurm import SubmititExecutor

    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    with pytest.raises(InputError, match="--unit-limit: must be given for SLURM"):
        SubmititExecutor(tmp_path, 1, cluster="slurm")
    executor = SubmititExecutor(tmp_path, 1, cluster="slurm", limit_s=7200)
    assert executor._executor._executor.parameters["time"] == 125
    options = {"slurm_time": 90}
    executor = SubmititExecutor(tmp_path, 1, cluster="slurm", options=options, limit_s=7200)
    assert executor._executor._executor.parameters["time"] == 90


# ---- Ray, on two nodes of this machine
@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two cores; ends all of Ray's processes."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_tasks_give_their_results_and_outlive_a_worker_and_a_node(cluster, tmp_path):
    from merit_fast.execution.on_ray import RayExecutor

    before = set(Path.home().glob(".ray/*"))
    executor = RayExecutor(4)
    units = {"a": ANSWER, "train/b": ANSWER, "c": FAILS}
    results = all_results(executor, [command(tmp_path, *unit) for unit in units.items()])
    assert [results[name].code for name in units] == [0, 0, 2]
    assert results["c"].text == "error: the rule"

    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getppid()));"
    executor.start(command(tmp_path, "killed", script + "time.sleep(60)"))
    os.kill(int(wait_for(tmp_path / "pid")), 9)
    [result] = executor.wait()
    assert (result.unit, result.code) == ("killed", 1) and "Worker" in result.text

    hangs = "import os, time; state = open(f'/proc/{os.getppid()}/stat').read();"
    hangs += "raylet = state.rpartition(')')[2].split()[1];"  # the parent of Ray's worker
    hangs += f"open({str(tmp_path / 'nodes')!r}, 'a').write(raylet + ' '); time.sleep(60)"
    slow = RayExecutor(1, limit_s=1)
    for _ in range(2):  # the second attempt is on the other node
        slow.start(command(tmp_path, "slow", hangs))
        [result] = slow.wait()
        assert result.code == -15 and result.text == "took longer than its limit of 1 s"
    assert len(set((tmp_path / "nodes").read_text().split())) == 2

    node = cluster.add_node(num_cpus=8)
    cluster.wait_for_nodes()
    wide = RayExecutor(1, threads=8)  # fits the new node only
    wide.start(
        command(
            tmp_path,
            "lost",
            f"open({str(tmp_path / 'node')!r}, 'w').write('x');import time; time.sleep(60)",
        )
    )
    wait_for(tmp_path / "node")
    cluster.remove_node(node, allow_graceful=False)
    [result] = wide.wait()
    assert (result.unit, result.code) == ("lost", 1) and result.text
    assert all_results(executor, [command(tmp_path, "again", ANSWER)])["again"].code == 0
    assert set(Path.home().glob(".ray/*")) == before  # no token in the home folder


def test_a_driver_and_its_units_end_when_ray_s_head_dies(tmp_path):
    """The same command then goes to a new cluster; nobody waits for the old one."""
    words = [sys.executable, str(TESTS / "support/execution/lose_head.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == {"driver": 1, "unit has ended": True}, done


def test_the_end_of_the_driver_ends_the_tasks(cluster, tmp_path):
    from merit_fast.execution.on_ray import RayExecutor

    executor = RayExecutor(1)
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
    executor.start(command(tmp_path, "a", script + "time.sleep(300)"))
    pid = wait_for(tmp_path / "pid")
    executor.stop()
    end = time.monotonic() + 30
    while Path("/proc", pid).exists():
        assert time.monotonic() < end
        time.sleep(0.05)
