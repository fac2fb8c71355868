"""The scripts of ``--to slurm`` are valid and wait for each other; the jobs do every unit."""

import re
import subprocess

import pytest
from support.execution.launches import CONFIG, check_order

# Options of sbatch in the manual of SLURM 24.11 that these scripts may have.
KNOWN = {
    *("array", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks", "open-mode"),
    *("output", "partition", "requeue", "time"),
}
SBATCH = """
script = Path(words[-1])
ids = Path(script.parent / "ids")
number = len(ids.read_text()) if ids.exists() else 0
options = [word for word in words[:-1] if word.startswith("--")]
if os.environ.get("FAILS") != script.name:
    ids.write_text("x" * (number + 1))
    print(f"{100 + number};cluster")
    lines = script.read_text().splitlines()
    array = next((line for line in lines if line.startswith("#SBATCH --array=")), "")
    last = int(array.rpartition("-")[2].partition("%")[0]) if array else 0
    for index in range(last + 1):
        more = {"SLURM_ARRAY_TASK_ID": str(index)} if array else {}
        subprocess.run(["bash", script], env={**os.environ, **more}, check=True)
else:
    code = 1
"""


@pytest.fixture
def submit(programs):
    programs.add("sbatch", SBATCH)
    return programs.run


def options_of(script):
    """The #SBATCH options; all of them stand before the first command."""
    lines = script.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    late = [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert not late
    words = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return dict(word.partition("=")[::2] for word in words)


def test_jobs_do_every_unit_in_order(project, programs, make_jobs, submit):
    jobs = make_jobs("slurm")
    result = submit(jobs / "submit.sh")
    assert result.returncode == 0, result.stderr
    check_order(programs.units())
    for call in programs.calls("merit-fast"):
        assert call.words == ["unit", CONFIG, "train.engine_config=null", call.unit]
        assert call.folder == str(project)


def test_jobs_wait_for_those_that_make_their_inputs(project, programs, make_jobs, submit):
    submit(make_jobs("slurm") / "submit.sh")
    after = {}
    names = {}
    for number, call in enumerate(programs.calls("sbatch")):
        name = call.words[-1].removesuffix(".sbatch")
        names[str(100 + number)] = name
        text = " ".join(call.words)
        ids = re.findall(r"afterok:([\d:]+)", text)
        after[name] = {names[id] for id in ids[0].split(":")} if ids else set()
        assert "--kill-on-invalid-dep=yes" in text
    assert after == {
        "sketch": set(),
        "split": {"sketch"},
        "train": {"split"},
        "base": {"split"},
        "merge": {"train"},
        "evaluate": {"merge", "base"},
        "report": {"evaluate"},
    }


def test_a_refused_job_ends_the_submission(project, programs, make_jobs, submit):
    result = submit(make_jobs("slurm") / "submit.sh", FAILS="train.sbatch")
    assert result.returncode != 0
    assert [call.words[-1] for call in programs.calls("sbatch")][-1] == "train.sbatch"


def test_options_are_those_of_sbatch(project, make_jobs):
    words = ("--gpus", 8, "--cpus", 64, "--workers", 2)
    jobs = make_jobs("slurm", *words, "--time", "36h", "--partition", "a100,h100")
    scripts = {script.stem: options_of(script) for script in jobs.glob("*.sbatch")}
    for options in scripts.values():
        assert set(options) <= KNOWN
        assert options["time"] == "2160" and options["partition"] == "a100,h100"
        assert "requeue" in options and options["open-mode"] == "append"
        assert (options["nodes"], options["ntasks"], options["cpus-per-task"]) == ("1", "1", "64")
    gpus = {name: options.get("gpus-per-node") for name, options in scripts.items()}
    assert gpus == {
        **{"sketch": "1", "train": "8", "base": "1", "evaluate": "1"},
        **{"split": None, "merge": None, "report": None},
    }
    assert scripts["train"]["array"] == "0-2%2" and scripts["evaluate"]["array"] == "0-3%2"
    assert "array" not in scripts["split"]


def test_a_branch_on_several_gpus_is_started_by_torchrun(project, programs, make_jobs, submit):
    submit(make_jobs("slurm", "--gpus", 8) / "submit.sh")
    calls = programs.calls("torchrun")
    assert {call.unit for call in calls} == {"train/merit-0", "train/merit-1", "train/joint"}
    assert all("--nproc-per-node 8 -m merit_fast unit" in " ".join(call.words) for call in calls)


def test_scripts_parse(project, make_jobs):
    for script in make_jobs("slurm", "--gpus", 2).iterdir():
        subprocess.run(["bash", "-n", script], check=True)
