"""The Jobs of ``--to k8s-job`` do every unit in order; their fields are those of batch/v1."""

import json
import re
import subprocess

import pytest
import yaml
from support.execution.launches import CONFIG, check_order

# Runs a Job when it is applied; its conditions are in a file, of one word each.
KUBECTL = r"""
import re
state = Path(sys.argv[0]).with_name("state.json")
jobs = json.loads(state.read_text()) if state.exists() else {}
if words[:2] == ["get", "job"]:
    if words[2] in jobs:
        print(jobs[words[2]], end="")
    else:
        code = 0 if "--ignore-not-found" in words else 1
elif words[:2] == ["delete", "job"]:
    del jobs[words[2]]
elif words[:2] == ["apply", "-f"]:
    job = json.loads(Path(words[2]).with_suffix(".json").read_text())
    name = job["metadata"]["name"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    def expand(text):
        known = lambda match: "$" if match[0] == "$$" else os.environ.get(match[1], match[0])
        return re.sub(r"\$\$|\$\(([A-Za-z_]+)\)", known, text)
    command = [expand(word) for word in container["command"]]
    if name not in jobs:
        for index in range(job["spec"].get("completions", 1)):
            environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
            failed = subprocess.call(command, env=environment)
            jobs[name] = "FailureTarget Failed" if failed else "SuccessCriteriaMet Complete"
            if failed:
                break
    state.write_text(json.dumps(jobs))
if words[0] == "delete":
    state.write_text(json.dumps(jobs))
"""


@pytest.fixture
def make(make_jobs, programs):
    """Makes the files, and the JSON by which the stand-in of kubectl reads each."""
    programs.add("kubectl", KUBECTL)

    def make(*words):
        jobs = make_jobs("k8s-job", *words)
        for file in jobs.glob("*.yaml"):
            file.with_suffix(".json").write_text(json.dumps(yaml.safe_load(file.read_text())))
        return jobs

    return make


def documents(jobs):
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted(jobs.glob("*.yaml"))}


def test_jobs_do_every_unit_in_order(project, programs, make):
    result = programs.run(make() / "submit.sh")
    assert result.returncode == 0, result.stderr
    check_order(programs.units())
    for call in programs.calls("merit-fast"):
        assert call.words == ["unit", CONFIG, "train.engine_config=null", call.unit]
        assert call.folder == str(project)


def test_words_that_kubernetes_would_expand_reach_the_command(
    project, programs, make_jobs, make, monkeypatch
):
    """Kubernetes replaces $(NAME) and $$ in a command."""
    monkeypatch.setenv("NAME", "replaced")
    (project / "$(NAME)$$.yml").write_text((project / CONFIG).read_text())
    jobs = make_jobs("k8s-job", inputs=["$(NAME)$$.yml"])
    for file in jobs.glob("*.yaml"):
        file.with_suffix(".json").write_text(json.dumps(yaml.safe_load(file.read_text())))
    assert programs.run(jobs / "submit.sh").returncode == 0
    assert {call.words[1] for call in programs.calls("merit-fast")} == {"$(NAME)$$.yml"}


def test_a_failed_job_ends_the_script_and_is_made_again_by_the_next(project, programs, make):
    jobs = make()
    result = programs.run(jobs / "submit.sh", FAILS="split")
    assert result.returncode != 0 and "mine-split: failed" in result.stderr
    assert not any(unit.startswith("train/") for unit in programs.units())
    programs.log.unlink()
    result = programs.run(jobs / "submit.sh")
    assert result.returncode == 0, result.stderr
    assert ["delete", "job", "mine-split"] in [call.words for call in programs.calls("kubectl")]
    assert programs.units()[:2] == ["sketch", "split"]  # the sketch of each dataset is not repeated


def test_an_absent_job_ends_the_wait(project, programs, make):
    programs.add(
        "kubectl", "code = 0 if '--ignore-not-found' in words or words[0] == 'apply' else 1"
    )
    assert programs.run(make() / "submit.sh").returncode != 0


def test_fields_are_those_of_the_options(project, make):
    words = ("--gpus", 8, "--cpus", 16, "--time", "2d", "--workers", 2, "--secret", "hub-token")
    jobs = documents(make(*words))
    assert list(jobs) == [
        *("1-sketch", "2-split", "3-train", "4-base", "5-merge", "6-evaluate", "7-report")
    ]
    for job in jobs.values():
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert job["spec"]["activeDeadlineSeconds"] == 2 * 24 * 3600
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "OnFailure"
        assert {"name": "run", "persistentVolumeClaim": {"claimName": "claim"}} in pod["volumes"]
        (container,) = pod["containers"]
        assert container["image"] == "reg/merit:1"
        assert container["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
        assert {"name": "run", "mountPath": str(project)} in container["volumeMounts"]
        assert container["resources"]["requests"] == {"cpu": "16"}
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", job["metadata"]["name"])
    branches = jobs["3-train"]["spec"]
    assert (branches["completionMode"], branches["completions"]) == ("Indexed", 3)
    assert branches["parallelism"] == 2 and branches["backoffLimit"] == 18
    pod = branches["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    split = jobs["2-split"]["spec"]["template"]["spec"]["containers"][0]
    assert "limits" not in split["resources"]


def test_scripts_parse(project, make):
    jobs = make("--gpus", 2)
    subprocess.run(["bash", "-n", jobs / "submit.sh"], check=True)
    for job in documents(jobs).values():
        command = job["spec"]["template"]["spec"]["containers"][0]["command"]
        assert command[:2] == ["bash", "-c"]
        subprocess.run(["bash", "-n", "-c", command[2]], check=True)
