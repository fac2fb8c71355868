"""Files of ``--to sky``, ``hf-jobs`` and ``ray`` do every unit in order, on stand-ins."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.cli.hf import app
from support.execution.launches import CONFIG, check_order

SKY = """
assert words[:3] == ["jobs", "launch", "--yes"]
task = json.loads(Path(words[-1]).with_suffix(".json").read_text())
more = dict(word.split("=", 1) for word in words if word.startswith("UNIT="))
assert set(more) == set(task.get("envs", {}))
code = subprocess.call(["bash", "-c", task["run"]], env={**os.environ, **more})
"""
HF = """
if words[:2] == ["jobs", "run"]:
    image = words.index("reg/merit:1")
    code = subprocess.call(words[image + 1:], stdout=sys.stderr)
    print(len(words[-1]) + os.getpid())
else:
    assert words[:2] == ["jobs", "wait"] and len(words) > 2
"""


def sky_tasks(jobs):
    return {file: yaml.safe_load(file.read_text()) for file in sorted(jobs.glob("*.yaml"))}


@pytest.fixture
def make_sky(make_jobs, programs):
    programs.add("sky", SKY)

    def make(*words):
        jobs = make_jobs("sky", *words)
        for file, task in sky_tasks(jobs).items():
            file.with_suffix(".json").write_text(json.dumps(task))
        return jobs

    return make


def check_calls(programs, project):
    check_order(programs.units())
    for call in programs.calls("merit-fast"):
        assert call.words == ["unit", CONFIG, "train.engine_config=null", call.unit]
        assert call.folder == str(project)


def test_sky_does_every_unit_in_order(project, programs, make_sky):
    result = programs.run(make_sky() / "submit.sh")
    assert result.returncode == 0, result.stderr
    check_calls(programs, project)


def test_a_failed_managed_job_ends_the_script(project, programs, make_sky):
    result = programs.run(make_sky() / "submit.sh", FAILS="train/merit-1")
    assert result.returncode != 0
    assert not any(unit.startswith("merge/") for unit in programs.units())


def test_sky_tasks_have_the_options(project, make_sky):
    words = ("--gpus", 8, "--accelerator", "H100", "--cpus", 32, "--secret", "HF_TOKEN")
    tasks = {task["name"]: task for task in sky_tasks(make_sky(*words)).values()}
    mount = {str(project): {"source": "s3://bucket", "mode": "MOUNT_CACHED"}}
    for task in tasks.values():
        assert task["resources"]["use_spot"] and task["resources"]["cpus"] == "32+"
        assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 3
        assert task["secrets"] == {"HF_TOKEN": None}  # its value comes with `--secret HF_TOKEN`
        assert task["file_mounts"] == mount and "volumes" not in task
        assert task["setup"] == "pip install merit_fast\n"
    accelerators = {name: task["resources"].get("accelerators") for name, task in tasks.items()}
    assert accelerators["mine-train"] == {"H100": 8}
    assert accelerators["mine-sketch"] == accelerators["mine-evaluate"] == {"H100": 1}
    assert accelerators["mine-merge"] is None and accelerators["mine-split"] is None


def test_hf_jobs_do_every_unit_in_order(project, programs, make_jobs):
    programs.add("hf", HF)
    result = programs.run(make_jobs("hf-jobs") / "submit.sh")
    assert result.returncode == 0, result.stderr
    check_calls(programs, project)
    waits = [call.words[2:] for call in programs.calls("hf") if call.words[1] == "wait"]
    assert [len(ids) for ids in waits] == [3, 1, 1, 3, 1, 1, 4, 1, 1]


def test_an_hf_job_that_does_not_start_ends_the_script(project, programs, make_jobs):
    programs.add("hf", HF)
    result = programs.run(make_jobs("hf-jobs") / "submit.sh", FAILS="sketch/code")
    assert result.returncode != 0
    assert set(programs.units()) <= {"sketch/facts", "sketch/code"}


def test_the_hub_s_own_parser_reads_the_jobs(project, programs, make_jobs, monkeypatch):
    programs.add("hf", HF)
    monkeypatch.setenv("HF_TOKEN", "hf_not-a-real-token")
    words = ("--gpus", 8, "--accelerator", "h200x8", "--time", "36h", "--secret", "HF_TOKEN")
    assert programs.run(make_jobs("hf-jobs", *words) / "submit.sh").returncode == 0
    calls = [call.words for call in programs.calls("hf") if call.words[1] == "run"]
    branch = next(words for words in calls if words[-1] == "train/merit-1")
    started = []

    class Started(Exception):
        pass

    def run_job(self, **options):
        started.append(options)
        raise Started

    monkeypatch.setattr(HfApi, "run_job", run_job)
    with pytest.raises(Started):
        app(args=branch, standalone_mode=False)
    (job,) = started
    run = ["merit_fast", "unit", CONFIG, "train.engine_config=null", "train/merit-1"]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "8", "-m"]
    assert job["command"] == ["bash", "-c", 'cd "$0" && exec "$@"', str(project), *torchrun, *run]
    assert (job["image"], job["flavor"]) == ("reg/merit:1", "h200x8")
    assert (job["timeout"], job["attempts"]) == ("2160m", 3)
    assert job["secrets"] == {"HF_TOKEN": "hf_not-a-real-token"}
    assert job["labels"]["name"] == "mine-train-merit-1"
    (volume,) = job["volumes"]
    assert (volume.type, volume.source, volume.mount_path) == ("bucket", "me/runs", str(project))
    flavors = {words[-1]: words[words.index("--flavor") + 1] for words in calls}
    assert flavors["split"] == flavors["merge/merit"] == "cpu-upgrade"


@pytest.mark.parametrize("join", [shlex.join, subprocess.list2cmdline], ids=["now", "older Ray"])
def test_ray_runs_the_driver(tmp_path, monkeypatch, programs, make_jobs, join):
    """Ray runs the words behind -- by a shell; older versions join them as Windows does."""
    from support.execution.launches import write_config

    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_config(Path("my run's.yml"))
    programs.add("ray")
    words = ("--gpus", 8, "--workers", 4, "--install", "merit_fast[ray]")
    jobs = make_jobs("ray", *words, inputs=["my run's.yml", "train.epochs=2"])
    assert programs.run(jobs / "submit.sh").returncode == 0
    (call,) = programs.calls("ray")
    start = call.words.index("--")
    assert call.words[:start] == [
        *("job", "submit", "--runtime-env-json", '{"pip": ["merit_fast[ray]"]}')
    ]
    entry = tmp_path / "entry.sh"
    entry.write_text(join(call.words[start + 1 :]))
    assert programs.run(entry).returncode == 0
    (driver,) = programs.calls("merit-fast")
    executor = ["--executor", "ray", "--workers", "4", "--unit-processes", "8", "--unit-gpus", "8"]
    assert driver.words == ["run", "my run's.yml", "train.epochs=2", *executor]
    assert driver.folder == str(folder)


def test_ray_refuses_names_that_it_may_change(project, call):
    code, shown, error = call("launch", CONFIG, "--to", "ray")
    assert code == 2 and shown == ""
    assert error.startswith("error: command line: --to ray: a path or value must have no double")


def test_scripts_parse(project, make_jobs, make_sky):
    for target in ("sky", "hf-jobs"):
        for script in make_jobs(target).glob("*.sh"):
            subprocess.run(["bash", "-n", script], check=True)
    for task in sky_tasks(make_sky()).values():
        subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
