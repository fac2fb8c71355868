"""A launch: the run, its steps and the options of the jobs; and the bash of its commands."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from merit_fast.execution.launch.steps import Step
from merit_fast.manifests.ledger import UNITS_FOLDER

_LONGEST = 30  # characters of a run's name in names of jobs
_END = "END_OF_THE_CONFIG"
_UNSAFE = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Options:
    """Options of ``launch``; a target reads some of them (``targets.TARGETS``).

    None and () stand for options that are not given.
    """

    gpus: int | None = None
    cpus: int | None = None
    workers: int | None = None
    minutes: int | None = None
    partition: str | None = None
    accelerator: str | None = None
    image: str | None = None
    install: str | None = None
    storage: str | None = None
    scratch: str | None = None
    secret: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """All that a job file is made of.

    Attributes:
        target: the name of the target.
        made_by: the command line that makes the files again.
        output: of the run.
        folder: absolute path of the folder in which every command runs.
        words: CONFIG.yml and the values that override its keys.
        steps: the units that are to be done.
        undecided: keys that leave the branches to the split, which is not done; "" otherwise.
        options: of the jobs.
        config: the resolved YAML, for jobs that see no folder of this machine; "" otherwise.
    """

    target: str
    made_by: str
    output: str
    folder: str
    words: tuple[str, ...]
    steps: tuple[Step, ...]
    undecided: str = ""
    options: Options = field(default=Options())
    config: str = ""

    @property
    def storage_words(self) -> tuple[str, ...]:
        """Words of a command that name the store of outputs and the scratch folder."""
        if self.options.scratch is None:
            return ()
        return "--storage", self.options.storage or "", "--scratch", self.options.scratch

    @property
    def config_file(self) -> str:
        """The path at which a job puts the YAML that it brings along."""
        return f"{self.options.scratch}/{UNITS_FOLDER}/run.yml"

    @property
    def name(self) -> str:
        """The output's own name, with which names of jobs begin: they must be short and plain."""
        plain = _UNSAFE.sub("-", Path(self.output).name.lower()).strip("-")
        return plain[:_LONGEST].strip("-") or "merit"

    @property
    def gpus(self) -> int:
        """GPUs of a branch."""
        return self.options.gpus or 0

    def job_name(self, step: Step) -> str:
        return f"{self.name}-{step.name}"


def unit_words(launch: Launch, step: Step) -> list[str]:
    """The command of a step's unit without the unit's name, which comes last."""
    program = ["merit-fast"]
    if step.processes > 1:
        program = ["torchrun", "--standalone", "--nproc-per-node", str(step.processes)]
        program += ["-m", "merit_fast"]
    words = (launch.config_file,) if launch.config else launch.words
    return [*program, "unit", *words, *launch.storage_words]


def run_words(launch: Launch, executor: str) -> list[str]:
    """The command of a driver that does all units."""
    words = ["merit-fast", "run", *launch.words, "--executor", executor, *launch.storage_words]
    if launch.options.workers:
        words += ["--workers", str(launch.options.workers)]
    if launch.gpus > 1:
        words += ["--unit-processes", str(launch.gpus)]
    return words


def step_lines(launch: Launch, step: Step, index: str) -> list[str]:
    """Bash of one job of a step.

    Args:
        launch: the launch.
        step: the step.
        index: the variable with the number of a parallel step's job, from 0.
    """
    command = shlex.join(unit_words(launch, step))
    lines = place_lines(launch)
    if not step.is_parallel:
        return lines + [f"{command} {shlex.quote(unit)}" for unit in step.units]
    return [*lines, *array_lines(step), f'exec {command} "${{units[{index}]}}"']


def place_lines(launch: Launch) -> list[str]:
    """Bash that goes into the run's folder; or that writes the YAML, for a job that sees none."""
    if not launch.config:
        return [f"cd {shlex.quote(launch.folder)}"]
    file = shlex.quote(launch.config_file)
    return [
        f"mkdir -p {shlex.quote(str(Path(launch.config_file).parent))}",
        f"cat > {file}.$$ <<'{_END}'",
        *launch.config.splitlines(),
        _END,
        f"mv {file}.$$ {file}",
    ]


def array_lines(step: Step) -> list[str]:
    """Bash that puts the names of a step's units into the array ``units``."""
    return ["units=(", *(f"    {shlex.quote(unit)}" for unit in step.units), ")"]


def heading(launch: Launch, purpose: str) -> list[str]:
    """Comments at the top of a file."""
    lines = [
        f"# {purpose}",
        f"# Made by: {' '.join(launch.made_by.split())}",
        "# After an interruption or a preemption the same command resumes: finished units end at",
        "# once. Variables with secrets are named here, never written.",
    ]
    if launch.undecided and launch.target != "shell":  # whose script does the rest too
        lines += [
            f"# The split decides the branches ({launch.undecided}), so the jobs end with it.",
            "# Make those after it by the same `merit-fast launch`, where the output can be seen.",
        ]
    return lines


def bash_file(heading_lines: Iterable[str], lines: Iterable[str]) -> str:
    """A bash script that ends at the first command that fails."""
    return "\n".join(["#!/usr/bin/env bash", *heading_lines, "set -euo pipefail", *lines, ""])
