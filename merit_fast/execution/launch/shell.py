"""``--to shell``: a bash script that does the units on this machine, in order."""

import shlex

from merit_fast.execution.launch.job import Launch, bash_file, heading, run_words, unit_words
from merit_fast.execution.launch.steps import Step

_ON_ONE = 'export CUDA_VISIBLE_DEVICES=$SLOT; exec "$@"'
_ON_SEVERAL = (
    'first=$((SLOT * {count})); CUDA_VISIBLE_DEVICES=$(seq -s , "$first" "$((first + {more}))"); '
    'export CUDA_VISIBLE_DEVICES; exec "$@"'
)


def shell_files(launch: Launch) -> dict[str, str]:
    """The script, by its name."""
    lines = [f"cd {shlex.quote(launch.folder)}"]
    for step in launch.steps:
        lines += ["", f"# {step.name}", *_step(launch, step)]
    if launch.undecided:
        lines += ["", f"# The split decides the rest ({launch.undecided}).", _rest(launch)]
    return {"run.sh": bash_file(heading(launch, "The units of a run, in order."), lines)}


def _step(launch: Launch, step: Step) -> list[str]:
    words = unit_words(launch, step)
    workers = _at_a_time(launch, step)
    if workers == 1 or len(step.units) == 1:
        return [f"{shlex.join(words)} {shlex.quote(unit)}" for unit in step.units]
    if step.gpus:
        several = _ON_SEVERAL.format(count=step.gpus, more=step.gpus - 1)
        script = several if step.gpus > 1 else _ON_ONE
        words = ["bash", "-c", script, "worker", *words]
    units = [f"    {shlex.quote(unit)} \\" for unit in step.units]
    units[-1] = units[-1].removesuffix("\\") + "|"
    xargs = f"xargs -0 -n 1 -P {workers} --process-slot-var=SLOT"
    return ["printf '%s\\0' \\", *units, f"    {xargs} {shlex.join(words)}"]


def _at_a_time(launch: Launch, step: Step) -> int:
    """Units of a step at a time: a worker's GPUs serve as many units that need one."""
    if not step.is_parallel:
        return 1
    workers = launch.options.workers or 1
    return workers * launch.gpus // step.gpus if step.gpus else workers


def _rest(launch: Launch) -> str:
    if launch.options.workers or launch.gpus:
        return shlex.join(run_words(launch, "local"))
    return shlex.join(["merit-fast", "run", *launch.words])
