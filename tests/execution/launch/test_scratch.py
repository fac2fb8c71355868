"""Jobs with a scratch folder see no disk of this machine: they bring the config along."""

import subprocess

import pytest
import yaml
from support.execution.launches import CONFIG, check_order

from merit_fast.pipeline.config import read_run_config

DATASETS = ("facts", "code", "maths")
ROWS = ", ".join(f"{{name: {name}, path: org/{name}}}" for name in DATASETS)
INPUTS = [CONFIG, "model=org/base", f"mixture=[{ROWS}]"]
URL = "s3://bucket/it's a run"
OPTIONS = {
    "slurm": [],
    "sky": ["--install", "merit_fast"],
    "k8s-job": ["--image", "reg/merit:1"],
    "hf-jobs": ["--image", "reg/merit:1"],
}


@pytest.fixture
def make(project, call, tmp_path):
    """Writes the job files of a target; returns their folder and the scratch folder."""

    def make(target, *words, inputs=INPUTS):
        out = tmp_path / "jobs"
        scratch = tmp_path / "it's local"
        options = ["--to", target, "--out", out, "--storage", URL, "--scratch", scratch]
        code, _, error = call("launch", *inputs, *options, *OPTIONS.get(target, []), *words)
        assert code == 0, error
        return out, scratch

    return make


def scripts_of(target, jobs):
    """The bash of every job, in order, with its variables."""
    if target == "slurm":
        names = ("sketch", "split", "train", "base", "merge", "evaluate", "report")
        for name in names:
            text = (jobs / f"{name}.sbatch").read_text()
            array = [line for line in text.splitlines() if line.startswith("#SBATCH --array=0-")]
            for i in range(int(array[0].rpartition("-")[2]) + 1) if array else [0]:
                yield text, {"SLURM_ARRAY_TASK_ID": str(i)}
        return
    for file in sorted(jobs.glob("*.yaml")):
        task = yaml.safe_load(file.read_text())
        if target == "sky":
            units = UNITS.get(task["name"].removeprefix("mine-"), [None])
            for unit in units if "envs" in task else [None]:
                yield task["run"], {"UNIT": unit} if unit else {}
            continue
        pod = task["spec"]["template"]["spec"]
        text = pod["containers"][0]["command"][2].replace("$$", "$")  # as Kubernetes does
        for i in range(task["spec"].get("completions", 1)):
            yield text, {"JOB_COMPLETION_INDEX": str(i)}


BRANCHES = ["merit-0", "merit-1", "joint"]
UNITS = {
    "sketch": [f"sketch/{name}" for name in DATASETS],
    "train": [f"train/{name}" for name in BRANCHES],
    "evaluate": [f"evaluate/{name}" for name in [*BRANCHES, "merit"]],
}


def check_calls(programs, scratch):
    check_order(programs.units())
    for call in programs.calls("merit-fast"):
        file, *words, unit = call.words[1:]
        assert words == ["--storage", URL, "--scratch", str(scratch)] and unit == call.unit
        assert file == str(scratch / "units" / "run.yml")
    config = read_run_config(scratch / "units" / "run.yml")
    assert config.model == "org/base" and config.output == str(scratch)
    assert [dataset.path for dataset in config.mixture] == [f"org/{name}" for name in DATASETS]


@pytest.mark.parametrize("target", ["slurm", "sky", "k8s-job"])
def test_jobs_bring_the_config_and_do_every_unit(programs, make, tmp_path, target):
    jobs, scratch = make(target)
    for i, (text, variables) in enumerate(scripts_of(target, jobs)):
        script = tmp_path / f"job-{i}.sh"
        script.write_text(text)
        result = programs.run(script, **variables)
        assert result.returncode == 0, result.stderr
    check_calls(programs, scratch)


def test_hf_jobs_bring_the_config_and_do_every_unit(programs, make):
    body = """
if words[:2] == ["jobs", "run"]:
    assert "--volume" not in words
    image = words.index("reg/merit:1")
    code = subprocess.call(words[image + 1:], stdout=sys.stderr)
    print(os.getpid())
"""
    programs.add("hf", body)
    jobs, scratch = make("hf-jobs")
    result = programs.run(jobs / "submit.sh")
    assert result.returncode == 0, result.stderr
    check_calls(programs, scratch)


def test_nothing_is_mounted_but_a_pod_keeps_its_scratch_folder(make):
    jobs, scratch = make("k8s-job")
    for file in jobs.glob("*.yaml"):
        pod = yaml.safe_load(file.read_text())["spec"]["template"]["spec"]
        assert pod["volumes"] == [{"name": "run", "emptyDir": {}}]
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == str(scratch)
    jobs, _ = make("sky")
    for file in jobs.glob("*.yaml"):
        assert {"file_mounts", "volumes"}.isdisjoint(yaml.safe_load(file.read_text()))


def test_ray_s_driver_gets_the_store(tmp_path, monkeypatch, call):
    from support.execution.launches import write_config

    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "run.yml")
    words = ["--to", "ray", "--storage", "s3://bucket/run", "--scratch", "/local/run"]
    code, script, error = call("launch", "run.yml", *words)
    assert code == 0, error
    driver = "merit-fast run run.yml --executor ray --storage s3://bucket/run --scratch /local/run"
    assert driver in script and "the driver's node sees the folder" in script
    subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.parametrize(
    "words,rule",
    [
        (["--scratch", "/s"], "--scratch: goes with --storage, which is not given"),
        (["--storage", "s3://b"], "--storage: goes with --scratch, which is not given"),
        (["--storage", "here", "--scratch", "/s"], "--storage: must be a URL with --scratch"),
        (["--storage", "s3://b", "--scratch", "s"], "--scratch: must be an absolute path, got 's'"),
        (["--storage", "s3://me:planted@b", "--scratch", "/s"], "--storage: must be a path or URL"),
    ],
)
def test_a_store_and_a_scratch_folder_go_together(project, call, words, rule):
    code, shown, error = call("launch", CONFIG, "--to", "slurm", *words)
    assert (code, shown) == (2, "") and rule in error and "planted" not in error


def test_inputs_of_this_machine_are_refused(project, call):
    words = ["--to", "sky", *OPTIONS["sky"], "--storage", "s3://b/run", "--scratch", "/s"]
    code, _, error = call("launch", CONFIG, *words, "model=org/base")
    assert code == 2
    assert "mixture[0].path: must be an id of the hub or a URL with --scratch" in error
    code, _, error = call("launch", *INPUTS, *words[:-3], "claim", *words[-2:])
    assert code == 2 and "--storage: must be a URL with --scratch" in error
