"""``--to hf-jobs``: a script that runs the units as Jobs of the Hugging Face hub."""

import shlex
from pathlib import Path

from merit_fast.execution.launch.job import Launch, array_lines, bash_file, heading, unit_words
from merit_fast.execution.launch.steps import Step

_ATTEMPTS = 3
_SUBMIT = """\
gpu_flavor={flavor}  # hf jobs hardware lists them; units of other steps need one GPU only
cpu_flavor=cpu-upgrade
job() {{  # NAME FLAVOR COMMAND...: starts a Job and prints its id
    local name=$1 flavor=$2
    shift 2
    hf jobs run --detach --quiet --name "$name" --flavor "$flavor" {words} \\
        -- {image} bash -c {start} {place} "$@"
}}"""
_IN_FOLDER = 'cd "$0" && exec "$@"'
_WITH_CONFIG = 'mkdir -p {folder} && printf %s "$0" > {file} && exec "$@"'
_STEP = """\
ids=()
for unit in "${{units[@]}}"; do
    id=$(job "{name}-${{unit##*/}}" "${flavor}" {command} "$unit")
    ids+=("$id")
{wait_each}done
{wait_all}"""


def hf_files(launch: Launch) -> dict[str, str]:
    """The script, by its name."""
    options = launch.options
    words = ["--attempts", str(_ATTEMPTS)]
    start = _IN_FOLDER
    if launch.config:
        file = launch.config_file
        folder = str(Path(file).parent)
        start = _WITH_CONFIG.format(folder=shlex.quote(folder), file=shlex.quote(file))
    else:
        words += ["--volume", f"{options.storage}:{launch.folder}"]
    if options.minutes:
        words += ["--timeout", f"{options.minutes}m"]
    for name in options.secret:
        words += ["--secrets", name]
    head = _SUBMIT.format(
        flavor=shlex.quote(options.accelerator or "cpu-upgrade"),
        words=shlex.join(words),
        image=shlex.quote(options.image or ""),
        start=shlex.quote(start),
        place=shlex.quote(launch.config or launch.folder),
    )
    lines = head.splitlines()
    for step in launch.steps:
        lines += ["", f"# {step.name}", *array_lines(step), *_step(launch, step)]
    purpose = "Runs the units as Jobs of the Hugging Face hub."
    return {"submit.sh": bash_file(heading(launch, purpose), lines)}


def _step(launch: Launch, step: Step) -> list[str]:
    text = _STEP.format(
        name=launch.job_name(step),
        flavor="gpu_flavor" if step.gpus else "cpu_flavor",
        command=shlex.join(unit_words(launch, step)),
        wait_each="" if step.is_parallel else '    hf jobs wait "$id"\n',
        wait_all='hf jobs wait "${ids[@]}"' if step.is_parallel else "",
    )
    return text.splitlines()
