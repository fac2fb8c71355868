"""``--to slurm``: a batch script for each step, and a script that submits them in order."""

from merit_fast.execution.launch.job import Launch, bash_file, heading, step_lines
from merit_fast.execution.launch.steps import Step

_SUBMIT = """\
cd "$(dirname "$0")"
submit() {  # prints the id of the job
    local id
    id=$(sbatch --parsable --kill-on-invalid-dep=yes "$@") || return
    echo "${id%%;*}"
}"""


def slurm_files(launch: Launch) -> dict[str, str]:
    """STEP.sbatch and submit.sh, by their names."""
    files = {f"{step.name}.sbatch": _batch_script(launch, step) for step in launch.steps}
    lines = _SUBMIT.splitlines()
    for step in launch.steps:
        ids = ":".join(f"${name}" for name in step.after)
        after = f'--dependency="afterok:{ids}" ' if ids else ""
        lines.append(f"{step.name}=$(submit {after}{step.name}.sbatch)")
    ids = " ".join(f"${step.name}" for step in launch.steps)
    lines.append(f'echo "submitted: {ids}"')
    return {**files, "submit.sh": bash_file(heading(launch, "Submits the jobs of a run."), lines)}


def _batch_script(launch: Launch, step: Step) -> str:
    options = launch.options
    number = "%A_%a" if step.is_parallel else "%j"
    values = {
        "job-name": launch.job_name(step),
        "output": f"%x-{number}.log",
        "open-mode": "append",
        "nodes": "1",
        "ntasks": "1",
    }
    if options.cpus:
        values["cpus-per-task"] = str(options.cpus)
    if step.gpus:
        values["gpus-per-node"] = str(step.gpus)
    if options.minutes:
        values["time"] = str(options.minutes)
    if options.partition:
        values["partition"] = options.partition
    if step.is_parallel:
        limit = f"%{options.workers}" if options.workers else ""
        values["array"] = f"0-{len(step.units) - 1}{limit}"
    lines = [f"#SBATCH --{key}={value}" for key, value in values.items()]
    lines.append("#SBATCH --requeue")
    head = [*lines, *heading(launch, f"The units of the step {step.name}.")]
    return bash_file(head, step_lines(launch, step, "SLURM_ARRAY_TASK_ID"))
