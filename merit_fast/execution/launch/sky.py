"""``--to sky``: a SkyPilot task for each step, and a script that runs them as managed jobs."""

import shlex
from typing import Any

from merit_fast.execution.launch.documents import yaml_text
from merit_fast.execution.launch.job import (
    Launch,
    array_lines,
    bash_file,
    heading,
    place_lines,
    step_lines,
    unit_words,
)
from merit_fast.execution.launch.steps import Step

_RESTARTS = 3  # after an error; a preemption counts for none
_EACH = """\
jobs=()
for unit in "${{units[@]}}"; do
    {launch} --name "{name}-${{unit##*/}}" --env UNIT="$unit" {file} &
    jobs+=("$!")
done
for job in "${{jobs[@]}}"; do
    wait "$job"
done"""


def sky_files(launch: Launch) -> dict[str, str]:
    """NUMBER-STEP.yaml and submit.sh, by their names."""
    files = {}
    command = shlex.join(["sky", "jobs", "launch", "--yes", *_secret_words(launch)])
    lines = ['cd "$(dirname "$0")"']
    for number, step in enumerate(launch.steps, 1):
        file = f"{number}-{step.name}.yaml"
        purpose = f"A SkyPilot task: {'a unit' if step.is_parallel else 'units'} of {step.name}."
        files[file] = yaml_text(heading(launch, purpose), _task(launch, step))
        if step.is_parallel:
            each = _EACH.format(launch=command, name=launch.job_name(step), file=file)
            lines += ["", *array_lines(step), *each.splitlines()]
        else:
            lines += ["", f"{command} --name {launch.job_name(step)} {file}"]
    purpose = "Runs the units as managed jobs of SkyPilot, which start again after a preemption."
    return {**files, "submit.sh": bash_file(heading(launch, purpose), lines)}


def _secret_words(launch: Launch) -> list[str]:
    return [word for name in launch.options.secret for word in ("--secret", name)]


def _task(launch: Launch, step: Step) -> dict[str, Any]:
    options = launch.options
    resources: dict[str, Any] = {
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": _RESTARTS},
    }
    if step.gpus:
        resources["accelerators"] = {options.accelerator: step.gpus}
    if options.cpus:
        resources["cpus"] = f"{options.cpus}+"
    if options.image:
        resources["image_id"] = f"docker:{options.image}"
    task: dict[str, Any] = {"name": launch.job_name(step), "resources": resources}
    if step.is_parallel:
        task["envs"] = {"UNIT": None}
    if options.secret:
        task["secrets"] = dict.fromkeys(options.secret)
    storage = options.storage or ""
    if options.scratch:
        pass  # units fetch and send by themselves
    elif "://" in storage:
        task["file_mounts"] = {launch.folder: {"source": storage, "mode": "MOUNT_CACHED"}}
    else:
        task["volumes"] = {launch.folder: storage}
    if options.install:
        task["setup"] = f"pip install {shlex.quote(options.install)}\n"
    task["run"] = "\n".join(["set -euo pipefail", *_run(launch, step), ""])
    return task


def _run(launch: Launch, step: Step) -> list[str]:
    if not step.is_parallel:
        return step_lines(launch, step, "")
    command = shlex.join(unit_words(launch, step))
    return [*place_lines(launch), f'exec {command} "$UNIT"']
