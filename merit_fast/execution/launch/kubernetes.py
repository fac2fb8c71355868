"""``--to k8s-job``: a Job for each step, Indexed where its units are parallel."""

import re
from typing import Any

from merit_fast.execution.launch.documents import yaml_text
from merit_fast.execution.launch.job import Launch, bash_file, heading, step_lines
from merit_fast.execution.launch.steps import Step

_RESTARTS = 6  # of a unit, evicted pods included
_SUBMIT = """\
cd "$(dirname "$0")"
state() {  # prints the conditions of a Job that hold
    kubectl get job "$@" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}'
}
run_job() {  # NAME FILE: starts a Job and waits for its end
    local conditions
    conditions=$(state "$1" --ignore-not-found)
    if [[ $conditions == *Failed* ]]; then
        kubectl delete job "$1"
    fi
    kubectl apply -f "$2"
    while true; do
        conditions=$(state "$1")
        case $conditions in
            *Complete*) return ;;
            *Failed*) echo "$1: failed; see kubectl logs job/$1" >&2; return 1 ;;
        esac
        sleep "${POLL_S:-10}"
    done
}"""


def kubernetes_files(launch: Launch) -> dict[str, str]:
    """NUMBER-STEP.yaml and submit.sh, by their names."""
    files = {}
    lines = _SUBMIT.splitlines()
    for number, step in enumerate(launch.steps, 1):
        file = f"{number}-{step.name}.yaml"
        purpose = f"The units of the step {step.name}, as a Job."
        files[file] = yaml_text(heading(launch, purpose), _job(launch, step))
        lines.append(f"run_job {launch.job_name(step)} {file}")
    return {**files, "submit.sh": bash_file(heading(launch, "Runs the Jobs of a run."), lines)}


def _job(launch: Launch, step: Step) -> dict[str, Any]:
    count = len(step.units)
    spec: dict[str, Any] = {"backoffLimit": _RESTARTS * count}
    if step.is_parallel:
        spec["completionMode"] = "Indexed"
        spec["completions"] = count
        spec["parallelism"] = min(launch.options.workers or count, count)
    if launch.options.minutes:
        spec["activeDeadlineSeconds"] = 60 * launch.options.minutes
    spec["template"] = {"spec": _pod(launch, step)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": launch.job_name(step), "labels": {"merit-fast/run": launch.name}},
        "spec": spec,
    }


def _pod(launch: Launch, step: Step) -> dict[str, Any]:
    options = launch.options
    lines = ["set -euo pipefail", *step_lines(launch, step, "JOB_COMPLETION_INDEX")]
    container: dict[str, Any] = {
        "name": step.name,
        "image": options.image,
        "command": ["bash", "-c", _escaped("\n".join([*lines, ""]))],
        "volumeMounts": [{"name": "run", "mountPath": options.scratch or launch.folder}],
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.secret]
    resources: dict[str, Any] = {}
    if options.cpus:
        resources["requests"] = {"cpu": str(options.cpus)}
    if step.gpus:
        resources["limits"] = {"nvidia.com/gpu": str(step.gpus)}
    if resources:
        container["resources"] = resources
    volume: dict[str, Any] = {"persistentVolumeClaim": {"claimName": options.storage}}
    if options.scratch:  # which a container that starts again finds as it was
        volume = {"emptyDir": {}}
    volumes: list[dict[str, Any]] = [{"name": "run", **volume}]
    if step.gpus > 1:  # the processes of torchrun exchange through /dev/shm, which is 64 MiB
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    return {"restartPolicy": "OnFailure", "containers": [container], "volumes": volumes}


def _escaped(text: str) -> str:
    """The text with ``$(`` and ``$$`` as Kubernetes leaves them to bash."""
    return re.sub(r"\$(?=[$(])", "$$", text)
