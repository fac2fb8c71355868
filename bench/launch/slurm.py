"""Jobs of ``--to slurm`` on a real SLURM: its daemons from Debian's packages, on loopback.

    python -m bench.launch.slurm DIR

Downloads the packages (apt-get, no installation) into DIR and starts slurmctld and slurmd, as root
only: Debian's slurmd runs jobs of its own user. merit-fast is a stand-in that records its calls.
Checks that every unit runs once and after those that it needs, that a failed branch cancels what
needs it while the others end, that the next submission does it, and that a requeued job runs again.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.launch.parsers import CONFIG, write_jobs
from merit_fast.execution.launch.job import Options

PACKAGES = (
    *("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins"),
    *("libmunge2", "libpmix2", "libhwloc15", "libpciaccess0"),
)
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PluginDir={libraries}/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=a100 Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
STAND_IN = """\
#!/usr/bin/env bash
unit=${@: -1}
echo "start $unit" >> CALLS
sleep 1
if [[ $unit == train/merit-1 && -e FAILS ]]; then exit 1; fi
if [[ $unit == train/merit-1 && -e WAITS ]]; then sleep 60; fi
[[ $PWD == FOLDER && $1 == unit && $2 == CONFIG ]] || exit 1
echo "end $unit" >> CALLS
"""
STEPS = (
    {"sketch/facts", "sketch/code"},
    {"sketch"},
    {"split"},
    {"train/merit-0", "train/merit-1", "evaluate/base"},
    {"merge/merit"},
    {"evaluate/merit-0", "evaluate/merit-1", "evaluate/merit"},
    {"evaluate"},
    {"report"},
)
_PATIENCE_S = 120


class Cluster:
    """SLURM's commands, and the calls of the stand-in."""

    def __init__(self, environment: Mapping[str, str], jobs: Path) -> None:
        self.environment = environment
        self.jobs = jobs
        self.calls = jobs / "calls"

    def run(self, *words: str | Path) -> str:
        result = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True
        )
        return result.stdout

    def submit(self) -> list[str]:
        """Submits all jobs; returns their ids."""
        self.calls.write_text("")
        return self.run("bash", self.jobs / "submit.sh").split()[1:]

    def wait(self) -> None:
        """Waits until the queue is empty."""
        end = time.monotonic() + _PATIENCE_S
        while self.run("squeue", "--noheader"):
            assert time.monotonic() < end, self.run("squeue")
            time.sleep(1)

    def wait_for(self, line: str) -> None:
        """Waits until the stand-in has written a line."""
        end = time.monotonic() + _PATIENCE_S
        while line not in self.lines():
            assert time.monotonic() < end, self.lines()
            time.sleep(0.2)

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def units(self, event: str) -> list[str]:
        return [line.split()[1] for line in self.lines() if line.startswith(event)]


def unpack(folder: Path) -> None:
    """Downloads and unpacks the packages unless they are there."""
    if (folder / "usr").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        package.unlink()


@contextmanager
def daemons(packages: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Runs slurmctld and slurmd; yields the environment of SLURM's commands."""
    libraries = packages / "usr/lib/x86_64-linux-gnu"
    values = {"folder": folder, "libraries": libraries, "cores": len(os.sched_getaffinity(0))}
    file = folder / "slurm.conf"
    file.write_text(CONFIGURATION.format(host=socket.gethostname().partition(".")[0], **values))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    environment = {
        **os.environ,
        "SLURM_CONF": str(file),
        "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
        "PATH": f"{folder}/programs:{packages}/usr/bin:{os.environ['PATH']}",
    }
    programs = packages / "usr/sbin"
    commands = {
        "slurmctld-wlm": ["-D"],
        "slurmd-wlm": ["-D", "-d", str(programs / "slurmstepd-wlm")],
    }
    started = []
    try:
        for name, options in commands.items():
            words = [str(programs / name), *options]
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            time.sleep(3)
        yield environment
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def check_whole_run(cluster: Cluster) -> None:
    """Every unit runs once, after the units of the steps before it have ended."""
    cluster.submit()
    cluster.wait()
    lines = cluster.lines()
    assert sorted(cluster.units("end")) == sorted(unit for step in STEPS for unit in step)
    for before, after in zip(STEPS[:-1], STEPS[1:], strict=True):
        needed = before - {"evaluate/base"}
        last = max(lines.index(f"end {unit}") for unit in needed)
        first = min(lines.index(f"start {unit}") for unit in after)
        assert last < first, lines
    assert lines.index("end evaluate/base") < lines.index("start evaluate/merit")


def check_failed_branch(cluster: Cluster) -> None:
    """A branch that fails cancels the merge, not the other branch; a new submission does it."""
    mark = cluster.jobs / "fails"
    mark.touch()
    cluster.submit()
    cluster.wait()
    ended = cluster.units("end")
    assert "train/merit-0" in ended and "merge/merit" not in cluster.units("start"), ended
    mark.unlink()
    cluster.submit()
    cluster.wait()
    assert cluster.units("end")[-1] == "report"


def check_requeue(cluster: Cluster) -> None:
    """A branch that SLURM requeues, as at a preemption, runs again; then the rest."""
    mark = cluster.jobs / "waits"
    mark.touch()
    train = cluster.submit()[2]
    cluster.wait_for("start train/merit-1")
    mark.unlink()
    time.sleep(3)  # the mark has been seen: the branch sleeps
    cluster.run("scontrol", "requeue", f"{train}_1")
    cluster.run("scontrol", "update", f"JobId={train}_1", "StartTime=now")
    cluster.wait()
    assert cluster.units("start").count("train/merit-1") == 2, cluster.lines()
    assert cluster.units("end")[-1] == "report"


def write_stand_in(folder: Path, project: Path, jobs: Path) -> None:
    (folder / "programs").mkdir()
    text = STAND_IN.replace("CALLS", shlex.quote(str(jobs / "calls")))
    text = text.replace("FAILS", shlex.quote(str(jobs / "fails")))
    text = text.replace("WAITS", shlex.quote(str(jobs / "waits")))
    text = text.replace("FOLDER", shlex.quote(str(project))).replace("CONFIG", shlex.quote(CONFIG))
    program = folder / "programs/merit-fast"
    program.write_text(text)
    program.chmod(0o755)


def main() -> None:
    """Runs the checks and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", metavar="DIR", type=Path, help="of the packages")
    packages = parser.parse_args().directory.absolute() / "slurm"
    if os.geteuid() != 0:
        sys.exit("bench.launch.slurm: needs root, as whom slurmd runs the jobs")
    unpack(packages)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = write_jobs("slurm", Options(workers=2, minutes=10, partition="a100"), folder)
        write_stand_in(folder, Path.cwd(), jobs)
        with daemons(packages, folder) as environment:
            cluster = Cluster(environment, jobs)
            print(cluster.run("sbatch", "--version").strip())
            for check in (check_whole_run, check_failed_branch, check_requeue):
                check(cluster)
                print(f"{check.__name__}: holds", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
